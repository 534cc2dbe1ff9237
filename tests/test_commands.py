"""The commands in the README and the documentation: the flags here, the running in tests/stress/commands.py."""

import pathlib

import pytest

commands = pytest.importorskip("commands", reason="pytest's pythonpath has tests/stress")

from alexnet_jax import cli  # noqa: E402
from alexnet_jax.errors import UsageError  # noqa: E402

FOUND = commands.commands()
ROOT = pathlib.Path(__file__).parent.parent


def test_commands_are_found():
    assert FOUND["python train.py cifar10-paper --num-devices 8"] == "README.md"
    assert any(page.startswith("docs/") for page in FOUND.values())
    assert len(FOUND) > 50


def test_blocks_and_backticks_are_read(tmp_path):
    (tmp_path / "README.md").write_text(
        "Say `python train.py  # now` or `plain code`.\n\n"
        "```\npip install -e . && python eval.py RUN   # both\nls\n```\n\n"
        "```python\npython_is_no = 'command'\n```\n"
    )
    assert set(commands.commands(tmp_path)) == {"python train.py", "pip install -e . && python eval.py RUN"}
    assert list(commands.steps("pip install -e '.[a b]' && python eval.py RUN")) == [
        ["pip", "install", "-e", ".[a b]"],
        ["python", "eval.py", "RUN"],
    ]


@pytest.mark.parametrize("command", FOUND)
def test_every_program_and_flag_exists(command):
    for words in commands.steps(command):
        if words[0] == "python" and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file()
        try:
            match words:
                case ["python", "train.py", *flags] if "--help" not in flags:
                    cli.parse_train(flags)
                case ["python", "eval.py", *flags]:
                    cli.parse_eval(flags)
        except UsageError as error:
            pytest.fail(str(error))


def test_a_program_must_end_as_it_should():
    train, evaluate = ["python", "train.py"], ["python", "eval.py"]
    assert commands.right(train, 143, True)
    assert not commands.right(train, -15, True)
    assert not commands.right(train, 1, False)
    assert not commands.right(evaluate, 143, True)
    assert commands.right(["python", "tests/stress/kill.py"], -15, True)

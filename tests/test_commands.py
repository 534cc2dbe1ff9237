"""The commands in the README and the documentation: the flags here, the running in tests/stress/commands.py."""

import importlib.util
import pathlib
import re

import commands
import pytest

from alexnet_jax.config import cli
from alexnet_jax.errors import UsageError

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
    checked = 0
    for words in commands.steps(command):
        words = [word for word in words if "=" not in word or word.startswith("-")]  # without CIFAR10_DIR=DIR
        match words:
            case ["python", "train.py", *flags]:
                parse(cli.parse_train, [flag for flag in flags if flag != "--help"])
            case ["python", "eval.py", *flags]:
                parse(cli.parse_eval, flags)
            case ["python", "-m", module, *flags]:
                assert_flags_in(importlib.util.find_spec(module).origin, flags)
            case ["python", script, *flags]:
                assert_flags_in(ROOT / script, flags)
            case ["pytest", *flags]:
                assert all((ROOT / flag).exists() for flag in flags if flag.startswith("tests/"))
            case ["jupyter", "execute", *flags]:
                assert all((ROOT / flag).exists() for flag in flags if not flag.startswith("-"))
            case [program, *_]:
                assert program in ("pip", "ruff", "mypy", "pre-commit", "sphinx-build")
        checked += 1
    assert checked


def assert_flags_in(script, words):
    """Flags are declared as fields of a class, or by argparse."""
    text = pathlib.Path(script).read_text()
    for flag in [word.split("=")[0] for word in words if word.startswith("--")]:
        field = flag[2:].replace("-", "_")
        assert re.search(rf'^    {field}: |add_argument\("{flag}"', text, flags=re.MULTILINE), flag


def parse(parser, flags):
    try:
        parser(flags)
    except UsageError as error:
        pytest.fail(str(error))


def test_folders_and_data_are_put_in(tmp_path):
    place = commands.Place(tmp_path, None)
    fill = lambda command: place.fill(command.split())[1:]  # noqa: E731
    assert fill("python train.py cifar10-paper") == ["train.py", "cifar10-paper", "--dataset", "shapes"]
    assert fill("python train.py --data-dir DIR") == ["train.py", "--dataset", "shapes"]
    assert fill("python eval.py RUN") == ["eval.py", "runs/quickstart"]
    assert fill("python train.py cifar10 --epochs 14")[-2:] == ["--workdir", "runs/cifar10-epochs-14"]
    prepared = fill("python train.py imagenet-paper --data-dir PREPARED")
    assert prepared == ["train.py", "imagenet-paper", "--data-dir", str(tmp_path / "prepared")]
    place.data_dir = tmp_path
    assert fill("python benchmarks/ablate.py STUDY --data-dir DIR")[1:] == ["tips", "--data-dir", str(tmp_path)]
    assert fill("pre-commit install") == ["-m", "pre_commit", "install"]
    assert (place.root / "alexnet_jax" / "errors.py").is_file()


def test_a_program_must_end_as_it_should():
    train, evaluate = ["python", "train.py"], ["python", "eval.py"]
    assert commands.right(train, 143, True)
    assert not commands.right(train, -15, True)
    assert not commands.right(train, 1, False)
    assert not commands.right(evaluate, 143, True)
    assert commands.right(["python", "tests/stress/kill.py"], -15, True)
    assert not commands.right(["pytest", "tests/test_health.py"], 2, True)

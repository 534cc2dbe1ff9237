"""The commands in the README and the documentation: the flags here, the running in tests/stress/commands.py."""

import importlib.util
import pathlib
import re
import tomllib

import pytest

from alexnet_jax.config import cli
from alexnet_jax.errors import UsageError
from tests.stress import commands

FOUND = commands.commands()
ROOT = pathlib.Path(__file__).parent.parent


def test_commands_are_found():
    assert FOUND["python train.py cifar10-paper"] == "README.md"
    pages = set(FOUND.values())
    assert {"CONTRIBUTING.md", "benchmarks/README.md", "results/README.md"} <= pages
    assert {f"docs/{page}.md" for page in ("running", "imagenet", "results", "reliability", "scaling")} <= pages
    assert len(FOUND) > 70


def test_blocks_and_backticks_are_read(tmp_path):
    (tmp_path / "README.md").write_text(
        "Say `python train.py  # now` or `plain code`.\n\n"
        "```\npip install -e . && python eval.py RUN   # both\nls\npython train.py \\\n    --epochs 3\n```\n\n"
        "```python\npython_is_no = 'command'\n```\n"
    )
    assert set(commands.commands(tmp_path)) == {
        "python train.py",
        "pip install -e . && python eval.py RUN",
        "python train.py --epochs 3",
    }
    assert list(commands.steps("pip install -e '.[a b]' && python eval.py RUN")) == [
        ["pip", "install", "-e", ".[a b]"],
        ["python", "eval.py", "RUN"],
    ]


@pytest.mark.parametrize("command", FOUND)
def test_every_program_and_flag_exists(command):
    assert problems(command) == []


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --epoch 3",
        "python train.py cifar11",
        "python eval.py RUN --view 2",
        "python benchmarks/ablate.py tips --seed 3",
        "python benchmarks/none.py",
        "python -m tests.stress.fuzz --case 3",
        "python -m tests.stress.commands --data DIR",
        "python -m alexnet_jax.prepare imagenet",
        "python -m alexnet_jax.data.prepare imagenet --target DIR",
        "pytest tests/test_loop.py -k infinite_loops",
        "pytest tests/test_none.py",
        "pip install -e '.[everything]'",
        "jupyter execute notebooks/none.ipynb",
        "make all",
    ],
)
def test_a_wrong_command_is_found(command):
    assert len(problems(command)) == 1


def problems(command: str) -> list[str]:
    """Programs, files, flags, extras and names of tests in a command that do not exist."""
    return [problem for words in commands.steps(command) if (problem := problem_with(words))]


def problem_with(words: list[str]) -> str | None:
    words = [word for word in words if "=" not in word or word.startswith("-")]  # without CIFAR10_DIR=DIR
    match words:
        case ["python", "train.py", *flags]:
            return usage_error(cli.parse_train, [flag for flag in flags if flag != "--help"])
        case ["python", "eval.py", *flags]:
            return usage_error(cli.parse_eval, flags)
        case ["python", "-m", module, *flags]:
            try:
                spec = importlib.util.find_spec(module)
            except ModuleNotFoundError:
                spec = None
            return missing_flags(pathlib.Path(spec.origin), flags) if spec and spec.origin else f"no module {module}"
        case ["python", script, *flags]:
            return missing_flags(ROOT / script, flags)
        case ["pytest", *flags]:
            return missing_tests(flags)
        case ["jupyter", "execute", *flags]:
            return next((flag for flag in flags if not flag.startswith("-") and not (ROOT / flag).exists()), None)
        case ["pip", "install", "-e", target] | ["pip", "install", "--no-compile", "-e", target]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            return next((name for name in re.findall(r"[\w-]+", target) if name not in extras), None)
    return None if words[0] in ("ruff", "lint-imports", "mypy", "pre-commit", "sphinx-build") else f"program {words[0]}"


def usage_error(parser, flags: list[str]) -> str | None:
    try:
        parser(flags)
    except UsageError as error:
        return str(error)
    return None


def missing_flags(script: pathlib.Path, flags: list[str]) -> str | None:
    """The first flag that a script declares neither with argparse nor as a field of its options."""
    if not script.is_file():
        return f"no file {script}"
    text = script.read_text("utf-8")
    for flag in flags:
        field = flag[2:].replace("-", "_")
        if (
            flag.startswith("--")
            and f'add_argument("{flag}"' not in text
            and not re.search(rf"^    {field}: ", text, re.M)
        ):
            return f"{script.name} has no {flag}"
    return None


def missing_tests(flags: list[str]) -> str | None:
    files = [flag for flag in flags if flag.startswith("tests/")]
    if gone := next((file for file in files if not (ROOT / file).exists()), None):
        return f"no file {gone}"
    if "-k" in flags:
        part = flags[flags.index("-k") + 1]
        if not any(re.search(rf"def test_\w*{part}", (ROOT / file).read_text("utf-8")) for file in files):
            return f"no test named {part}"
    return None


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
    assert (place.root / "alexnet_jax" / "__init__.py").is_file()


def test_a_program_must_end_as_it_should():
    train, evaluate = ["python", "train.py"], ["python", "eval.py"]
    assert commands.right(train, 143, True)
    assert not commands.right(train, -15, True)
    assert not commands.right(train, 1, False)
    assert not commands.right(evaluate, 143, True)
    assert commands.right(["python", "-m", "tests.stress.kill"], -15, True)
    assert not commands.right(["pytest", "tests/test_health.py"], 2, True)

"""The command line as a user sees it: one line on stderr, the right exit code, no traceback."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from alexnet_jax import errors
from alexnet_jax.config import cli, flags
from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.config.settings import EvalConfig, TrainConfig
from alexnet_jax.config.types import Mark
from alexnet_jax.errors import AlexNetError, UsageError, program_name

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batchsize", "64"], "unknown flag --batchsize; did you mean --batch-size?"),
        (["--lerning-rate=1"], "unknown flag --lerning-rate; did you mean --learning-rate?"),
        (["--xyzzy"], "unknown flag --xyzzy (--help-all lists all)"),
        (["quickstrat"], "unknown preset 'quickstrat'; did you mean quickstart?"),
        (["--epochs", "3", "quickstart"], "unexpected argument 'quickstart'"),
        (["--epochs", "many"], "--epochs: invalid literal"),
        (["--epochs"], "Missing value for argument '--epochs'"),
        (["--batch-size", "0"], "--batch-size 0: input should be greater than 0"),
        (["--pca", "rgb"], "invalid choice 'rgb' for argument '--pca'"),
        (["--pca-std", "nan"], "--pca-std nan"),
        (["--momentum", "0.9"], "are for --optimizer sgd"),
        (["--preset", "cifar10"], "unknown flag --preset"),
        (["--flip=1"], "--flip takes no value, not '1'"),
        (["--epochs", "a\nb"], "--epochs a\\nb: contains a control character"),
        (["--num-devices", "none"], "could be instantiated from ['none']."),
        (["--pca", "x" + "-" * 300], "for argument '--pca'"),
        (["--tyro-print-completion", "x"], "--tyro-print-completion: Shell should be one"),
    ],
)
def test_bad_flags_get_one_line(args, message):
    with pytest.raises(UsageError) as error:
        cli.parse_train(args)
    assert message in str(error.value)
    assert not re.search(r"[\n│╭]", str(error.value))


def test_flags_change_the_preset():
    config = cli.parse_train(["cifar10-paper", "--learning-rate", "0.02", "--drop-epochs", "3", "4", "--no-flip"])
    assert config.preset == "cifar10-paper"
    assert config.optimizer.learning_rate == 0.02
    assert config.optimizer.drop_epochs == (3, 4)
    assert config.augmentation.flip is False
    assert config.augmentation.crop_padding == PRESETS["cifar10-paper"].config.augmentation.crop_padding


def test_without_arguments_it_is_the_original_posts_program():
    assert cli.parse_train([]) == PRESETS["cifar10"].config
    assert cli.parse_train([]).workdir == pathlib.Path("runs/cifar10")


def help_of(parse, capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(args)
    assert stop.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> set[str]:
    """The flags at the beginning of a help text's lines."""
    return set(re.findall(r"^  (--[\w-]+)", text, flags=re.MULTILINE))


def expected_flags(config_type, rare: bool) -> set[str]:
    hidden = {"run", "others", "preset"} | (set() if rare else flags.marked(config_type, Mark.RARE))
    return {flags.flag(field.name) for field in flags.fields(config_type) if field.name not in hidden}


@pytest.mark.parametrize(
    ("config_type", "parse", "args"),
    [(TrainConfig, cli.parse_train, []), (EvalConfig, cli.parse_eval, ["runs/x"])],
)
def test_help_lists_the_common_flags_and_help_all_every_flag(config_type, parse, args, capsys):
    common, every = (expected_flags(config_type, rare) for rare in (False, True))
    assert flags_in(help_of(parse, capsys, *args, "--help")) == flags_in(help_of(parse, capsys, "-h")) == common
    assert flags_in(help_of(parse, capsys, "--help-all")) == every
    assert 5 <= len(common) <= 25
    assert common < every


def test_rare_flags_work():
    config = cli.parse_train(["--stall-steps", "7", "--no-compilation-cache", "--distributed", "--peer-timeout=9"])
    assert (config.run.stall_steps, config.run.compilation_cache, config.run.peer_timeout) == (7, False, 9)


@pytest.mark.parametrize("preset", [[], *([name] for name in PRESETS)])
@pytest.mark.parametrize("columns", ["80", "100"])
def test_help_is_two_screens_of_presets_and_flags(preset, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    lines = help_of(cli.parse_train, capsys, *preset, "--help").splitlines()
    assert max(map(len, lines)) <= max(int(columns), 92)  # the description is not wrapped
    assert columns == "80" or len(lines) <= 60
    text = " ".join(" ".join(lines).split())
    for name, described in PRESETS.items():
        assert f" {name} {described.summary} {described.measured} " in text
    settings = PRESETS[preset[0] if preset else "cifar10"].config
    assert f"--learning-rate {settings.optimizer.learning_rate} Learning rate at the start. " in text
    flip = "on" if settings.augmentation.flip else "off"
    assert f"--flip, --no-flip Mirror images left to right at random. Default: {flip}. " in text
    assert f"--dropout-rate {settings.network.dropout_rate} Probability of dropping an output of a hidden" in text
    assert f"--optimizer {settings.optimizer.optimizer} Update rule: adam, sgd, muon" in text


def test_help_of_eval(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(cli.parse_eval, capsys, "--help")
    assert text.startswith("usage: eval.py RUN [OTHERS ...] [FLAGS]\n\nEvaluate a trained network:")
    assert len(text.splitlines()) <= 30
    assert "\n  --images PATH ... " in text
    assert "batch-size" not in text


def test_eval_flags():
    assert cli.parse_eval(["runs/x"]).run == pathlib.Path("runs/x")
    with pytest.raises(UsageError, match="--checkpoint newest: must be last, best or a step"):
        cli.parse_eval(["runs/x", "--checkpoint", "newest"])
    with pytest.raises(UsageError, match="PATH"):
        cli.parse_eval([])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "other", "--images", "a.png"], "--images is for one run, without"),
        (["run", "--images", "a.png", "--report"], "--images is for one run, without"),
        (["run", "--images", "a.png", "--split", "train"], "--images is for one run, without"),
        (["run", "--images"], "--images needs image files"),
        (["run", "other", "--report"], "--report is for one run"),
    ],
)
def test_eval_flags_that_contradict_each_other(args, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        cli.parse_eval(args)


@pytest.mark.parametrize(("error", "code"), [(UsageError("no such flag"), 2), (AlexNetError("disk is gone"), 1)])
def test_errors_become_exit_codes(error, code, capsys, monkeypatch):
    def main(args):
        raise error

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the tests keep their own handlers
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # there is one under `python -m pytest`
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"train.py: {error}\n"


def test_settings_of_others_do_not_change_numbers(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda number, handler: signal.SIG_DFL)
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("JAX_RANDOM_SEED_OFFSET", "7")
    monkeypatch.setenv("MPLBACKEND", "bogus")
    monkeypatch.setenv("MATPLOTLIBRC", "mine")
    cli.run(lambda args: None)
    assert {"JAX_ENABLE_X64", "JAX_RANDOM_SEED_OFFSET"}.isdisjoint(os.environ)
    assert os.environ["MATPLOTLIBRC"] == os.devnull
    assert "warning: JAX_ENABLE_X64 is ignored" in capsys.readouterr().err
    assert "MPLBACKEND" not in os.environ


def test_a_main_module_without_a_spec(monkeypatch):
    """IPython's, at the second %run."""
    monkeypatch.delattr(sys.modules["__main__"], "__spec__")
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    assert program_name() == "eval.py"


def run_script(*args: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["train.py", "--epoch", "1"], 2, "train.py: unknown flag --epoch; did you mean --epochs?"),
        pytest.param(["train.py", "--data-dir", "{tmp}/nothing"], 1, "nothing", marks=pytest.mark.stress),
        (["train.py", "quickstart", "--workdir", "{tmp}/file/run"], 1, "file/run"),
        pytest.param(
            ["train.py", "quickstart", "--workdir", "{tmp}/x", "--num-devices", "3"],
            2,
            "--batch-size",
            marks=pytest.mark.stress,
        ),
        pytest.param(["eval.py", "{tmp}/nothing"], 1, "there is no such folder", marks=pytest.mark.stress),
        (["eval.py", "{tmp}"], 1, "is not a run"),
    ],
)
def test_the_scripts_fail_in_one_line(tmp_path, args, code, message):
    (tmp_path / "file").write_text("not a folder")
    returncode, stderr = run_script(*(arg.format(tmp=tmp_path) for arg in args))
    assert returncode == code
    assert message in stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("environment", [{"TERM": "xterm"}, {"TERM": "xterm", "PYTHONIOENCODING": "ascii"}])
def test_messages_are_the_same_on_a_terminal(environment):
    import pty  # not on Windows

    terminal, its_end = pty.openpty()
    done = subprocess.run(
        [sys.executable, "train.py", "--epochs", "many"],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=its_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(its_end)
    os.close(terminal)
    assert done.returncode == 2
    assert done.stderr == "train.py: Error parsing --epochs: invalid literal for int() with base 10: 'many'\n"


def test_help_does_not_wait_for_jax():
    code = "import sys; from alexnet_jax.config import cli; assert 'jax' not in sys.modules, 'cli imports jax'"
    assert run_script("-c", code) == (0, "")


@pytest.mark.parametrize(
    ("started", "named"),
    [
        ("train.py", "python eval.py"),
        ("python -m alexnet_jax.train", "python -m alexnet_jax.eval"),
        ("ipykernel_launcher.py", "python eval.py"),
    ],
)
def test_other_commands_are_named_as_this_one_was_started(monkeypatch, started, named):
    monkeypatch.setattr(errors, "program_name", lambda: started)
    assert errors.command("eval") == named

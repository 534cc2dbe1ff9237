"""Studies: their commands, their arithmetic, runs on cores and side by side."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from alexnet_jax import data, plots
from alexnet_jax.config import cli
from alexnet_jax.config.flags import flat_items
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError
from alexnet_jax.inspection import task
from alexnet_jax.network import build
from tests.tiny_runs import TINY_NETWORKS

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]  # its modules import one another as a script's neighbours

import ablate  # noqa: E402
import ablation_report  # noqa: E402
import run as benchmark  # noqa: E402
from studies import STUDIES, Study, Variant  # noqa: E402

import eval as eval_script  # noqa: E402
import train  # noqa: E402


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_changes_a_setting_and_what_goes_with_it(name):
    study = STUDIES[name]
    configs = {v.name: cli.parse_train(ablate.arguments(study, v, seed=2)) for v in study.variants}
    assert len(set(configs.values())) == len(study.variants)
    assert all(config.schedule.seed == 2 for config in configs.values())
    assert len({v.name for v in study.variants}) == len(study.variants)
    base = flat_items(configs[study.variants[0].name])
    for variant in study.variants[1:]:
        changed = flat_items(configs[variant.name])
        number = sum(base[setting] != changed[setting] for setting in base)
        allowed = {"rates": (1, 2), "relu": (1, 2), "search": (1, 2, 3, 4), "longer": (1, 2), "best": (3, 5)}
        assert number in allowed.get(name, (1,)), variant.name


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("ablation-*.jsonl")), ids=lambda path: path.stem)
def test_the_document_shows_what_was_measured(path):
    name, epochs = re.fullmatch(r"ablation-([a-z]+)-(?:(\d+)-epochs-)?[a-z]+", path.stem).groups()
    ablation = ablate.Ablation(ablate.Options(name, out=path, epochs=int(epochs) if epochs else None))
    assert ablation.valid_rows() == ablation.rows
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert ablation_report.tables(STUDIES[name], ablation.rows) in document, (
        f"put the output of python benchmarks/ablate.py {name} --table --out {path} into docs/results.md"
    )


@pytest.mark.parametrize(
    "name", ["tips", "relu", "rates", "normalization", "time", "best", "options", "search", "longer", "post", "lrn"]
)
def test_the_printed_command_and_flags_give_the_recorded_settings(name):
    path = ROOT / "results" / f"ablation-{name}-cpu.jsonl"
    ablation = ablate.Ablation(ablate.Options(name, out=path))
    variants = ablation_report.present(STUDIES[name], ablation.rows)
    command = ablation_report.command(STUDIES[name], variants, ablation.rows).replace("\\\n", " ").split(" && ")[0]
    table = ablation_report.flags_table(variants) if len(variants) > 1 else f"| {variants[0].name} | none |"
    added = dict(re.findall(r"^\| (.+) \| (?:none|`(.+)`) \|$", table, re.MULTILINE))
    for variant in variants:
        settings = ablate.settings([*command.split()[2:], *added[variant.name].split()])
        recorded = next(row for row in ablation.rows if (row["variant"], row["seed"]) == (variant.name, 0))["settings"]
        assert ablate.REMOVED | settings == ablate.REMOVED | settings | recorded, variant.name


def test_the_row_with_stride_1_measures_its_preset():
    (variant,) = (v for v in STUDIES["best"].variants if "--conv1-stride" in v.flags)
    measured = ablate.settings(ablate.arguments(STUDIES["best"], variant, seed=0))
    assert measured | {"preset": "cifar10-best-stride1"} == ablate.settings(["cifar10-best-stride1"])


def made_up(variant: str, seed: int, accuracy: float, **more) -> dict:
    epoch = {"loss": 1.0, "accuracy": 0.5, "seconds": 10.0, "validation_accuracy": None}
    return {
        "variant": variant,
        "seed": seed,
        "command": f"python train.py x --seed {seed}",
        "settings": {"epochs": 3},
        "test": {"1": {"accuracy": accuracy, "loss": 1.0, "count": 1000}},
        "curve": [epoch],
        "data": {"source": "cifar10", "fingerprint": "0123"},
        "side_by_side": 1,
        "device": {"platform": "cpu", "name": "A processor", "count": 1, "cores": 2},
        "versions": {"python": "3.13.0", "jax": "0.12.0"},
        "date": "2026-01-02T03:04:05+00:00",
    } | more


STUDY = Study("Does it pay?", "cifar10", (), (Variant("all"), Variant("without"), Variant("never run")))


def test_intervals_are_students():
    # t of 0.975 with 2 degrees of freedom is 4.3027; the standard deviation of 1, 2, 3 is 1.
    mean, half, runs = ablation_report.estimate([1.0, 2.0, 3.0])
    assert (mean, runs) == (2.0, 3)
    assert half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert ablation_report.estimate([0.5]) == (0.5, None, 1)


def test_differences_are_paired_by_seed():
    """The seeds differ by tens of points, the pairs by one: only pairing shows it."""
    rows = [made_up("all", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    rows += [made_up("without", seed, 0.49 + 0.1 * seed + 0.001 * (seed == 1)) for seed in (2, 1, 0, 7)]
    difference = ablation_report.paired_difference(rows, STUDY.variants[1], STUDY.variants[0], 1)
    assert difference.runs == 3
    assert difference.mean == pytest.approx(-0.01 + 0.001 / 3)
    assert difference.excludes_zero()
    table = ablation_report.tables(STUDY, rows)
    assert "| all | 60.00% ± 24.84 |  | 3 |" in table
    assert "| −0.97 ± 0.14 | 4 |" in table
    assert "never run" not in table
    assert table.startswith(
        "Does it pay? (3 epochs) Measured on A processor, 2 cores; Python 3.13.0, JAX 0.12.0; cifar10 (0123), "
    )


def test_a_difference_inside_the_noise_is_called_so():
    rows = [made_up("all", 0, 0.5), made_up("all", 1, 0.6), made_up("without", 0, 0.52), made_up("without", 1, 0.59)]
    assert "+0.50 ± 19.06, inside the noise" in ablation_report.tables(STUDY, rows)
    assert "+2.00 (one pair)" in ablation_report.tables(STUDY, [rows[0], rows[2]])


def test_epochs_until_a_target():
    def curve(*accuracies):
        return [{"loss": 1.0, "accuracy": a, "seconds": 2.0, "validation_accuracy": None} for a in accuracies]

    row = made_up("all", 0, 0.5, curve=curve(0.5, 0.74, 0.76, 0.7))
    assert ablation_report.epochs_until(row, "accuracy", 0.75) == (3, 6.0)
    assert ablation_report.epochs_until(row, "accuracy", 0.77) is None
    assert ablation_report.epochs_until(row, "validation_accuracy", 0.1) is None
    study = dataclasses.replace(STUDY, until=("accuracy", (0.75,)), curves="accuracy")
    rows = [row, made_up("all", 1, 0.5, curve=curve(0.76)), made_up("all", 2, 0.5, curve=curve(0.1))]
    assert "| all | 75.00% | 2 of 3 | 2 (1 to 3) | 4 (2 to 6) |" in ablation_report.tables(study, rows)


def drawn(study, rows, tmp_path, monkeypatch):
    """The axes that would be saved."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    assert ablation_report.draw(study, rows, tmp_path / "a.png") == bool(figures)
    return figures[0].axes[0] if figures else None


def test_picture_of_differences(tmp_path, monkeypatch):
    rows = [made_up(name, seed, a + 0.01 * seed) for name, a in (("all", 0.5), ("without", 0.48)) for seed in range(2)]
    ax = drawn(STUDY, rows, tmp_path, monkeypatch)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["without"]
    marks = ax.lines[0].get_xdata()
    np.testing.assert_allclose(marks, [-2.0, -2.0])  # one for each seed
    assert "50.50%" in ax.get_xlabel()
    far = [*rows, *(made_up("never run", seed, 0.1) for seed in range(2))]
    ax = drawn(STUDY, far, tmp_path, monkeypatch)
    assert [text.get_text() for text in ax.texts] == [" −40.50 ± 6.35: off the scale"]
    assert ax.get_xlim()[0] > -5
    assert drawn(STUDY, rows[:2], tmp_path, monkeypatch) is None  # nothing to compare
    assert drawn(STUDY, rows[2:], tmp_path, monkeypatch) is None  # nothing to compare with
    assert "| without | 48.50% ± 6.35 | 2 |" in ablation_report.tables(STUDY, rows[2:])


@pytest.mark.parametrize(("key", "value"), [("accuracy", 0.5), ("validation_accuracy", 0.3)])
def test_picture_of_curves(key, value, tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, curves=key, until=("accuracy", (0.75,)))
    rows = [made_up("all", seed, 0.5) for seed in range(2)]
    for row in rows:
        row["curve"] = [row["curve"][0] | {"validation_accuracy": 0.3}] * 3
    ax = drawn(study, rows, tmp_path, monkeypatch)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1 - value] * 3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["all (2 seeds)"]
    assert len(ax.lines) == (3 if key == "accuracy" else 2)  # the target is training accuracy's


def test_an_epochs_means_weigh_intervals_by_their_images():
    records = [
        {"step": 2, "epoch": 0, "split": "train", "loss": 4.0, "accuracy": 0.0, "images_per_second": 10.0},
        {"step": 3, "epoch": 0, "split": "train", "loss": 1.0, "accuracy": 1.0, "images_per_second": 5.0},
        {"step": 3, "epoch": 0, "split": "validation", "loss": 0.5, "accuracy": 0.25, "count": 9},
        {"step": 6, "epoch": 1, "split": "train", "loss": 2.0, "accuracy": 0.5, "images_per_second": 25.0},
    ]
    curve = ablate.epoch_curve(records, examples=100, batch_size=40)  # 40, 40 and 20
    first, second = curve
    assert first == pytest.approx(
        {"loss": 0.8 * 4 + 0.2, "accuracy": 0.2, "seconds": 8 + 4, "validation_accuracy": 0.25}
    )
    assert second == pytest.approx({"loss": 2.0, "accuracy": 0.5, "seconds": 4.0, "validation_accuracy": None}, abs=0)


@pytest.fixture
def study(tiny, monkeypatch):
    """Seven steps of a tiny network on drawn shapes; the rows are one compiled program."""
    monkeypatch.setattr(build, "NETWORKS", TINY_NETWORKS)
    small = Study(
        "Does it run?",
        "quickstart",
        ("--epochs", "1", "--drop-epochs", "--batch-size", "16", "--num-devices", "1"),
        (Variant("as it is"), Variant("other lines", ("--log-every", "2"))),
    )
    monkeypatch.setattr(ablate, "STUDIES", {"tips": small})
    for module in (data, task):
        monkeypatch.setattr(module, "load", lambda config: tiny)
    # The real one starts a process; test_benchmarks.py has it.
    device = {"platform": "cpu", "name": "a processor", "count": 1, "cores": 2}
    monkeypatch.setattr(benchmark, "describe_device", lambda: device)
    return small


def test_runs_on_cores(study, tmp_path, capsys, monkeypatch):
    """Missing runs are done, finished ones are kept, an incomplete line is run again."""
    scripts = {"train.py": train.main, "eval.py": eval_script.main}
    monkeypatch.setattr(ablate.Scripts, "run", lambda self, script, *args: scripts[script](args))
    out = tmp_path / "out.jsonl"
    args = ["tips", "--seeds", "1", "--jobs", "1", "--out", str(out), "--runs", str(tmp_path / "runs")]
    ablate.main([*args, "--rows", "as it is"])
    (line,) = out.read_text().splitlines()
    row = json.loads(line)
    assert row["command"] == (
        "python train.py quickstart --epochs 1 --drop-epochs --batch-size 16 --num-devices 1 --seed 0"
    )
    assert row["test"]["1"]["count"] == 70
    assert row["curve"][0]["validation_accuracy"] is not None
    assert not list((tmp_path / "runs").glob("tips-*"))
    out.write_text(line + "\n" + line[:50])
    ablate.main(args)
    lines = out.read_text().splitlines()
    assert lines[0] == line
    assert [json.loads(line)["variant"] for line in lines] == ["as it is", "other lines"]
    assert out.with_suffix(".png").exists()
    monkeypatch.setattr(ablate.Scripts, "run", None)  # now nothing may be run
    ablate.main(args)
    assert "| other lines |" in capsys.readouterr().out
    ablate.main([*args, "--table"])
    assert "against as it is, seed by seed" in capsys.readouterr().out


def test_an_accelerator_trains_one_run_after_another(study, tmp_path, monkeypatch):
    done = []

    def script(name, *args):
        done.append(name)
        {"train.py": train.main, "eval.py": eval_script.main}[name](args)

    monkeypatch.setattr(ablate, "run_here", script)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args = ["tips", "--out", str(tmp_path / "out.jsonl"), "--runs", str(tmp_path / "runs"), "--rows", "as it is"]
    ablate.main([*args, "--seeds", "1"])
    assert done == ["train.py", "eval.py"]
    (row,) = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["side_by_side"] == 1


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["tips", "--rows", "nothing"], UsageError, "--rows 'nothing': the rows of tips are all techniques, tanh"),
        (["tips", "--table", "--out", "{tmp}/none.jsonl"], AlexNetError, "no finished run of this study"),
        (
            ["tips", "--table", "--out", "{tmp}/bad.jsonl"],
            AlexNetError,
            "bad.jsonl: line 1 is not a finished run: remove",
        ),
        (["time", "--epochs", "5"], UsageError, "--epochs 5: the rows of time have their own"),
        (["all"], UsageError, "all"),
    ],
)
def test_wrong_use_is_told(args, error, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(error) as raised:
        ablate.main([arg.format(tmp=tmp_path) for arg in args])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_run_that_fails_is_told_in_its_own_words(tmp_path):
    with pytest.raises(AlexNetError, match=r"^python train.py --data-dir \S+: train.py: .*nowhere"):
        ablate.Scripts().run("train.py", "--data-dir", str(tmp_path / "nowhere"))


def test_a_changed_preset_makes_its_rows_old(study, tmp_path):
    """A row counts if the study as it is now would produce it; settings added later don't matter."""
    out = tmp_path / "out.jsonl"
    args = ablate.arguments(study, study.variants[0], 0)
    rows = [made_up("as it is", 0, 0.5, settings=ablate.settings(args)) for _ in range(3)]
    rows[1]["settings"]["learning_rate"] *= 2
    del rows[2]["settings"]["label_smoothing"]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ablation = ablate.Ablation(ablate.Options("tips", seeds=2, out=out))
    assert ablation.valid_rows() == [rows[0], rows[2]]
    assert [(variant.name, seed) for variant, seed in ablation.missing()] == [
        ("other lines", 0), ("as it is", 1), ("other lines", 1),
    ]  # fmt: skip


def test_a_signal_ends_what_is_under_way(study, tmp_path, monkeypatch):
    """A run is finished and kept; a signal arrives while it is reported, and the run beside it is ended."""
    script = tmp_path / "sleeper.py"
    script.write_text("import time\ntime.sleep(60)\n")
    complaints, begun = [], threading.Event()

    def by_scripts(self, scripts, variant, seed):
        if variant.name == "as it is":
            begun.wait()
            return {key: made_up("", 0, 0.5)[key] for key in ("test", "curve", "data")}, None
        threading.Timer(1.0, begun.set).start()
        try:
            scripts(str(script))
        except AlexNetError as error:
            complaints.append(str(error))
            raise

    monkeypatch.setattr(ablate.Ablation, "by_scripts", by_scripts)
    monkeypatch.setattr(ablate.tqdm.tqdm, "write", lambda bar, line: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    out, before, begin = tmp_path / "out.jsonl", signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(StoppedError, match="finished runs are kept"):
        ablate.main(["tips", "--seeds", "1", "--out", str(out), "--runs", str(tmp_path / "runs")])
    assert time.monotonic() - begin < 30
    assert complaints == [f"python {script}: no reason"]
    assert len(out.read_text().splitlines()) == 1
    assert signal.getsignal(signal.SIGTERM) is before

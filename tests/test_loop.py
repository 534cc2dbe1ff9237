import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alexnet_jax
from alexnet_jax import data, train
from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.data.dataset import ArrayDataset, Split
from alexnet_jax.distributed.devices import select_devices
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError
from alexnet_jax.network import build
from alexnet_jax.runs import folder as run_module
from alexnet_jax.runs.checkpoint import Checkpoints
from alexnet_jax.runs.folder import RunFolder
from alexnet_jax.runs.log import read_jsonl
from alexnet_jax.training import loop, optimizer, predict
from alexnet_jax.training import trainer as trainer_module
from alexnet_jax.training.state import create_state
from alexnet_jax.training.trainer import Trainer
from tests.tiny_runs import (
    TINY_NETWORKS,
    TinyNetwork,
    assert_same_run,
    comparable,
    make_config,
    train_until,
    with_pictures,
)


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    """The loop's guarantees do not depend on the network."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(build, "NETWORKS", TINY_NETWORKS)
        yield


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Three epochs without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with with_pictures():
        loop.train_and_evaluate(make_config(workdir), tiny)
    return workdir


def test_the_run_describes_itself(finished, tiny):
    assert {p.name for p in finished.iterdir()} == {
        "checkpoints", "config.json", "dataset.json", "metrics.jsonl", "plots", "saved", "statistics.npz",
        "train.lock",
    }  # fmt: skip
    assert {p.name for p in (finished / "plots").iterdir()} == {"portraits.png", "pca_noise.png", "curves.png"}
    settings = json.loads((finished / "config.json").read_text())
    assert settings["batch_size"] == 16
    assert settings["preset"] == "cifar10-paper"
    assert settings["versions"]["jax"] == jax.__version__
    run = alexnet_jax.open_run(finished)
    assert run.step == 21
    assert run.class_names == tiny.class_names
    assert run.params["conv1"]["kernel"].shape == (5, 5, 3, 8)
    np.testing.assert_allclose(run.statistics.mean_image, tiny["train"].images.mean(axis=0), rtol=1e-6)


@pytest.mark.both_lines
def test_metrics_lines(finished, tiny):
    records = read_jsonl(finished / "metrics.jsonl")
    train = [r for r in records if r["split"] == "train"]
    validation = [r for r in records if r["split"] == "validation"]
    assert [r["step"] for r in train] == [3, 6, 7, 10, 13, 14, 17, 20, 21]
    assert [(r["step"], r["epoch"], r["count"]) for r in validation] == [(7, 0, 30), (14, 1, 30), (21, 2, 30)]
    np.testing.assert_allclose([r["learning_rate"] for r in train], [1e-3] * 3 + [1e-4] * 6)
    assert all(r["images_per_second"] > 0 and 0 <= r["accuracy"] <= 1 for r in train)
    run = alexnet_jax.open_run(finished)
    split = tiny["validation"]
    probabilities = run.predict(split.images)
    expected = -np.log(probabilities[range(30), split.labels].astype(np.float64)).mean()
    np.testing.assert_allclose(validation[-1]["loss"], expected, rtol=1e-4)
    assert validation[-1]["accuracy"] == np.mean(run.predict_class(split.images) == split.labels)


@pytest.mark.both_lines
def test_many_steps_in_a_call_change_nothing_that_is_logged(finished, tiny, tmp_path):
    """Lines of the log are due at steps 3, 6, 7, ..; a call never goes beyond the next."""
    steps = [call.step for call in loop.training(make_config(tmp_path, steps_per_call=2), tiny)]
    calls = np.diff(steps, prepend=0).tolist()
    # Step 7 ends the epoch; then the log is due at 9.
    assert calls[:5] == [2, 1, 2, 1, 1]
    assert sum(calls) == 21
    assert len(comparable(tmp_path)) == len(comparable(finished))
    for got, wanted in zip(comparable(tmp_path), comparable(finished), strict=True):
        for key, value in wanted.items():
            assert got[key] == pytest.approx(value, rel=1e-3) if isinstance(value, float) else got[key] == value


@pytest.mark.both_lines
def test_more_epochs_go_on_bit_for_bit(finished, tiny, tmp_path):
    for epochs in (1, 3):
        loop.train_and_evaluate(make_config(tmp_path / "run", epochs), tiny)
    assert_same_run(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Two epochs without interruption, validated every two steps: the best is saved between lines of the log."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    loop.train_and_evaluate(make_config(workdir, 2, eval_every=2), tiny)
    return workdir


@pytest.mark.both_lines
@pytest.mark.parametrize(
    "stop", [stop if stop in (7, 10) else pytest.param(stop, marks=pytest.mark.stress) for stop in range(1, 15)]
)
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(whole, tiny, tmp_path, stop):
    number = signal.SIGHUP if stop % 2 else signal.SIGINT
    config = make_config(tmp_path / "broken", 2, eval_every=2)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(StoppedError, match=f"{number.name}: saved step {stop};") as stopped:
        train_until(config, tiny, stop, number)
    assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    loop.train_and_evaluate(config, tiny)
    assert_same_run(whole, tmp_path / "broken")


@pytest.mark.stress
def test_a_run_of_several_steps_in_a_call_goes_on_bit_for_bit(tiny, tmp_path):
    config = make_config(tmp_path / "whole", 2, steps_per_call=2)
    loop.train_and_evaluate(config, tiny)
    config = make_config(tmp_path / "broken", 2, steps_per_call=2)
    with pytest.raises(StoppedError):
        train_until(config, tiny, 9, signal.SIGTERM)
    loop.train_and_evaluate(config, tiny)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_plateau_lowers_the_rate_also_across_a_stop(tiny, tmp_path):
    """At a rate of 1e-9 validation never changes: the first epoch is the best, each later one lowers the rate."""

    def configure(name):
        config = make_config(tmp_path / name, 3)
        sgd = dataclasses.replace(config.optimizer, learning_rate=1e-9, drop_epochs=(), plateau_patience=1)
        return dataclasses.replace(config, optimizer=sgd)

    loop.train_and_evaluate(configure("whole"), tiny)
    rates = {
        r["epoch"]: r["learning_rate"]
        for r in read_jsonl(tmp_path / "whole" / "metrics.jsonl")
        if r["split"] == "train"
    }
    assert rates == pytest.approx({0: 1e-9, 1: 1e-9, 2: 1e-10})
    with pytest.raises(StoppedError):
        train_until(configure("broken"), tiny, 17, signal.SIGTERM)
    loop.train_and_evaluate(configure("broken"), tiny)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    tree, memory = Checkpoints(tmp_path / "whole" / "checkpoints", read_only=True).restore_newest()
    assert memory["plateau"]["scale"] == pytest.approx(0.01)  # after the third epoch
    scales = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree["opt_state"]) if "plateau_scale" in str(path)
    ]
    assert scales == [pytest.approx(0.01)]


@pytest.mark.both_lines
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(whole, tiny, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "checkpoints" / "14" / "memory.json").write_text("{}")
    loop.train_and_evaluate(make_config(run, 2, eval_every=2), tiny)
    assert "step 14 moved to" in capsys.readouterr().err
    assert (run / "checkpoints" / "set-aside" / "14").is_dir()
    assert_same_run(whole, run)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(whole, tiny, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    for step in (run / "checkpoints").iterdir():
        (step / "manifest.json").unlink()
    with pytest.raises(AlexNetError, match="no checkpoint is intact"):
        alexnet_jax.open_run(run)
    for _ in range(2):
        with pytest.raises(AlexNetError, match=r"no checkpoint is intact .* train from scratch in another --workdir"):
            loop.train_and_evaluate(make_config(run, 2, eval_every=2), tiny)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_lost_a_part_does_not_begin_anew_over_the_rest(whole, tiny, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    config = make_config(run, 2, eval_every=2)
    before = (run / "metrics.jsonl").read_bytes()
    (run / "statistics.npz").unlink()
    loop.train_and_evaluate(config, tiny)
    alexnet_jax.open_run(run)  # with the statistics written again
    (run / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(AlexNetError, match=r"config\.json is missing, but a checkpoint was saved: copy it back"):
        loop.train_and_evaluate(config, tiny)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(AlexNetError, match=r"config\.json is missing, but a checkpoint was saved: copy it back"):
        loop.train_and_evaluate(config, tiny)
    (tmp_path / "config.json").rename(run / "config.json")
    with pytest.raises(AlexNetError, match="the run's checkpoints are missing: copy one back"):
        loop.train_and_evaluate(config, tiny)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_could_not_be_read_back_is_refused_before_the_first_step(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    renamed = dataclasses.replace(tiny, class_names=("tench\tfish", *tiny.class_names[1:]))
    with pytest.raises(AlexNetError, match=r"shapes.* can't be used .*class_names 0.*without control characters"):
        loop.train_and_evaluate(make_config(run, 1), renamed)
    with pytest.raises(UsageError, match="the absolute path must be UTF-8 without control characters"):
        loop.train_and_evaluate(make_config(tmp_path / os.fsdecode(b"caf\xe9"), 1), tiny)
    (tmp_path / "li\nne").mkdir()
    monkeypatch.chdir(tmp_path / "li\nne")
    config = make_config(run, 1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=pathlib.Path("pictures")))
    with pytest.raises(UsageError, match=r"--data-dir .*: must be a path without control characters"):
        loop.train_and_evaluate(config, tiny)
    assert not (run / "config.json").exists()
    assert not (run / "metrics.jsonl").exists()


def test_a_run_below_a_folder_with_wildcards(whole, tiny, tmp_path):
    config = make_config(tmp_path / "lr[0.1]" / "*", 2, eval_every=2)
    loop.train_and_evaluate(config, tiny)
    assert_same_run(whole, config.workdir)


@pytest.mark.both_lines
def test_a_run_resumed_with_other_versions_keeps_both_and_warns(finished, tiny, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    now = run_module.versions()
    monkeypatch.setattr(run_module, "versions", lambda: now | {"jax": "99.0"})
    for _ in range(2):
        loop.train_and_evaluate(make_config(run), tiny)
    settings = json.loads((run / "config.json").read_text())
    assert settings["versions"]["jax"] == "99.0"
    assert settings["earlier_versions"] == [now]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert f"different versions (jax {jax.__version__} -> 99.0)" in warnings[0]
    alexnet_jax.open_run(run)


def test_the_place_of_the_data_is_remembered_as_an_absolute_path(tiny, tmp_path, monkeypatch):
    """So the run can be evaluated from another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "here").mkdir(parents=True)
    for name, given, expected in [
        ("given", pathlib.Path("data"), tmp_path / "data"),
        ("found", None, tmp_path / "data" / "here"),
        ("drawn", None, None),
        ("cached", None, None),  # found from everywhere, and downloaded again if it is gone
    ]:
        config = make_config(tmp_path / name)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=given))
        folder = RunFolder(config.workdir)
        source = {"found": tmp_path / "data" / "here", "cached": tmp_path}.get(name, tiny.source)
        info = run_module.describe(dataclasses.replace(tiny, source=str(source)))
        folder.prepare(config, info, tiny.statistics())
        assert folder.read_config().data.data_dir == expected


@pytest.mark.both_lines
def test_a_run_can_be_pickled_before_and_after_predict(finished, tiny):
    run, images = alexnet_jax.open_run(finished), tiny["test"].images[:2]
    assert repr(run) == f"Run({str(finished)!r}, step 21, small, 10 classes)"
    expected = pickle.loads(pickle.dumps(run)).predict(images)
    np.testing.assert_array_equal(run.predict(images), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(run)).predict(images), expected)


def test_one_process_at_a_time_trains_in_a_folder(tiny, tmp_path):
    config = make_config(tmp_path / "run", 1)
    message = f"process {os.getpid()} is training there"
    with contextlib.closing(loop.training(config, tiny)) as first:
        next(first)
        with pytest.raises(AlexNetError, match=message):
            loop.train_and_evaluate(config, tiny)
    loop.train_and_evaluate(config, tiny)


def test_a_first_start_that_was_killed_blocks_nothing(tiny, tmp_path):
    (tmp_path / "train.lock").write_text("4194304\n")
    (tmp_path / "dataset.json.tmp").write_text("{")
    loop.train_and_evaluate(make_config(tmp_path, 1), tiny)


@pytest.mark.both_lines
@pytest.mark.parametrize("steps_per_call", [1, pytest.param(3, marks=pytest.mark.stress)])
def test_an_update_that_is_not_finite_is_not_taken(tiny, tmp_path, monkeypatch, steps_per_call):
    """One image of the second epoch's third batch is Inf: nine updates are taken, not one more."""
    from alexnet_jax.augment.preprocess import Preprocessing

    config = make_config(tmp_path, 2, steps_per_call=steps_per_call)
    training = Preprocessing.training
    poison = 9

    def poisoned(self, keys, images, step):
        return training(self, keys, images, step) + jnp.where(step == poison, jnp.inf, 0.0)

    monkeypatch.setattr(Preprocessing, "training", poisoned)
    with pytest.raises(AlexNetError) as error:
        loop.train_and_evaluate(config, tiny)
    assert "the loss is nan at step 10 (epoch 2, batch 3 of 7)" in str(error.value)
    assert "existing checkpoints: [7]" in str(error.value)
    trainer = Trainer(config, tiny, select_devices(2))
    for _ in loop.take_steps(trainer):
        pass
    state = jax.device_get(trainer.gather())
    assert int(state.step) == 9
    assert not state.finite
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    monkeypatch.undo()
    config = make_config(tmp_path, 3, steps_per_call=steps_per_call)
    loop.train_and_evaluate(config, tiny)  # resumes from step 7
    assert alexnet_jax.open_run(tmp_path).step == 21


@pytest.mark.both_lines
def test_a_gradient_that_is_not_finite_is_named(tiny, tmp_path, monkeypatch):
    config = make_config(tmp_path, 1)
    monkeypatch.setattr(optimizer, "from_config", lambda *args: (optax.sgd(1e38), lambda step: jnp.float32(1e38)))
    with pytest.raises(AlexNetError, match=r"the (loss is|gradient contains)"):
        loop.train_and_evaluate(config, tiny)


def test_a_weight_that_is_not_finite_is_not_saved(tiny, tmp_path, monkeypatch):
    """It becomes Inf in the epoch's last step; the gradient of a dense layer's kernel is not examined."""

    def overflow(path, update, count):
        names = [key.key for key in path]
        return jnp.where((count == 6) & (names == ["logits", "kernel"]), jnp.inf, jnp.zeros_like(update))

    def update(updates, count, params):
        tree = jax.tree_util.tree_map_with_path(lambda path, u: overflow(path, u, count), updates)
        return tree, count + 1

    rule = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    monkeypatch.setattr(optimizer, "from_config", lambda *args: (optax.chain(rule), lambda step: jnp.float32(1)))
    with pytest.raises(AlexNetError, match="logits/kernel contains Inf or NaN after step 7, which is not saved"):
        loop.train_and_evaluate(make_config(tmp_path, 1), tiny)
    assert not any((tmp_path / "checkpoints").glob("7*"))


def test_a_loss_that_stays_that_of_guessing_gets_one_warning(tiny, tmp_path, monkeypatch, capsys):
    base = make_config(tmp_path / "stalls", 3, stall_steps=5)
    config = dataclasses.replace(
        base,
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-12),
        network=dataclasses.replace(base.network, dropout_rate=0.0),
    )

    def small_logits(*args):
        state = create_state(*args)
        small = jax.tree.map(lambda x: x * 1e-4, state.params["logits"])
        return state.replace(params=state.params | {"logits": small})

    monkeypatch.setattr(trainer_module, "create_state", small_logits)
    loop.train_and_evaluate(config, tiny)
    err = capsys.readouterr().err
    assert err.count("warning:") == 1
    assert "the loss is 2.303, no better than guessing: the weights hardly move" in err
    assert "conv1" in err


@pytest.mark.stress  # the short form is in test_steps.py
def test_deterministic_runs_leave_the_same_bits(tiny, tmp_path):
    """One on a single device, the other stopped on 8 and resumed on 2."""
    one, many, two = (
        make_config(tmp_path / name, 3, deterministic=True, num_devices=count)
        for name, count in (("one", 1), ("many", 8), ("many", 2))
    )
    loop.train_and_evaluate(one, tiny)
    with pytest.raises(StoppedError):
        train_until(many, tiny, 11, signal.SIGTERM)
    loop.train_and_evaluate(two, tiny)
    states = [Checkpoints(config.workdir / "checkpoints").restore_tree(21)[0] for config in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_deterministic_needs_what_can_be_divided_by_8(tiny, tmp_path):
    config = make_config(tmp_path / "run", deterministic=True)
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, batch_size=12))
    with pytest.raises(UsageError, match="--deterministic: --batch-size 12 can't be divided by 8"):
        loop.train_and_evaluate(config, tiny)


def test_a_finished_run_is_left_as_it_is(finished, tiny, capsys):
    before = comparable(finished)
    loop.train_and_evaluate(make_config(finished), tiny)
    assert comparable(finished) == before
    assert "resumes after step 21" in capsys.readouterr().out


@pytest.mark.both_lines
def test_other_settings_are_refused_by_name(finished, tiny):
    config = make_config(finished)
    changed = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, seed=5))
    with pytest.raises(UsageError, match="--seed 0, not 5"):
        loop.train_and_evaluate(changed, tiny)
    fewer = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, epochs=1))
    with pytest.raises(UsageError, match="--epochs 3, which may only be increased"):
        loop.train_and_evaluate(fewer, tiny)


def test_a_run_of_other_data_is_refused_before_the_data_are_loaded(finished, monkeypatch):
    monkeypatch.setattr(data, "load", lambda config: pytest.fail("the data were loaded"))
    with pytest.raises(UsageError, match="contains a run with --dataset shapes, not cifar10"):
        train.main(["--workdir", str(finished)])


def test_epochs_of_a_cosine_schedule(tiny, tmp_path):
    config = PRESETS["cifar10-best"].config
    folder, info = RunFolder(tmp_path), run_module.describe(tiny)
    folder.prepare(config, info, tiny.statistics())
    more = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, epochs=48))
    with pytest.raises(
        UsageError, match="a run with --epochs 24, not 48, on which its cosine schedule depends: resume"
    ):
        folder.check_settings(more)


def test_other_data_is_refused(finished, tiny):
    split = tiny["test"]
    other = dataclasses.replace(tiny, splits={**tiny.splits, "test": Split(255 - split.images, split.labels)})
    with pytest.raises(AlexNetError, match="was not trained on the images"):
        loop.train_and_evaluate(make_config(finished), other)


def test_a_folder_with_something_else_is_refused(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="is not empty and contains no run"):
        loop.train_and_evaluate(make_config(tmp_path), tiny)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_workdir(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AlexNetError, match="can't"):
        loop.train_and_evaluate(make_config(tmp_path / "file" / "run"), tiny)


def test_a_batch_that_the_devices_do_not_divide(tiny, tmp_path):
    with pytest.raises(UsageError, match="--batch-size 16 can't be divided among 3 devices"):
        loop.train_and_evaluate(make_config(tmp_path / "run", num_devices=3), tiny)
    assert not (tmp_path / "run").exists()


@pytest.mark.stress
def test_divergence_stops_the_run_and_keeps_the_checkpoints(tiny, tmp_path):
    workdir = tmp_path / "run"
    loop.train_and_evaluate(make_config(workdir, 1), tiny)
    config = make_config(tmp_path / "diverges", 3)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e6))
    with pytest.raises(AlexNetError, match=r"the loss is (nan|inf) at step .*lower --learning-rate"):
        loop.train_and_evaluate(config, tiny)


def test_training_without_validation(tiny, tmp_path):
    loop.train_and_evaluate(make_config(tmp_path / "run", 1), tiny.train_on_all())
    assert {r["split"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")} == {"train"}
    with pytest.raises(AlexNetError, match="not validated"):
        alexnet_jax.open_run(tmp_path / "run", "best")


def test_a_run_without_validation_that_lost_its_checkpoints_does_not_begin_anew(tiny, tmp_path):
    """Also if its only checkpoint was saved at the end, by a program that was killed before it could note that."""
    config, dataset = make_config(tmp_path / "run", 1), tiny.train_on_all()
    loop.train_and_evaluate(config, dataset)
    (tmp_path / "run" / "saved").unlink()
    loop.train_and_evaluate(config, dataset)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(AlexNetError, match="the run's checkpoints are missing: copy one back"):
        loop.train_and_evaluate(config, dataset)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.both_lines
def test_the_best_checkpoint_is_kept(tiny, tmp_path):
    loop.train_and_evaluate(make_config(tmp_path / "run", 3), tiny)
    validation = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "validation"]
    best = max(validation, key=lambda r: (r["accuracy"], -r["step"]))
    run = alexnet_jax.open_run(tmp_path / "run", "best")
    assert run.step == best["step"]
    assert np.mean(run.predict_class(tiny["validation"].images) == tiny["validation"].labels) == best["accuracy"]


@pytest.mark.both_lines
def test_predict_takes_grey_levels_and_floats(finished, tiny):
    run, images = alexnet_jax.open_run(finished), tiny["test"].images[:5]
    probabilities = run.predict(images)
    assert probabilities.shape == (5, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(run.predict(images / 255.0), probabilities, atol=1e-5)
    np.testing.assert_array_equal(run.predict_class(images), probabilities.argmax(axis=1))


@pytest.mark.both_lines
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_predict_takes_floats_of_any_width(finished, dtype, monkeypatch):
    """NumPy's and JAX's; what reaches the network are grey levels."""
    run = alexnet_jax.open_run(finished)
    monkeypatch.setattr(predict, "make_predict_step", lambda *_: lambda _, part: part.mean((2, 3)))
    images = np.full((3, 32, 32, 3), [0.25, 0.5, 1])
    for array in (images.astype(dtype), jnp.asarray(images.astype(dtype))):
        np.testing.assert_allclose(run.logits(array), [[63.75, 127.5, 255]] * 3, rtol=1e-6)


def test_predict_computes_what_is_asked(finished, tiny, monkeypatch):
    """In few sizes: each costs a compilation."""
    run, images = alexnet_jax.open_run(finished), tiny["test"].images
    together = run.logits(images)
    for count in (1, 2, 3):
        np.testing.assert_allclose(run.logits(images[:count]), together[:count], rtol=1e-4, atol=1e-5)
    sizes = []

    def compute(_, part):
        sizes.append(part.shape[:2])
        return part.sum((2, 3), dtype=np.int64)

    monkeypatch.setattr(predict, "make_predict_step", lambda *_: compute)
    run = alexnet_jax.open_run(finished)
    many = np.random.default_rng(0).integers(0, 256, (1201, 32, 32, 3), np.uint8)
    for count in (1, 5, 64, 300, 500, 501, 1201):
        np.testing.assert_array_equal(run.logits(many[:count]), many[:count].sum((1, 2), dtype=np.int64))
    found = [size for _, size in sizes]
    assert found == [1, 8, 64, 500, 500, 500, 1, 500, 500, 256]
    assert {devices for devices, _ in sizes} == {1}


@pytest.mark.parametrize("checkpoint", ["junk", -1, True, False, "", "-1", 1.0, None, "Best", "8 ", "９", 10**19])
def test_open_run_names_what_a_checkpoint_is(finished, checkpoint):
    with pytest.raises(UsageError, match=r'checkpoint .*: must be "last", "best" or a step \(0 or more\)'):
        alexnet_jax.open_run(finished, checkpoint)


@pytest.mark.parametrize("path", ["", None, 3, b""])
def test_open_run_needs_a_path(path):
    with pytest.raises(UsageError, match="must be the path of a run's folder"):
        alexnet_jax.open_run(path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 32, 32, 3), bool), "uint8 .* or float"),
        (np.zeros((1, 32, 32, 3), complex), "uint8 .* or float"),
        (np.full((1, 32, 32, 3), 1e300), r"must be in \[0, 1\]"),
        (jnp.full((1, 32, 32, 3), 200, "bfloat16"), r"must be in \[0, 1\], .*grey levels 0..255 must be uint8"),
        (np.zeros((2, 28, 28, 3), np.uint8), r"images must be \[N, 32, 32, 3\]"),
        (np.zeros((0, 32, 32, 3), np.uint8), "N > 0"),
        (np.zeros((1, 32, 32, 3), np.int64), "uint8 .* or float"),
        (np.full((1, 32, 32, 3), 255.0), r"must be in \[0, 1\]"),
        (np.full((1, 32, 32, 3), np.nan), r"must be in \[0, 1\]"),
    ],
)
def test_predict_refuses_what_it_cannot_mean(finished, images, message):
    with pytest.raises(ValueError, match=message):
        alexnet_jax.open_run(finished).predict(images)


def test_open_run_names_what_is_wrong(finished, tmp_path):
    with pytest.raises(AlexNetError, match="no such folder"):
        alexnet_jax.open_run(tmp_path / "nothing")
    with pytest.raises(AlexNetError, match=r"is not a run: it has no config\.json"):
        alexnet_jax.open_run(tmp_path)
    with pytest.raises(AlexNetError, match=r"8: there is no such checkpoint; the steps are \[7, 21\]"):
        alexnet_jax.open_run(finished, 8)
    for name in ("config.json", "dataset.json", "statistics.npz"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(AlexNetError, match="has no checkpoint yet"):
        alexnet_jax.open_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(AlexNetError, match="has no checkpoint yet"):
        alexnet_jax.open_run(tmp_path)
    for name, text in (("statistics.npz", "junk"), ("dataset.json", "[]"), ("config.json", '{"epochs": ')):
        (tmp_path / name).write_text(text)
        with pytest.raises(AlexNetError, match=name) as error:
            alexnet_jax.open_run(tmp_path)
        assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_network_is_refused(finished, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "from_config", lambda config, num_classes: TinyNetwork(num_classes + 1))
    with pytest.raises(AlexNetError, match=r"logits.*\[10\], but the network needs .*\[11\]"):
        loop.train_and_evaluate(make_config(finished), tiny)


def test_merging_keeps_every_image(tiny: ArrayDataset):
    merged = tiny.train_on_all()
    assert set(merged.splits) == {"train", "test"}
    np.testing.assert_array_equal(merged["train"].images[:100], tiny["train"].images)
    np.testing.assert_array_equal(merged["train"].labels[100:], tiny["validation"].labels)
    assert merged.fingerprint() != tiny.fingerprint()


@pytest.mark.both_lines
def test_load_is_the_one_face():
    config = dataclasses.replace(PRESETS["quickstart"].config.data, train_on="all")
    dataset = data.load(config)
    assert dataset.name == "shapes"
    assert "validation" not in dataset.splits

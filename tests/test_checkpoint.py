"""Checkpoints that are damaged, foreign, half-written or can't be written."""

import json
import os
import pathlib
import resource
import shutil
import signal

import corruption
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corruption import files, make_state

from alexnet_jax.checkpoint import MANIFEST, Checkpoints, DamagedError, verify
from alexnet_jax.errors import AlexNetError


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    corruption.save_two(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restored_step(folder: pathlib.Path) -> int | None:
    """The step that a run would go on from; whatever is restored must be what was saved under that step."""
    checkpoints = Checkpoints(folder)
    newest = checkpoints.restore_newest()
    if newest is None:
        return None
    state = checkpoints.to_state(newest[0], make_state(0))
    jax.tree.map(np.testing.assert_array_equal, state, make_state(int(state.step)))
    assert newest[1] == {"step": int(state.step)}
    return int(state.step)


def test_what_is_saved_comes_back(folder):
    assert restored_step(folder) == 2
    assert not (folder / "set-aside").exists()


def test_every_file_is_in_the_manifest(folder):
    listed = json.loads((folder / "2" / MANIFEST).read_text())["files"]
    assert {path.relative_to(folder / "2").as_posix() for path in files(folder / "2")} == {*listed, MANIFEST}
    assert len(listed) > 5


def test_every_flipped_byte_is_found(folder):
    flipped, missed = corruption.flip(folder / "2", 2, lambda place: [place % 8])
    assert missed == []
    assert flipped > 2000
    verify(folder / "2", 2)


def test_every_damaged_file_is_found(folder):
    damaged, missed = corruption.damage_each_file(folder / "2", 2, folder / "1")
    assert missed == []
    assert damaged > 40
    verify(folder / "2", 2)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_restored(folder, capsys):
    name = next(path for path in files(folder / "2") if path.stat().st_size > 100)
    corruption.zero(name, name)
    assert restored_step(folder) == 1
    warning = capsys.readouterr().err
    assert len(warning.splitlines()) == 1
    assert "checkpoint of step 2 set aside as" in warning
    assert name.name in warning
    assert files(folder / "set-aside" / "2")
    # The step can be saved again, and damaged again.
    checkpoints = Checkpoints(folder)
    checkpoints.save(make_state(2), {"step": 2}, accuracy=None)
    assert restored_step(folder) == 2
    (folder / "2" / MANIFEST).unlink()
    assert restored_step(folder) == 1
    assert sorted(p.name for p in (folder / "set-aside").iterdir()) == ["2", "2-2"]


def test_a_reader_passes_over_what_is_damaged_and_moves_nothing(folder, capsys):
    (folder / "2" / MANIFEST).unlink()
    newest = Checkpoints(folder, read_only=True).restore_newest()
    assert newest is not None
    assert int(newest[0]["step"]) == 1
    assert "passed over" in capsys.readouterr().err
    assert (folder / "2").exists()


def test_nothing_intact(folder):
    for step in ("1", "2"):
        (folder / step / MANIFEST).unlink()
    assert restored_step(folder) is None


def test_a_checkpoint_under_another_step_is_found(folder):
    (folder / "2").rename(folder / "3")
    with pytest.raises(DamagedError, match="was saved as step 2"):
        verify(folder / "3", 3)
    assert restored_step(folder) == 1


def test_foreign_things_harm_nothing(folder):
    (folder / "99").mkdir()
    (folder / "notes").mkdir()
    (folder / "007").mkdir()
    (folder / "12").write_text("a file")
    (folder / "2" / ".nfs000").write_text("left by a file system")
    assert restored_step(folder) == 2
    assert Checkpoints(folder).all_steps() == [1, 2]
    assert {"notes", "007", "12"} <= {p.name for p in folder.iterdir()}
    (folder / "2" / "extra").write_text("")
    assert restored_step(folder) == 1


def test_what_a_killed_save_left_is_cleared_away(folder):
    shutil.copytree(folder / "2", folder / ".saving")
    shutil.copytree(folder / "1", folder / ".removing")
    assert restored_step(folder) == 2
    Checkpoints(folder).save(make_state(3), {"step": 3}, accuracy=None)
    assert restored_step(folder) == 3
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step, accuracy in enumerate([0.1, 0.5, 0.5, None, 0.2, 0.3]):
        checkpoints.save(make_state(step), {"step": step}, accuracy)
    assert checkpoints.all_steps() == [1, 4, 5]
    assert checkpoints.best_step() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace(params={"dense": {"kernel": jnp.zeros((2, 4))}}), r"float32\[2, 3\], the network needs"),
        (lambda s: s.replace(params={"dense": {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}}), "needs bfloat16"),
        (lambda s: s.replace(opt_state={}), "another network or optimizer"),
    ],
)
def test_nothing_is_cast(folder, change, message):
    checkpoints = Checkpoints(folder)
    tree, _ = checkpoints.restore_tree(2)
    with pytest.raises(AlexNetError, match=message):
        checkpoints.to_state(tree, change(make_state(0)))


def test_a_disk_that_takes_no_more(folder):
    """A limit on the size of files stands for a full disk: writing fails in the middle of a file."""
    checkpoints, before = Checkpoints(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, before[1]))
        with pytest.raises(AlexNetError, match="3: can't be written") as error:
            checkpoints.save(make_state(3), {"step": 3}, accuracy=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    checkpoints.save(make_state(3), {"step": 3}, accuracy=None)
    assert restored_step(folder) == 3


def test_a_folder_that_is_gone(folder):
    checkpoints = Checkpoints(folder)
    shutil.rmtree(folder)
    with pytest.raises(AlexNetError, match="can't be written"):
        checkpoints.save(make_state(3), {"step": 3}, accuracy=None)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(folder):
    checkpoints = Checkpoints(folder)
    folder.chmod(0o500)
    try:
        with pytest.raises(AlexNetError, match="can't be written"):
            checkpoints.save(make_state(3), {"step": 3}, accuracy=None)
    finally:
        folder.chmod(0o700)
    assert restored_step(folder) == 2

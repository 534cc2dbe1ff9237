"""Checkpoints that are damaged, foreign, half-written or can't be written."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from alexnet_jax.errors import AlexNetError
from alexnet_jax.runs import checkpoint
from alexnet_jax.runs.checkpoint import MANIFEST, Checkpoints, DamagedError, verify
from tests.stress import corruption
from tests.stress.corruption import files, make_state

pytestmark = pytest.mark.both_lines

ROOT = pathlib.Path(__file__).parent.parent


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
    """The step from which a run would resume; the restored state must be the one saved under that step."""
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
    assert "checkpoint of step 2 moved to" in warning
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
    assert "checkpoint of step 2 skipped" in capsys.readouterr().err
    assert (folder / "2").exists()


def test_where_nothing_is_intact_nothing_is_moved(folder):
    """A training run that found no checkpoint would start from scratch and overwrite the run's metrics."""
    for step in ("1", "2"):
        (folder / step / MANIFEST).unlink()
    for _ in range(2):
        with pytest.raises(
            AlexNetError, match=r"no checkpoint is intact .*copy an intact one back, or train from scratch"
        ):
            restored_step(folder)
        assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    (folder / "1").rename(folder / "set-aside")
    shutil.rmtree(folder / "2")
    with pytest.raises(AlexNetError, match=r"no checkpoint is intact \(all are in .*set-aside\)"):
        restored_step(folder)


@pytest.mark.parametrize(
    "name", ["desktop.ini", "Thumbs.db", "manifest (conflicted copy).json", "state/d/ocdbt.process_3"]
)
def test_extra_files_are_ignored(folder, name):
    (folder / "2" / name).write_text("not ours")
    assert restored_step(folder) == 2
    assert (folder / "2" / name).exists()


def test_links_are_followed(folder, tmp_path):
    """The layout of git-annex and DVC: each file, or a whole checkpoint, is a link."""
    kept = tmp_path / "kept"
    kept.mkdir()
    for number, path in enumerate(files(folder / "2")):
        path.rename(kept / str(number))
        path.symlink_to(kept / str(number))
    (folder / "1").rename(kept / "one")
    (folder / "1").symlink_to(kept / "one")
    assert restored_step(folder) == 2
    Checkpoints(folder).save(make_state(3), {"step": 3}, accuracy=None)
    assert Checkpoints(folder).all_steps() == [2, 3]
    assert (kept / "one" / MANIFEST).exists()
    (kept / "0").unlink()
    (folder / "3").rename(tmp_path / "3")
    with pytest.raises(AlexNetError, match="is a broken link: fetch or mount"):
        restored_step(folder)
    assert (folder / "2").exists()


def test_a_checkpoint_that_a_training_removes_meanwhile_is_not_damaged(folder, monkeypatch, capsys):
    shutil.copytree(folder / "2", folder.parent / "3")
    manifest = json.loads((folder.parent / "3" / MANIFEST).read_text())
    (folder.parent / "3" / MANIFEST).write_text(json.dumps(manifest | {"step": 3}))
    real = checkpoint.verify

    def removed(path, step):
        if path.name == "2":
            (folder.parent / "3").rename(folder / "3")
            shutil.rmtree(path)
        real(path, step)

    monkeypatch.setattr(checkpoint, "verify", removed)
    newest = Checkpoints(folder, read_only=True).restore_newest()
    assert newest is not None
    assert newest[1] == {"step": 2}  # the contents of the copy
    assert not (folder / "2").exists()
    assert capsys.readouterr().err == ""
    with pytest.raises(AlexNetError, match=r"there is no such checkpoint; the steps are \[1, 3\]"):
        Checkpoints(folder, read_only=True).restore_tree(2)


@pytest.mark.parametrize("name", ["lr[0.1]", "a*", "what?", "gs:", "back\\slash"])
def test_wildcards_in_the_path(tmp_path, name):
    """Orbax globs the whole path that it merges, and finds nothing; it treats `gs:` as a bucket."""
    folder = tmp_path / name / "checkpoints"
    folder.parent.mkdir()
    Checkpoints(folder).save(make_state(1), {"step": 1}, accuracy=0.5)
    assert restored_step(folder) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["1"]


def test_a_link_in_the_temporary_folder_may_be_cleared_away(tmp_path, monkeypatch):
    """Programs delete old files there: a link must not be kept for the duration of a training run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "lr[0.1]"
    checkpoints = Checkpoints(folder)
    for link in tmp_path.glob("alexnet_jax-*"):
        shutil.rmtree(link)
    checkpoints.save(make_state(1), {"step": 1}, accuracy=None)
    assert restored_step(folder) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lr[0.1]"]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs a C compiler on Linux")
def test_a_file_system_without_locks(tmp_path):
    """Lustre without -o flock, NFS with nolock: TensorStore locks files, too."""
    (tmp_path / "nolock.c").write_text(
        """
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <errno.h>
        #include <fcntl.h>
        #include <stdarg.h>
        int flock(int file, int operation) { errno = ENOSYS; return -1; }
        int fcntl64(int file, int command, ...) {
            va_list rest;
            va_start(rest, command);
            void *argument = va_arg(rest, void *);
            va_end(rest);
            if (command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW) {
                errno = ENOSYS;
                return -1;
            }
            int (*real)(int, int, ...) = dlsym(RTLD_NEXT, "fcntl64");
            return real(file, command, argument);
        }
        int fcntl(int file, int command, ...) {
            va_list rest;
            va_start(rest, command);
            void *argument = va_arg(rest, void *);
            va_end(rest);
            return fcntl64(file, command, argument);
        }
        """
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "nolock.so", "nolock.c", "-ldl"], cwd=tmp_path, check=True)
    folder = str(tmp_path / "checkpoints")
    code = f"import pathlib; from tests.stress import corruption; corruption.save_two(pathlib.Path({folder!r}))"
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {
            "LD_PRELOAD": str(tmp_path / "nolock.so"),
            "PYTHONPATH": str(ROOT),
        },
        check=True,
    )
    assert restored_step(tmp_path / "checkpoints") == 2


def test_a_checkpoint_that_is_a_link_to_nothing_is_not_taken_for_none(folder, tmp_path):
    """A disk that is not mounted: the training would start from scratch."""
    (folder / "2").rename(tmp_path / "2")
    (folder / "2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AlexNetError, match="2 is a broken link: fetch or mount"):
        restored_step(folder)
    folder.rename(tmp_path / "all")
    folder.symlink_to(tmp_path / "nothing")
    with pytest.raises(AlexNetError, match="checkpoints is a broken link"):
        Checkpoints(folder)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"2")] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pathlib.Path.unlink, r"2/memory\.json is missing"),
        (flip_a_bit, r"2/memory\.json is not what was saved"),
        (lambda path: path.write_text("[" * 200_000), r"2/memory\.json has 200000 bytes"),
        (lambda path: path.with_name("manifest.json").write_text("[" * 200_000), r"2/manifest\.json is damaged"),
    ],
)
def test_the_best_is_not_another_one_where_an_accuracy_cannot_be_read(folder, capsys, damage, message):
    damage(folder / "2" / "memory.json")
    with pytest.raises(DamagedError, match=message):
        Checkpoints(folder, read_only=True).restore_best()
    Checkpoints(folder).save(make_state(3), {"step": 3}, accuracy=None)
    Checkpoints(folder).save(make_state(4), {"step": 4}, accuracy=None)
    assert Checkpoints(folder).all_steps() == [1, 2, 3, 4]
    assert "no old checkpoint is removed" in capsys.readouterr().err


def test_pipes_in_place_of_files_do_not_hang(folder):
    (folder / "2" / MANIFEST).unlink()
    os.mkfifo(folder / "2" / MANIFEST)
    with pytest.raises(AlexNetError, match="not a regular file"):
        restored_step(folder)


def test_names_like_those_of_a_save_are_left_alone(folder):
    (folder / ".saving-3 (conflicted copy)").touch()
    (folder / ".saving-4").symlink_to(folder / "1")
    assert restored_step(folder) == 2
    assert (folder / ".saving-3 (conflicted copy)").exists()
    assert (folder / "1" / MANIFEST).exists()
    assert not (folder / ".saving-4").is_symlink()


def test_what_cannot_be_restored_is_not_reported_as_saved(folder, monkeypatch):
    checkpoints = Checkpoints(folder)
    save = ocp.Checkpointer.save

    def lossy(self, path, args):
        save(self, path, args=ocp.args.StandardSave(jax.tree.map(np.zeros_like, args.item)))

    monkeypatch.setattr(ocp.Checkpointer, "save", lossy)
    with pytest.raises(AlexNetError, match="can't be read back as it was written"):
        checkpoints.save(make_state(3), {"step": 3}, accuracy=None)
    monkeypatch.setattr(ocp.Checkpointer, "save", lambda self, path, args: path.mkdir())
    with pytest.raises(AlexNetError, match="3: can't be written"):
        checkpoints.save(make_state(3), {"step": 3}, accuracy=None)
    assert Checkpoints(folder).all_steps() == [1, 2]


@pytest.mark.parametrize("make", [pathlib.Path.touch, pathlib.Path.mkdir])
def test_what_only_bears_a_checkpoints_name_is_not_taken_for_a_save(folder, make):
    make(folder / "3")
    with pytest.raises(AlexNetError, match=r"3 is in the way of a checkpoint .*: move it"):
        Checkpoints(folder).save(make_state(3), {"step": 3}, accuracy=None)
    Checkpoints(folder).save(make_state(2), {"step": 2}, accuracy=None)  # which is there
    assert (folder / "3").exists()


def test_an_old_checkpoint_that_cannot_be_removed_costs_nothing(folder, monkeypatch, capsys):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        Checkpoints(folder).save(make_state(3), {"step": 3}, accuracy=None)
    assert "no longer needed, but can't be removed: " in capsys.readouterr().err
    assert restored_step(folder) == 3


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
        (
            lambda s: s.replace(params={"dense": {"kernel": jnp.zeros((2, 4))}}),
            r"float32\[2, 3\], but the network needs",
        ),
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
    """A limit on the size of files simulates a full disk: writing fails in the middle of a file."""
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

"""The short form of tests/stress: 2 kills at random instants, and faults at some calls of a save."""

import errno

import pytest

from tests.stress import harness, kill, save_faults

if reason := harness.unavailable():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A fork server with its own cache: a compiled program is for a certain number of devices."""
    with harness.Server(tmp_path_factory.mktemp("server"), tiny=True) as running:
        yield running


@pytest.fixture(scope="module")
def saves(server, tmp_path_factory):
    """A finished run, and a save whose calls are known."""
    return save_faults.Tester(server, tmp_path_factory.mktemp("saves"))


def test_runs_that_are_killed_become_what_they_would_have_been(server, tmp_path):
    figures = kill.Tester(server, tmp_path, seed=0).run(2)
    assert figures.failures == []
    assert sum(figures.kills.values()) == 2
    assert figures.runs_finished > 0


def test_a_save_that_is_killed_loses_nothing(saves):
    assert {"mkdir", "rename", "fsync"} <= set(saves.calls)  # the shim sees what it must
    for call in range(1, len(saves.calls) + 1, 80):
        saves.kill(call, "kill halfway")  # where the call is no write: before it
    assert saves.figures.failures == []


@pytest.mark.parametrize(("number", "once"), [(errno.ENOSPC, False), (errno.EROFS, False), (errno.EIO, True)])
def test_a_save_that_fails_loses_nothing_and_says_so_in_a_line(saves, number, once):
    for call in range(5, len(saves.calls) + 1, 90):
        saves.fail(call, number, once)
    assert saves.figures.failures == []

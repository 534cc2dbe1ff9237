"""Effects of SIGINT, SIGTERM and SIGHUP; earlier handlers are restored."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from alexnet_jax import signals
from alexnet_jax.config import cli
from alexnet_jax.errors import StoppedError

ROOT = pathlib.Path(__file__).parent.parent
SIGHUP = getattr(signal, "SIGHUP", None)
needs_sighup = pytest.mark.skipif(SIGHUP is None, reason="no SIGHUP on Windows")


@needs_sighup
def test_a_closed_terminal_asks_a_training_to_save():
    with signals.StopSignals() as received:
        os.kill(os.getpid(), SIGHUP)
        deadline = time.monotonic() + 5
        while received.received is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert received.received == SIGHUP
    assert StoppedError(SIGHUP, "").exit_code == 129


@needs_sighup
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_that_comes_twice_at_once_counts_once(name):
    """Closing a terminal may send SIGHUP twice; the second one must not end the saving."""
    code = f"""
import os, signal, time
from alexnet_jax import signals
with signals.StopSignals() as received:
    for _ in range(2):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.01)
    time.sleep(0.05)
    print("saved", received.received, flush=True)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.2)
    print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    number = getattr(signal, name)
    assert done.stdout.splitlines()[0] == f"saved {number.value}", done.stderr
    assert ("alive" in done.stdout) == (name == "SIGHUP")
    assert done.returncode == (0 if name == "SIGHUP" else 128 + number)


@needs_sighup
def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(SIGHUP, signal.SIG_IGN)
    try:
        assert SIGHUP not in signals.handled()
        with signals.StopSignals() as received:
            os.kill(os.getpid(), SIGHUP)
            assert received.received is None
        assert signal.getsignal(SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(SIGHUP, before)
    assert SIGHUP in signals.handled()


def test_a_program_gives_the_handlers_back(monkeypatch):
    """As `%run train.py` in a living interpreter needs it."""
    monkeypatch.setattr(signals.atexit, "register", lambda act: None)  # the tests keep their own handlers
    before = [signal.getsignal(number) for number in signals.handled()]
    during = []
    cli.run(lambda args: during.extend(signal.getsignal(number) for number in signals.handled()))
    assert len(set(during)) == 1
    assert during[0] not in before
    assert [signal.getsignal(number) for number in signals.handled()] == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_without_anything_to_save_a_signal_is_one_line(name):
    code = "import os, signal\nfrom alexnet_jax.config import cli\n"
    code += f"cli.run(lambda args: os.kill(os.getpid(), signal.{name}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + getattr(signal, name)
    assert f"{name}: stopped" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_in_ipython_a_stopped_training_leaves_the_interpreter_alive(monkeypatch, capsys):
    def stop(args):
        raise StoppedError(signal.SIGINT, "saved step 7")

    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        cli.run(stop)
    assert left.value.code == 130
    assert "SIGINT: saved step 7" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before

"""Output to a closed pipe, a full disk, or an encoding that lacks a character."""

import io
import os
import pathlib
import subprocess
import sys

import pytest

from alexnet_jax import terminal

ROOT = pathlib.Path(__file__).parent.parent

# A program of the package that prints more than a pipe holds, then leaves a mark.
PROGRAM = """
import pathlib, sys
from alexnet_jax.config import cli

def main(args):
    for _ in range(5000):
        print("mean cross entropy: 2.303")
    print("日本 ████", file=sys.stderr)
    pathlib.Path(args[0]).write_text(pathlib.Path(args[0]).name)

cli.run(main)
"""


def run_program(mark: pathlib.Path, redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "$2" {redirection}', sys.executable, PROGRAM, str(mark)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
@pytest.mark.parametrize(
    "redirection",
    [
        pytest.param('| head -1; exit "${PIPESTATUS[0]}"', id="a reader that leaves"),
        pytest.param("> /dev/full 2>&1", id="a full disk"),
        pytest.param(">&- 2>&-", id="closed streams"),
    ],
)
def test_the_end_of_the_output_does_not_end_the_program(tmp_path, redirection):
    done = run_program(tmp_path / "mark", redirection)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").read_text() == "mark"  # and nothing was printed into it
    assert "Exception" not in done.stderr
    assert "Error" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_characters_that_the_output_lacks_are_escaped(tmp_path, encoding):
    done = run_program(tmp_path / "mark", "", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert r"\u65e5\u672c" in done.stderr
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(("encoding", "expected"), [("utf-8", "██"), ("latin-1", "##")])
def test_bars_are_drawn_with_what_the_output_has(monkeypatch, encoding, expected):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert terminal.bar(0.5, width=4) == expected


def test_the_streams_of_a_notebook_stay(monkeypatch):
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    monkeypatch.setattr(sys, "stderr", mine)
    terminal.never_fail()
    assert sys.stdout is sys.stderr is mine

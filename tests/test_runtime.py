import os
import pathlib
import subprocess
import sys

import pytest

from alexnet_jax.runtime import compilation_cache_folder

CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def run(program, **environment):
    """Runs a program in a process of its own: what is tested here can't be undone."""
    inherited = {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=inherited | environment).stdout


def test_keep_freed_memory():
    """A large block that is allocated again costs no new pages."""
    program = """
import resource
import numpy as np
from alexnet_jax.runtime import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25)  # 256 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
second = faults()
keep_freed_memory()
faults()
print(second, faults())
"""
    second, kept = map(int, run(program).split())
    if second < 100:
        pytest.skip("this C library keeps freed memory anyway")
    assert kept < second / 10


COMPILE = """
import jax
from alexnet_jax.runtime import cache_compilations
cache_compilations({enable})
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
"""


def entries(folder):
    return list(pathlib.Path(folder).rglob("*-cache"))


def test_compilations_are_kept(tmp_path):
    run(COMPILE.format(enable=True), XDG_CACHE_HOME=str(tmp_path))
    assert len(entries(tmp_path)) == 1
    assert entries(tmp_path)[0].parent.parent == tmp_path / "alexnet_jax"


def test_no_cache(tmp_path):
    run(COMPILE.format(enable=False), XDG_CACHE_HOME=str(tmp_path / "a"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "b"))
    assert not entries(tmp_path)


def test_the_users_own_folder_is_respected(tmp_path):
    run(COMPILE.format(enable=True), XDG_CACHE_HOME=str(tmp_path / "a"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "b"))
    assert len(entries(tmp_path / "b")) == 1
    assert not entries(tmp_path / "a")


def test_a_folder_that_can_not_be_made_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    run(COMPILE.format(enable=True), XDG_CACHE_HOME=str(tmp_path / "file"))


def test_the_folder_is_named_by_the_processor(monkeypatch):
    def folder(flags, clock):
        text = f"model name\t: A processor\ncpu MHz\t: {clock}\nflags\t: {flags}\n"
        monkeypatch.setattr(pathlib.Path, "read_text", lambda self: text)
        return compilation_cache_folder()

    assert folder("sse avx", 3000) == folder("sse avx", 2999)
    assert folder("sse avx", 3000) != folder("sse avx avx512f", 3000)
    assert folder("sse", 3000).parent.name == "alexnet_jax"

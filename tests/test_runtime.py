import errno
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import runtime
from alexnet_jax.data import cifar10_tfds, prepare, streamed
from alexnet_jax.distributed import devices
from alexnet_jax.errors import AlexNetError
from alexnet_jax.runtime import compilation_cache_folder

ROOT = pathlib.Path(__file__).parent.parent
CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def run(program, warnings=0, **environment):
    """Runs a program in a separate process, because the tested effects can't be undone. Returns stdout, then stderr."""
    inherited = {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=inherited | environment)
    assert done.stderr.count("\n") == warnings, done.stderr
    return done.stdout + done.stderr


@pytest.mark.both_lines
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


@pytest.mark.both_lines
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


def test_a_folder_that_can_not_be_made_gets_a_warning(tmp_path):
    (tmp_path / "file").touch()
    said = run(COMPILE.format(enable=True), warnings=1, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert said.startswith(f"warning: compiled programs are not kept ({tmp_path}/file")


NO_HOME = """
import os, pathlib, pwd
def unknown(number):
    raise KeyError(number)
pwd.getpwuid = unknown
for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
    os.environ.pop(name, None)
"""


def test_a_user_without_a_home_gets_a_warning(tmp_path):
    """No HOME and a uid without a name, as in a container with --user; matplotlib says nothing besides."""
    program = (
        f"{NO_HOME}\nos.chdir({str(tmp_path)!r})\nfrom alexnet_jax.config import cli\nfrom alexnet_jax import plots\n"
    )
    said = run(program + COMPILE.format(enable=True), warnings=1, PYTHONPATH=str(ROOT))
    assert said.startswith("warning: compiled programs are not kept (there is no home directory)")
    assert list(tmp_path.iterdir()) == []  # no folder named "~"


def test_a_folder_that_can_not_be_written_is_not_used(tmp_path):
    refuse = f"import os; os.access = lambda path, mode: str(path) != {str(tmp_path)!r}\n"
    said = run(refuse + COMPILE.format(enable=True), warnings=1, JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert said.startswith(f"warning: compiled programs are not kept ({tmp_path}: Permission denied)")
    assert not entries(tmp_path)


def test_the_folder_is_named_by_the_processor(monkeypatch):
    def folder(flags, clock):
        text = f"model name\t: A processor\ncpu MHz\t: {clock}\nflags\t: {flags}\n"
        monkeypatch.setattr(pathlib.Path, "read_text", lambda self: text)
        return compilation_cache_folder()

    assert folder("sse avx", 3000) == folder("sse avx", 2999)
    assert folder("sse avx", 3000) != folder("sse avx avx512f", 3000)
    assert folder("sse", 3000).parent.name == "alexnet_jax"


@pytest.mark.parametrize("error", [RuntimeError("Unable to\ninitialize"), AssertionError()])  # the latter: cuda
def test_programs_ask_for_devices_where_the_error_is_caught(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(AlexNetError, match="JAX") as caught:
        devices.select_devices(None)
    assert "\n" not in str(caught.value)


def test_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert runtime.available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert runtime.available_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert runtime.available_cores() == 1


@pytest.mark.parametrize(
    "act",
    [
        lambda folder: prepare.prepare(prepare.PrepareConfig(folder, folder / "out")),
        streamed.open_prepared,
        cifar10_tfds.read,
    ],
)
def test_without_array_record_there_is_one_line(tmp_path, monkeypatch, act):
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    with pytest.raises(AlexNetError, match=r"^array_record, the format of prepared images, can't be used .* Windows"):
        act(tmp_path)
    assert list(tmp_path.iterdir()) == []


def caused(error, by):
    error.__cause__ = by
    return error


@pytest.mark.both_lines
@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (caused(AlexNetError("x.npz is damaged"), MemoryError()), True),
        (RuntimeError("INTERNAL: cuDNN"), False),
        (ValueError("out of memory"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
)
def test_memory_shortage(error, is_memory):
    found = runtime.memory_shortage(error)
    assert (found is not None) == is_memory
    assert found is None or "--batch-size" in str(found)


@pytest.mark.both_lines
@pytest.mark.parametrize("allocate", [lambda: jnp.zeros(2**46, jnp.uint8), lambda: np.ones(2**46, np.uint8)])
def test_a_real_memory_shortage(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate()
    assert re.match(
        r"not enough memory \((RESOURCE_EXHAUSTED|Unable to allocate).*\): use ",
        str(runtime.memory_shortage(error.value)),
    )

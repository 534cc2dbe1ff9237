"""The machine: cores, devices, memory, compilation cache, environment."""

import contextlib
import ctypes
import errno
import hashlib
import importlib
import logging
import os
import pathlib
import platform
import re
import shutil
import warnings
from typing import TYPE_CHECKING

import platformdirs

from alexnet_jax.errors import AlexNetError, reason, shown, warn

if TYPE_CHECKING:
    import jax

# Without a writable home directory, matplotlib uses a temporary folder and logs several lines about it.
_FOLDER_NOTICES = ("Matplotlib created a temporary", "mkdir -p failed", "%s is not a writable directory")
logging.getLogger("matplotlib").addFilter(lambda record: not str(record.msg).startswith(_FOLDER_NOTICES))

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|failed to allocate|bad_alloc", re.IGNORECASE)
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks for the next allocation; does nothing with another C library.

    On a CPU, XLA allocates the scratch space of a step (100 MB for AlexNetSmall with batch 128) again in every step. By
    default, glibc returns freed blocks of that size to the kernel: every step caused 27,000 page faults, which took a
    fifth of its time. With this setting, the process's memory no longer shrinks, but does not grow beyond its peak
    either.

    Call it before JAX is first used: threads that have already allocated memory keep their own pools.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_ARENA_MAX, 1)


def available_cores() -> int:
    """Number of cores that this process may use, or of all cores if the system doesn't say (macOS, Windows)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_array_record() -> None:
    """Makes sure that the package array_record, the file format of prepared images, is installed.

    Raises:
      AlexNetError: it can't be imported; it has no build for Windows.
    """
    try:
        importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise AlexNetError(
            f"array_record, the format of prepared images, can't be used ({reason(error, 300)}): install the package "
            "array_record; it has no build for Windows, use Linux or WSL there"
        ) from error


SHARED_MEMORY = pathlib.Path("/dev/shm")  # on Linux; other systems have no such limit


def require_shared_memory(workers: int, needed: int) -> None:
    """Makes sure that `workers` processes that load images have `needed` bytes of shared memory in total.

    A process that writes to full shared memory is killed by SIGBUS. Containers have 64 MB by default.

    Raises:
      AlexNetError: less is free.
    """
    if SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise AlexNetError(
            f"--loader-workers {workers} needs {needed / 1e6:,.0f} MB of shared memory, but {SHARED_MEMORY} has only "
            f"{free / 1e6:,.0f} MB free: use fewer workers, --loader-workers 0, or docker run --shm-size"
        )


def devices() -> "list[jax.Device]":
    """All devices, `jax.devices()`. The first call initializes JAX's backends.

    Raises:
      AlexNetError: there are none, or not those that JAX_PLATFORMS names.
    """
    import jax  # here, because programs parse their flags before they wait for this import

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX has no plugin for CUDA
        wanted = jax.config.values["jax_platforms"]
        why = f" ({shown(reason(error, 10_000).split(' (set JAX_')[0], 300)})" if str(error) else ""
        if not wanted:
            raise AlexNetError(f"JAX can't use any device{why}") from error
        raise AlexNetError(
            f"JAX_PLATFORMS={wanted!r}: JAX can't use such a device here{why}: unset JAX_PLATFORMS to use the devices "
            "that are available, or install JAX for that device"
        ) from error


def memory_shortage(error: BaseException) -> AlexNetError | None:
    """The error to report if `error` says that memory ran out, on the host or on a device; None for any other error.

    JAX has no class for it: a failed allocation is a `JaxRuntimeError` of status RESOURCE_EXHAUSTED. An error whose
    cause (`__cause__`) is one of these counts as well.
    """
    cause: BaseException | None = error
    while cause is not None:
        if (
            isinstance(cause, MemoryError)
            or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
            or (isinstance(cause, RuntimeError) and _OUT_OF_MEMORY.search(str(cause)))
        ):
            return AlexNetError(
                f"not enough memory ({reason(cause, 300)}): use a smaller --batch-size; with train.py also a smaller "
                "--eval-batch-size or a larger --accumulate"
            )
        cause = cause.__cause__
    return None


def ignore_settings_of_others() -> None:
    """Removes settings from the environment that would change random draws and numbers, or break plots.

    Call it before JAX and matplotlib are imported.
    """
    for name in (
        *("JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE"),
        *("JAX_NUMPY_DTYPE_PROMOTION", "JAX_RANDOM_SEED_OFFSET"),
    ):
        if os.environ.pop(name, None) is not None:
            warn(f"{name} is ignored: the same seed would give different numbers with it")
    os.environ.pop("MPLBACKEND", None)
    os.environ["MATPLOTLIBRC"] = os.devnull  # the user's own may require LaTeX


def compilation_cache_folder() -> pathlib.Path:
    """Where compiled programs are cached: in the user's cache directory, in a folder for each kind of processor.

    Home directories are shared between machines, and a program may use instructions that another processor lacks.

    Raises:
      RuntimeError: the user has no home directory.
    """
    cache = platformdirs.user_cache_path("alexnet_jax")
    if not cache.is_absolute():  # older versions of platformdirs return a relative path then
        raise RuntimeError("no home directory")
    with contextlib.suppress(OSError):  # not on Linux
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
        kind = hashlib.sha256("".join(features).encode()).hexdigest()[:8]
        return cache / f"{platform.machine()}-{kind}"
    return cache / platform.machine()


def cache_compilations(enable: bool) -> None:
    """Turns the cache of compiled programs on or off; call it before JAX compiles anything.

    A folder given by the environment variable JAX_COMPILATION_CACHE_DIR is respected. If no folder can be written, a
    warning is printed and there is no cache.
    """
    import jax

    jax.config.update("jax_enable_compilation_cache", enable)
    if not enable:
        return
    # JAX would warn about each program that it can't read or write: fifty times when the disk is full.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Besides the train step there are fifty small programs, which together take as long to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if chosen and "://" in chosen:  # a bucket
        return
    try:
        folder = pathlib.Path(chosen).expanduser() if chosen else compilation_cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except (OSError, RuntimeError, KeyError) as error:  # the last two: no home directory
        jax.config.update("jax_enable_compilation_cache", False)
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "there is no home directory"
        warn(
            f"compiled programs are not kept ({why}), so each start compiles them again: set JAX_COMPILATION_CACHE_DIR "
            "to a writable folder"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))

"""What a program asks of the machine: devices, cores, memory that stays, compilations that are kept."""

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

from alexnet_jax.errors import AlexNetError, warn

if TYPE_CHECKING:
    import jax

# Without a home directory that can be written, matplotlib works in a temporary one, and says so at length.
_FOLDER_NOTICES = ("Matplotlib created a temporary", "mkdir -p failed", "%s is not a writable directory")
logging.getLogger("matplotlib").addFilter(lambda record: not str(record.msg).startswith(_FOLDER_NOTICES))

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|failed to allocate|bad_alloc", re.IGNORECASE)
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes the C library keep freed blocks for the next allocation, where it is glibc; elsewhere does nothing.

    XLA allocates a step's scratch space (100 MB for AlexNetSmall with batch 128) anew for each step on a CPU. glibc
    hands blocks of that size back to the kernel when they are freed, so every step faulted in 27,000 fresh pages: a
    fifth of its time. The process's memory no longer shrinks, but it does not grow beyond its peak either.

    To be called before JAX is first used: threads that have allocated already keep their own pools.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_ARENA_MAX, 1)


def available_cores() -> int:
    """How many cores this process may use; where the system doesn't say (macOS, Windows), how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_array_record() -> None:
    """Makes sure that array_record, the format of prepared images, can be read and written here.

    Raises:
      AlexNetError: it is not installed; there is no build of it for Windows.
    """
    try:
        importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise AlexNetError(
            f"array_record, the format of prepared images, can't be used ({_one_line(error)}): install the package "
            "array_record; it has no build for Windows: use Linux or WSL there"
        ) from error


SHARED_MEMORY = pathlib.Path("/dev/shm")  # where Linux has it; other systems have no such limit


def require_shared_memory(workers: int, needed: int) -> None:
    """Makes sure that processes that load images have room to hand them over.

    Where there is too little, the system kills a process that writes to it (SIGBUS). Containers have 64 MB by default.

    Args:
      workers: how many processes.
      needed: bytes for all of them.

    Raises:
      AlexNetError: so much is not free.
    """
    if SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise AlexNetError(
            f"--loader-workers {workers} needs {needed / 1e6:,.0f} MB of shared memory, and {SHARED_MEMORY} has "
            f"{free / 1e6:,.0f} MB free: use fewer or --loader-workers 0, or enlarge it (docker run --shm-size)"
        )


def devices() -> "list[jax.Device]":
    """All devices, `jax.devices()`; where JAX is first used in a process, this starts it.

    Raises:
      AlexNetError: JAX can't use the devices that JAX_PLATFORMS names.
    """
    import jax  # here, because programs parse their flags before they wait for this import

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX has no plugin for CUDA
        wanted = jax.config.values["jax_platforms"]
        reason = f" ({_one_line(error).split(' (set JAX_')[0]})" if str(error) else ""
        if not wanted:
            raise AlexNetError(f"JAX can't use any device{reason}") from error
        raise AlexNetError(
            f"JAX_PLATFORMS={wanted!r}: JAX can use no such device here{reason}: unset JAX_PLATFORMS to use what there "
            "is, or install JAX for that device"
        ) from error


def memory_shortage(error: BaseException) -> AlexNetError | None:
    """What to report if an error says that memory is short, on the host or on a device; None for any other error.

    JAX has no class for it: an allocation that fails is a `JaxRuntimeError` of status RESOURCE_EXHAUSTED. An error that
    was raised from one of these counts as one.
    """
    cause: BaseException | None = error
    while cause is not None:
        if (
            isinstance(cause, MemoryError)
            or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
            or (isinstance(cause, RuntimeError) and _OUT_OF_MEMORY.search(str(cause)))
        ):
            return AlexNetError(
                f"not enough memory ({_one_line(cause)}): use a smaller --batch-size; of train.py also a smaller "
                "--eval-batch-size or a larger --accumulate"
            )
        cause = cause.__cause__
    return None


def _one_line(error: BaseException) -> str:
    """An error's text for a message of one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def ignore_settings_of_others() -> None:
    """Sets aside the environment's settings that would change draws and numbers, or break pictures.

    To be called before JAX and matplotlib are imported.
    """
    for name in ("JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE", "JAX_NUMPY_DTYPE_PROMOTION"):
        if os.environ.pop(name, None) is not None:
            warn(f"{name} is ignored: with it the same seed would give other numbers")
    os.environ.pop("MPLBACKEND", None)
    os.environ["MATPLOTLIBRC"] = os.devnull  # the user's may ask for LaTeX


def compilation_cache_folder() -> pathlib.Path:
    """Where compiled programs are kept: in the user's cache directory, a folder for each kind of processor.

    A program compiled for one processor may use instructions that another lacks, and home directories are shared.

    Raises:
      RuntimeError: the user has no home directory.
    """
    cache = platformdirs.user_cache_path("alexnet_jax")
    if not cache.is_absolute():  # what older versions of platformdirs return
        raise RuntimeError("no home directory")
    with contextlib.suppress(OSError):  # no Linux
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
        kind = hashlib.sha256("".join(features).encode()).hexdigest()[:8]
        return cache / f"{platform.machine()}-{kind}"
    return cache / platform.machine()


def cache_compilations(enable: bool) -> None:
    """Keeps compiled programs for the next start, or not.

    A folder that was chosen otherwise (the environment variable JAX_COMPILATION_CACHE_DIR) stays. To be called before
    JAX compiles anything. Where there is no folder that can be written, a line warns, and there is no cache.
    """
    import jax

    jax.config.update("jax_enable_compilation_cache", enable)
    if not enable:
        return
    # It would warn of each program that it can't read or write: when the disk is full, fifty times.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # There are fifty small programs beside the train step; together they take as long to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if chosen and "://" in chosen:  # not on a disk
        return
    try:
        folder = pathlib.Path(chosen).expanduser() if chosen else compilation_cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except (OSError, RuntimeError, KeyError) as error:  # the last two: no home directory
        jax.config.update("jax_enable_compilation_cache", False)
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "there is no home directory"
        warn(
            f"compiled programs are not kept ({reason}), so each start compiles them anew: set "
            "JAX_COMPILATION_CACHE_DIR to a folder that can be written"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))

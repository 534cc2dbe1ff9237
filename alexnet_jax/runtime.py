"""What a program asks of the machine before it begins: memory that stays, compilations that are kept."""

import contextlib
import ctypes
import hashlib
import os
import pathlib
import platform

import platformdirs

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


def compilation_cache_folder() -> pathlib.Path:
    """Where compiled programs are kept: in the user's cache directory, a folder for each kind of processor.

    A program compiled for one processor may use instructions that another lacks, and home directories are shared.
    """
    with contextlib.suppress(OSError):  # no Linux
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
        kind = hashlib.sha256("".join(features).encode()).hexdigest()[:8]
        return platformdirs.user_cache_path("alexnet_jax") / f"{platform.machine()}-{kind}"
    return platformdirs.user_cache_path("alexnet_jax") / platform.machine()


def cache_compilations(enable: bool) -> None:
    """Keeps compiled programs for the next start, or not.

    A folder that was chosen otherwise (the environment variable JAX_COMPILATION_CACHE_DIR) stays. To be called before
    JAX compiles anything. Where the folder can't be made there is no cache.
    """
    import jax  # here, because programs parse their flags before they wait for this import

    jax.config.update("jax_enable_compilation_cache", enable)
    if not enable:
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # There are fifty small programs beside the train step; together they take as long to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = compilation_cache_folder()
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))

"""A worker: builds what its argument, a `programs.Spec` in JSON, describes, then runs it on command.

Each program to be compared runs in a separate process, so that runtimes and thread pools don't interfere. It answers
with lines of JSON on stdout: one when everything is compiled, then one for each line `{"program": NAME, "steps": N}` on
stdin. It ends when stdin is closed.
"""

import importlib
import json
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Callable

from programs import Spec

from alexnet_jax import runtime

WARM_UP = 2  # uncounted steps before each block


def peak_host_memory() -> int:
    """The most memory that this process has held so far, bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss of a new process begins with that of its parent
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Serves requests; a failure is also answered with one line."""
    runtime.keep_freed_memory()  # as train.py does; the peers get it, too
    # The output of a framework must not be mixed with the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def answer(**message: object) -> None:
            print(json.dumps(message), file=answers, flush=True)

        try:
            serve(Spec(**json.loads(sys.argv[1])), answer)
        except Exception as error:
            answer(error=textwrap.shorten(f"{type(error).__name__}: {error}", 150, placeholder=" ..."))


def serve(spec: Spec, answer: Callable[..., None]) -> None:
    """Builds, warms up, and runs what is requested until stdin ends."""
    module = importlib.import_module(f"programs_{spec.framework}")
    if spec.framework != "jax" and module.platform() != spec.platform:
        raise RuntimeError(f"computes on the {module.platform()}, JAX on the {spec.platform}")
    imported = peak_host_memory()
    start = time.perf_counter()
    programs = module.operations(spec) if spec.task == "operations" else {spec.task: getattr(module, spec.task)(spec)}
    for program in programs.values():
        program.run(WARM_UP)
    answer(
        build_seconds=time.perf_counter() - start,
        parameters=sum(program.parameters for program in programs.values()),
        imported_bytes=imported,
    )
    for line in sys.stdin:
        command = json.loads(line)
        program = programs[command["program"]]
        program.run(WARM_UP)
        start = time.perf_counter()
        program.run(command["steps"])
        seconds = time.perf_counter() - start
        answer(seconds=seconds, peak_bytes=peak_host_memory(), device_peak_bytes=module.device_peak())


if __name__ == "__main__":
    main()

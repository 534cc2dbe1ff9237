"""Works off the long trainings, one after another, on one core at low priority; see `--help`."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

import ablate
import jax
from ablate import Ablation
from report import markdown
from studies import Variant

from alexnet_jax.config import cli
from alexnet_jax.config.types import Path
from alexnet_jax.data.batches import steps_per_epoch
from alexnet_jax.runs.folder import RunFolder
from alexnet_jax.runs.log import read_jsonl

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """Runs of one study.

    Attributes:
      study: its name.
      seeds: runs of each row: seeds 0, 1, ...
      rows: only these rows, and the study's first; empty: all.
      epochs: instead of the study's.
    """

    study: str
    seeds: int
    rows: tuple[str, ...] = ()
    epochs: int | None = None


QUEUE = (
    Entry("best", seeds=3, rows=("cifar10-best",)),
    Entry("best", seeds=1),
    Entry("options", seeds=3),
    Entry("rates", seeds=1),
    Entry("relu", seeds=3),
    Entry("post", seeds=3),
    Entry("search", seeds=1),
    Entry("longer", seeds=1),
    Entry("tips", seeds=3),
    Entry("lrn", seeds=3),
    Entry("time", seeds=3),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Train the runs of `QUEUE` that are missing in --out, in its order, on one core at the lowest priority.

    A run that was interrupted is resumed; the same command continues until nothing is left.
    """

    data_dir: Path | None = None
    """Folder with CIFAR-10, as for train.py."""
    out: Path = ROOT / "results"
    """Folder of the files of finished runs, one for each study."""
    runs: Path = ROOT / "runs" / "queue"
    """Folder for unfinished runs; a run's folder is removed once its line is written."""
    list: bool = False
    """Train nothing: print what is left and how long it will take."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A run that is missing.

    Attributes:
      ablation: its study.
      variant: its row.
      seed: its seed.
      epochs: its epochs.
      trained: epochs of it that are trained.
      seconds: what an epoch takes, without validation; None: no run tells.
    """

    ablation: Ablation
    variant: Variant
    seed: int
    epochs: int
    trained: int
    seconds: float | None

    @property
    def remaining(self) -> float | None:
        """Seconds until it is finished, if that is known."""
        return None if self.seconds is None else self.seconds * (self.epochs - self.trained)


def missing(options: Options) -> list[Item]:
    """The missing runs: those that were interrupted, then the others, both in the order of `QUEUE`."""
    return sorted(_missing(options), key=lambda item: not item.trained)


def _missing(options: Options) -> Iterator[Item]:
    listed: set[tuple[str, str, int]] = set()
    for entry in QUEUE:
        name = entry.study + (f"-{entry.epochs}-epochs" if entry.epochs else "")
        ablation = Ablation(
            ablate.Options(
                entry.study,  # type: ignore[arg-type]
                seeds=entry.seeds,
                rows=entry.rows,
                epochs=entry.epochs,
                data_dir=options.data_dir,
                out=options.out / f"ablation-{name}-{jax.default_backend()}.jsonl",
                runs=options.runs,
            )
        )
        for variant, seed in ablation.missing():
            if (name, variant.name, seed) not in listed:
                listed.add((name, variant.name, seed))
                yield item(ablation, variant, seed)


def item(ablation: Ablation, variant: Variant, seed: int) -> Item:
    """A missing run, with what its folder and its study's finished runs tell about its time."""
    config = cli.parse_train(ablation.arguments(variant, seed))
    folder = ablation.folder(variant, seed)
    trained, seconds = progress(folder)
    if not seconds:
        same = [row for row in ablation.rows if row["variant"] == variant.name] or ablation.rows
        seconds = [epoch["seconds"] for row in same for epoch in row["curve"]]
    return Item(
        ablation, variant, seed, config.schedule.epochs, trained, sum(seconds) / len(seconds) if seconds else None
    )


def progress(folder: RunFolder) -> tuple[int, list[float]]:
    """Epochs that an unfinished run has trained, and the seconds of each."""
    if not folder.metrics.exists():
        return 0, []
    records, examples = read_jsonl(folder.metrics), folder.read_dataset().counts["train"]
    batch_size = folder.read_config().schedule.batch_size
    trained = max((record["step"] for record in records), default=0) // steps_per_epoch(examples, batch_size)
    curve = ablate.epoch_curve(records, examples, batch_size)
    return trained, [epoch["seconds"] for epoch in curve[:trained]]


def table(items: Sequence[Item]) -> str:
    """What is left, as a Markdown table, and the sum of the times that are known."""
    lines = []
    for one in items:
        where = one.ablation.out.stem.removeprefix("ablation-")
        left = "unknown" if one.remaining is None else f"{one.remaining / 3600:.1f}"
        lines.append([where, one.variant.name, str(one.seed), f"{one.trained} of {one.epochs}", left])
    known = [one.remaining for one in items if one.remaining is not None]
    total = f"{len(items)} runs are left: {sum(known) / 3600:.1f} core-hours"
    if unknown := len(items) - len(known):
        total += f", and {unknown} runs of unknown duration"
    return markdown(["study", "row", "seed", "epochs", "core-hours left"], lines) + f"\n\n{total}."


def use_one_core() -> None:
    """Binds this process to one core, at the lowest priority, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if hasattr(os, "nice"):
        os.nice(19)
    # Linux divides the cores among sessions first, and nice counts only within one. The session of a terminal, which
    # has other programs, is left as it is.
    with contextlib.suppress(AttributeError, OSError):
        if os.getsid(0) == os.getpid():
            pathlib.Path("/proc/self/autogroup").write_text("19")


def main(args: Sequence[str]) -> None:
    """Parses the flags; trains what is missing, or lists it."""
    options = cli.parse(Options, args, "training_queue.py")
    use_one_core()
    while items := missing(options):
        print(table(items), flush=True)
        if options.list:
            return
        ablation = items[0].ablation
        ablation.run(ablation.in_this_process, only=(items[0].variant, items[0].seed))
        jax.clear_caches()
    print("Nothing is left.")


if __name__ == "__main__":
    cli.run(main)

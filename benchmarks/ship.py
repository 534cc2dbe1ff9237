"""Makes the network that comes with the package: `python benchmarks/ship.py RUN --name NAME --source TEXT`.

Writes `alexnet_jax/pretrained/NAME` from a finished run of `cifar10-best`: its description and metrics, the parameters
in float16, and a model card with the accuracy of these files and of the run itself, both measured here on the test
images.
"""

import dataclasses
import datetime
import json
import pathlib
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
import tyro
from run import describe_device

from alexnet_jax import runtime
from alexnet_jax.config import cli
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.config.types import Path
from alexnet_jax.distributed.devices import select_devices
from alexnet_jax.errors import UsageError
from alexnet_jax.files import to_bytes, write_atomically
from alexnet_jax.inspection.run import Run, open_run
from alexnet_jax.inspection.task import evaluate_task, open_task
from alexnet_jax.runs import shipped
from alexnet_jax.runs.folder import RunFolder, versions

VIEWS: tuple[Literal[1, 2, 6, 10], ...] = (1, 2, 6, 10)
CARD = """# {name}

AlexNetSmall, trained with the preset `{preset}` of alexnet_jax, for 32x32 images of ten classes: {classes}. It lets you
use a trained network without downloading data or training one yourself:

```python
import alexnet_jax

run = alexnet_jax.open_run("{name}")
probabilities = run.predict(images)  # [N, 32, 32, 3], RGB: uint8, or floats in [0, 1]
```

On the command line, `python -m alexnet_jax.eval {name} --images photo.png` classifies images, and `python -m
alexnet_jax.train ... --init-from {name}` starts training from these weights.

## Accuracy

| views | test accuracy, these files | the run itself, float32 |
|---|---|---|
{rows}

All 10,000 test images, one network (seed {seed}), measured on {date}: {machine}, Python {python}, JAX {jax}. A view is
a mirrored or shifted copy of the image; the probabilities of all views are averaged. The test images were not used for
any choice: the recipe was chosen on 10,000 of the training images, and this network was not selected among seeds.

## Training

`python train.py {preset} --seed {seed}`: {epochs} epochs ({steps:,} updates) over {train:,} images, batch size
{batch_size}. `config.json` has every setting, `metrics.jsonl` the training curve. The parameters are {average}stored in
float16; `open_run` checks the SHA-256 of each file (`manifest.json`) and returns float32.

Data: {source}.

## Limits

- It knows ten classes and gives each image one of them, whatever the image shows. The probabilities of images unlike
  CIFAR-10's mean nothing.
- Images of other sizes are scaled to 32x32 pixels, where small objects disappear.
- A baseline for research and teaching. CIFAR-10's images were taken from the web, from the 80 Million Tiny Images
  data set, which its authors withdrew in 2020 for its offensive categories; the ten classes of CIFAR-10 were labelled
  anew by hand. The biases of this network were not examined.

## Licence

The parameters have the licence of alexnet_jax (Apache 2.0). CIFAR-10 was published without a licence, for research;
none of its images is contained here. Cite A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Make the folder of a network that comes with the package."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run, train.py's --workdir."""
    name: Annotated[str, pydantic.Field(pattern="^[a-z0-9-]+$")]
    """Name of the network, for `open_run`."""
    source: str
    """What the training images are, for dataset.json and the card."""
    data_dir: Path | None = None
    """Where the data is now, if it has moved since the training."""


def write_files(run: Run, name: str, source: str) -> RunFolder:
    """The small folder of a run, without the paths of the machine that trained it."""
    folder = RunFolder(shipped.FOLDER / name)
    if folder.path.exists():
        raise UsageError(f"{folder.path} exists already: delete it first")
    folder.path.mkdir(parents=True)
    config = json.loads(run.folder.config.read_bytes())  # with the versions of the training
    write_atomically(folder.config, to_bytes(config | {"data_dir": None, "workdir": f"runs/{name}"}))
    write_atomically(folder.dataset, to_bytes(dataclasses.asdict(run.dataset) | {"source": source}))
    shutil.copy(run.folder.statistics, folder.statistics)
    shutil.copy(run.folder.metrics, folder.metrics)
    shipped.write(folder, run.step, run.params)
    return folder


def accuracies(options: Options, run: pathlib.Path) -> list[float]:
    """Test accuracy with each number of views."""
    devices = select_devices(1)
    configs = [EvalConfig(run=run, data_dir=options.data_dir, split="test", views=views) for views in VIEWS]
    return [evaluate_task(open_task(run, config), config, devices).results["accuracy"] for config in configs]


def card(run: Run, name: str, machine: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The model card."""
    config = run.config
    text = CARD.format(
        name=name,
        classes=", ".join(run.class_names),
        preset=config.preset,
        rows="\n".join(
            f"| {views} | {one:.2%} | {two:.2%} |" for views, one, two in zip(VIEWS, ours, theirs, strict=True)
        ),
        seed=config.schedule.seed,
        date=datetime.date.today().isoformat(),
        machine=machine,
        python=versions()["python"],
        jax=versions()["jax"],
        epochs=config.schedule.epochs,
        steps=run.step,
        train=run.dataset.counts["train"],
        batch_size=config.schedule.batch_size,
        average="a moving average over the last updates, " if config.optimizer.average_decay else "",
        source=run.dataset.source,
    )
    parts = re.split(r"(```.*?```)", text.strip(), flags=re.DOTALL)  # every second one is code
    parts[::2] = ["\n\n".join(map(_wrapped, part.split("\n\n"))) for part in parts[::2]]
    return "".join(parts) + "\n"


def _wrapped(paragraph: str) -> str:
    """A paragraph of text in lines of at most 120 characters; anything else unchanged."""
    is_text = paragraph[:1].isalpha() or re.match("`[^`]", paragraph)
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False) if is_text else paragraph


def main(args: Sequence[str]) -> None:
    """Writes the files, evaluates them and the run, writes the card."""
    options = cli.parse(Options, args, "ship.py")
    machine = describe_device()["name"]
    runtime.devices()
    run = open_run(options.run)
    theirs = accuracies(options, options.run)
    folder = write_files(run, options.name, options.source)
    try:
        ours = accuracies(options, folder.path)
        text = card(open_run(folder.path), options.name, machine, ours, theirs)
        write_atomically(folder.path / "README.md", text.encode())
    except BaseException:  # also Ctrl-C: the package has no half-made network
        shutil.rmtree(folder.path)
        raise
    print(text)


if __name__ == "__main__":
    cli.run(main)

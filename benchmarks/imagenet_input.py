"""Throughput of the ImageNet input: `python benchmarks/imagenet_input.py --images TAR_OR_DIR --out FILE.json`.

Preparation on one core, alternating with PIL and torchvision's transforms (both decode, scale the shorter side to 256,
take the central 256x256 and encode a JPEG of quality 95); streaming from JPEG and raw shards, with threads and with
worker processes. TAR_OR_DIR contains `train/<class>/*.JPEG`.
"""

import argparse
import contextlib
import io
import json
import pathlib
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable

import PIL.Image

from alexnet_jax.data import prepare
from alexnet_jax.data.dataset import Placement
from alexnet_jax.data.decode import central_square, decode
from alexnet_jax.data.records import encode_record
from alexnet_jax.data.streamed import open_prepared
from alexnet_jax.runs.folder import versions

BATCH = 100


def prepare_image(data: bytes) -> int:
    """Prepares an image as `prepare` does."""
    pixels = central_square(decode(data), 256)
    return len(encode_record(pixels, 0, "", "jpeg"))


def torchvision_preparation() -> Callable[[bytes], int]:
    """Does the same with PIL and torchvision's transforms."""
    from torchvision import transforms

    square = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(256),
        ]
    )

    def work(data: bytes) -> int:
        buffer = io.BytesIO()
        square(PIL.Image.open(io.BytesIO(data)).convert("RGB")).save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.tell()

    return work


def rate(work: Callable[[bytes], int], files: list[bytes]) -> float:
    """Images per second, one after another."""
    begin = time.perf_counter()
    for data in files:
        work(data)
    return len(files) / (time.perf_counter() - begin)


def preparation(files: list[bytes], rounds: int) -> dict[str, object]:
    """Images per second of both programs, which take turns."""
    programs: dict[str, Callable[[bytes], int]] = {"alexnet_jax": prepare_image}
    with contextlib.suppress(ImportError):
        programs["torchvision"] = torchvision_preparation()
    rates: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, work in programs.items():
            rates[name].append(rate(work, files))
    result: dict[str, object] = {name: spread(values) for name, values in rates.items()}
    if "torchvision" in rates:
        pairs = zip(rates["alexnet_jax"], rates["torchvision"], strict=True)
        result["ratio"] = spread([a / b for a, b in pairs])
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    found = {"median": statistics.median(values), "least": min(values), "largest": max(values)}
    return {name: round(value, 3 if value < 10 else 1) for name, value in found.items()}


def streaming(source: pathlib.Path, folder: pathlib.Path, rounds: int) -> dict[str, dict[str, float]]:
    """Images per second from `StreamedDataset.calls`, including the start of threads and processes."""
    results = {}
    for store in ("jpeg", "raw"):
        out = folder / store
        prepare.prepare(prepare.PrepareConfig(source, out, store="jpeg" if store == "jpeg" else "raw"))
        for workers in (0, 1, 2):
            dataset = open_prepared(out, workers)
            rates = []
            for epoch in range(rounds):
                begin, count = time.perf_counter(), 0
                for batch in dataset.calls(0, epoch, BATCH, Placement(1, slice(None)), 0, lambda batch: 1):
                    count += int(batch.mask.sum())
                rates.append(count / (time.perf_counter() - begin))
            results[f"{store}, {f'{workers} processes' if workers else 'threads'}"] = spread(rates)
    return results


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = arguments.images
        if source.is_file():
            with tarfile.open(source) as tar:
                tar.extractall(pathlib.Path(temporary) / "source", filter="data")
            source = pathlib.Path(temporary) / "source"
        files = [path.read_bytes() for path in sorted(source.glob("train/*/*"))]
        figures = {
            "images": len(files),
            "rounds": arguments.rounds,
            "preparation_images_per_second_and_core": preparation(files, arguments.rounds),
            "streaming_images_per_second": streaming(source, pathlib.Path(temporary), arguments.rounds),
        }
    named = versions() | {"pillow": PIL.__version__}
    with contextlib.suppress(ImportError):
        import torchvision

        named["torchvision"] = torchvision.__version__
    report = {"command": "python benchmarks/imagenet_input.py", "figures": figures, "system": platform.platform()}
    arguments.out.write_text(json.dumps(report | {"versions": named}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

"""ImageNet, once: `python -m alexnet_jax.prepare imagenet --source DIR --out DIR`.

Every picture becomes a square of 256x256 (paper, section 2) in array_record shards; the training pictures' mean image
and PCA basis are measured on the way, exactly. A killed preparation goes on where it stopped.

    OUT/train-00000-of-01282.array_record ..    records of `pictures.encode`
    OUT/statistics.npz                          mean image and PCA basis of the training pictures
    OUT/skipped.jsonl                           files that are no pictures, with the reason
    OUT/dataset.json                            what is there; written last: its presence says that all is
    OUT/.work/                                  what each finished shard contributed; removed at the end
"""

import concurrent.futures
import csv
import dataclasses
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import tqdm

from alexnet_jax import cli, pictures
from alexnet_jax.config import Path, PositiveInt, shown, validate
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.files import sync, to_bytes, write_atomically

RECORDS_PER_SHARD = 1000
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION = "LOC_val_solution.csv"
SUFFIXES = (".jpeg", ".jpg", ".png")
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Prepare ImageNet for training.

    --source is a folder with one of: `train/<class>/*.JPEG` and `val/` (in class folders, or flat with the devkit or
    LOC_val_solution.csv beside it); the official tar files; TFDS's `imagenet2012`, prepared as array_record.
    """

    source: Path
    """Folder that holds ImageNet."""
    out: Path
    """Folder to write to: new, or of a preparation that was stopped."""
    workers: PositiveInt | None = None
    """Processes. Unset: as many as there are cores. Does not change the result."""
    size: PositiveInt = 256
    """Side of the squares."""
    store: Literal["jpeg", "raw"] = "jpeg"
    """`jpeg`: quality 95; `raw`: the pixels, which takes some 5 times the room and a fifth of the time to read."""


class Picture(NamedTuple):
    """Where a picture's bytes lie.

    Attributes:
      name: for a person.
      label: class index.
      path: of the file; of a tar; of a folder of TFDS.
      offset: in bytes; of TFDS, which example.
      length: in bytes; 0 for all of the file; -1 for TFDS.
    """

    name: str
    label: int
    path: str
    offset: int = 0
    length: int = 0


class Source(NamedTuple):
    """What was found.

    Attributes:
      kind: for a person.
      wnids: name of each class, sorted: their order is the classes' order.
      words: what a class is called, where that is known.
      splits: pictures of "train" and, if there are any, "validation", in order.
    """

    kind: str
    wnids: list[str]
    words: dict[str, str]
    splits: dict[str, list[Picture]]


def find(source: pathlib.Path) -> Source:
    """Lists the pictures of a source.

    Raises:
      AlexNetError: it holds nothing known, or no labels for its validation pictures.
    """
    if not source.is_dir():
        raise AlexNetError(f"{source}: there is no such folder")
    if list(source.glob("*.array_record*")):
        return _find_tfds(source)
    if (source / TRAIN_TAR).exists():
        return _find_tars(source)
    if (source / "train").is_dir():
        return _find_folders(source)
    raise AlexNetError(f"{source} holds neither train/, nor {TRAIN_TAR}, nor array_record files of TFDS's imagenet2012")


def _find_folders(source: pathlib.Path) -> Source:
    def pictures_in(folder: pathlib.Path) -> list[pathlib.Path]:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)

    def by_class(folder: pathlib.Path, wnids: Sequence[str]) -> list[Picture]:
        return [
            Picture(path.relative_to(source).as_posix(), label, str(path))
            for label, wnid in enumerate(wnids)
            if (folder / wnid).is_dir()
            for path in pictures_in(folder / wnid)
        ]

    wnids = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())
    if not wnids:
        raise AlexNetError(f"{source / 'train'} has no folders of classes")
    splits = {"train": by_class(source / "train", wnids)}
    truth = _ground_truth(source, wnids)
    for name in ("val", "validation"):
        folder = source / name
        if folder.is_dir():
            flat = pictures_in(folder)
            if unknown := [p.name for p in folder.iterdir() if p.is_dir() and p.name not in wnids]:
                raise AlexNetError(f"{folder / min(unknown)}: there is no such class in {source / 'train'}")
            files = [Picture(path.relative_to(source).as_posix(), -1, str(path)) for path in flat]
            splits["validation"] = _labelled(files, truth, folder) if flat else by_class(folder, wnids)
            break
    return Source("image folder", wnids, truth.words, {name: found for name, found in splits.items() if found})


def _find_tars(source: pathlib.Path) -> Source:
    def members(path: pathlib.Path, name: str, start: int, file: io.BufferedReader) -> Iterator[Picture]:
        """The pictures of a tar that begins at `start` of a file."""
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    yield Picture(f"{name}{member.name}", -1, str(path), member.offset_data, member.size)

    try:
        with (source / TRAIN_TAR).open("rb") as file:
            with tarfile.open(fileobj=file, mode="r:") as outer:
                classes = sorted((m.name.removesuffix(".tar"), m.offset_data) for m in outer if m.name.endswith(".tar"))
            wnids = [wnid for wnid, _ in classes]
            train = [
                picture._replace(label=label)
                for label, (wnid, start) in enumerate(classes)
                for picture in sorted(members(source / TRAIN_TAR, f"{wnid}/", start, file))
            ]
        truth, splits = _ground_truth(source, wnids), {"train": train}
        path = source / VALIDATION_TAR
        if path.exists():
            with path.open("rb") as file:
                splits["validation"] = _labelled(sorted(members(path, "", 0, file)), truth, path)
    except tarfile.TarError as error:
        raise AlexNetError(f"{source}: a tar file can't be read ({error})") from error
    return Source("official tar files", wnids, truth.words, splits)


def _find_tfds(source: pathlib.Path) -> Source:
    builder = _tfds_builder(str(source))
    wnids = list(builder.info.features["label"].names)
    splits = {}
    for name in SPLITS:
        if name in builder.info.splits:
            examples = _tfds_examples(str(source), name)
            # The label is part of the example: it is read with the picture.
            splits[name] = [Picture(f"{name}/{i}", -1, f"{source}/{name}", i, -1) for i in range(len(examples))]
    return Source("TFDS imagenet2012", wnids, {}, splits)


class Truth(NamedTuple):
    """What is known of the classes and the validation pictures beside the pictures.

    Attributes:
      words: what each class is called.
      labels: class index of each validation file's stem.
      ordered: class indices of the validation files in the order of their names.
    """

    words: dict[str, str]
    labels: dict[str, int]
    ordered: list[int]


def _ground_truth(source: pathlib.Path, wnids: Sequence[str]) -> Truth:
    """From the devkit (folder or tar.gz) or Kaggle's solution file, if one is there."""
    index = {wnid: label for label, wnid in enumerate(wnids)}
    words, labels, ordered = {}, {}, []
    try:
        if (source / SOLUTION).exists():
            with (source / SOLUTION).open(newline="") as file:
                for row in csv.DictReader(file):
                    labels[row["ImageId"]] = index[row["PredictionString"].split()[0]]
        if files := _devkit_files(source):
            import scipy.io

            meta, text = files
            synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
            leaves = {int(s["ILSVRC2012_ID"]): s for s in synsets if int(s["num_children"]) == 0}
            words = {str(s["WNID"]): str(s["words"]) for s in leaves.values()}
            # The devkit numbers classes in an order of its own.
            ordered = [index[str(leaves[int(number)]["WNID"])] for number in text.split()]
    except (KeyError, ValueError, TypeError, OSError, NotImplementedError) as error:
        raise AlexNetError(
            f"{source}: the validation labels can't be read ({type(error).__name__}: {error})"
        ) from error
    return Truth(words, labels, ordered)


def _devkit_files(source: pathlib.Path) -> tuple[bytes, bytes] | None:
    names = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    folder, archive = source / DEVKIT / "data", source / f"{DEVKIT}.tar.gz"
    if folder.is_dir():
        meta, text = ((folder / name).read_bytes() for name in names)
        return meta, text
    if archive.exists():
        found: dict[str, bytes] = {}
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.name.endswith(names) else None
                    if file is not None:
                        found[member.name.rsplit("/", 1)[-1]] = file.read()
        except (tarfile.TarError, EOFError) as error:
            raise AlexNetError(f"{archive}: can't be read ({error})") from error
        return found[names[0]], found[names[1]]
    return None


def _labelled(files: list[Picture], truth: Truth, where: pathlib.Path) -> list[Picture]:
    stems = [pathlib.PurePosixPath(picture.name).stem for picture in files]
    if truth.labels and all(stem in truth.labels for stem in stems):
        return [picture._replace(label=truth.labels[stem]) for picture, stem in zip(files, stems, strict=True)]
    if truth.ordered:
        if len(truth.ordered) != len(files):
            raise AlexNetError(f"{where} has {len(files):,} pictures, the devkit {len(truth.ordered):,} labels")
        return [picture._replace(label=label) for picture, label in zip(files, truth.ordered, strict=True)]
    raise AlexNetError(f"{where}: no labels for its pictures: put {DEVKIT}.tar.gz or {SOLUTION} beside it")


def _tfds_builder(folder: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # of many kinds
        raise AlexNetError(f"{folder}: TFDS can't read it ({shown(str(error).splitlines()[0], 200)})") from error


def _tfds_examples(folder: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    builder = _tfds_builder(folder)
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


class Shard(NamedTuple):
    """A shard to be written.

    Attributes:
      name: of its file.
      pictures: that go into it.
      size, store: as in PrepareConfig.
      measured: whether sums of pixels are needed.
    """

    name: str
    pictures: Sequence[Picture]
    size: int
    store: str
    measured: bool


def write_shard(out: str, shard: Shard) -> None:
    """Writes a shard, then what it contributes to `.work/`: that this file is there says that the shard is whole."""
    from array_record.python import array_record_module

    folder = pathlib.Path(out)
    temporary = folder / ".work" / f"{shard.name}.tmp"
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    total = np.zeros((shard.size, shard.size, 3), np.int64)
    products, count, skipped = np.zeros((3, 3), np.int64), 0, []
    for picture in shard.pictures:
        try:
            data, label = _bytes_of(picture)
            pixels = pictures.central_square(pictures.decode(data), shard.size)
        except (pictures.PictureError, OSError) as error:
            skipped.append({"file": picture.name, "reason": str(error)})
        else:
            record = pictures.encode(pixels, label, picture.name, shard.store)
            writer.write(record)
            if shard.measured:
                # Of the pixels that training will see.
                stored = pictures.read(record, shard.size)[0].astype(np.int64)
                total += stored
                rows = stored.reshape(-1, 3).astype(np.float64)  # whole numbers: exact up to 2^53
                products += (rows.T @ rows).astype(np.int64)
            count += 1
        if _progress is not None:
            with _progress.get_lock():
                _progress.value += 1
    writer.close()
    sync(temporary)
    contents = temporary.read_bytes()
    summary = {
        "name": shard.name,
        "records": count,
        "bytes": len(contents),
        "sha256": hashlib.sha256(contents).hexdigest(),
        "skipped": skipped,
    }
    temporary.replace(folder / shard.name)
    sync(folder)
    sums = io.BytesIO()
    np.savez(sums, total=total, products=products, summary=json.dumps(summary))
    write_atomically(folder / ".work" / f"{shard.name}.npz", sums.getvalue())


def _bytes_of(picture: Picture) -> tuple[bytes, int]:
    if picture.length < 0:
        folder, split = picture.path.rsplit("/", 1)
        if picture.path not in _tfds_sources:
            _tfds_sources[picture.path] = _tfds_examples(folder, split)
        example = _tfds_sources[picture.path][picture.offset]
        return bytes(example["image"]), int(example["label"])
    with open(picture.path, "rb") as file:
        file.seek(picture.offset)
        return file.read(picture.length or -1), picture.label


# Of a worker process.
_progress: Any = None
_tfds_sources: dict[str, Any] = {}


def _begin_worker(progress: Any) -> None:
    """Counts pictures in `progress`; leaves Ctrl-C to the parent, and goes when that does, however it ended."""
    global _progress
    _progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Does all of it; returns what dataset.json holds.

    Raises:
      UsageError: `out` holds something else, or a preparation of something else.
      AlexNetError: the source can't be used, or `out` not be written.
    """
    out = config.out
    if (out / "dataset.json").exists():
        raise UsageError(f"--out {out} is prepared already; choose another folder")
    source = find(config.source)
    work = out / ".work"
    plan = {
        "size": config.size,
        "store": config.store,
        "pictures": hashlib.sha256(json.dumps([source.wnids, source.splits]).encode()).hexdigest(),
    }
    try:
        if out.exists() and any(out.iterdir()) and not work.is_dir():
            raise UsageError(f"--out {out} is not empty: choose another folder")
        work.mkdir(parents=True, exist_ok=True)
        if (work / "plan.json").exists() and json.loads((work / "plan.json").read_bytes()) != plan:
            raise UsageError(f"--out {out} holds a stopped preparation with other settings or pictures: delete it")
        write_atomically(work / "plan.json", to_bytes(plan))
        shards = {split: list(_shards(split, found, config)) for split, found in source.splits.items()}
        _write_shards([shard for group in shards.values() for shard in group], config)
        return _finish(source, shards, config)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise AlexNetError(f"{out}: the preparation can't go on ({reason})") from error


def _shards(split: str, found: Sequence[Picture], config: PrepareConfig) -> Iterator[Shard]:
    count = -(-len(found) // RECORDS_PER_SHARD)
    for number in range(count):
        part = found[number * RECORDS_PER_SHARD : (number + 1) * RECORDS_PER_SHARD]
        name = f"{split}-{number:05d}-of-{count:05d}.array_record"
        yield Shard(name, part, config.size, config.store, measured=split == "train")


def _write_shards(shards: Sequence[Shard], config: PrepareConfig) -> None:
    """Writes those that are missing, in as many processes as wanted, with a bar."""
    out = config.out
    missing = [s for s in shards if not ((out / s.name).exists() and (out / ".work" / f"{s.name}.npz").exists())]
    there = sum(len(s.pictures) for s in shards) - sum(len(s.pictures) for s in missing)
    context = multiprocessing.get_context("spawn")
    progress = context.Value("q", 0)
    workers = min(config.workers or len(os.sched_getaffinity(0)), max(len(missing), 1))
    bar = tqdm.tqdm(
        total=there + sum(len(s.pictures) for s in missing), initial=there, unit=" images", disable=None, smoothing=0.05
    )
    with (
        bar,
        concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (progress,)) as pool,
    ):
        futures = [pool.submit(write_shard, str(out), shard) for shard in missing]
        try:
            while not all(future.done() for future in futures):
                concurrent.futures.wait(futures, 0.2, concurrent.futures.FIRST_EXCEPTION)
                bar.update(there + progress.value - bar.n)
                for future in futures:
                    if future.done() and future.exception() is not None:
                        future.result()
                time.sleep(0.05)
            bar.update(there + progress.value - bar.n)
            for future in futures:
                future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise AlexNetError(f"{out}: a worker process died; the same command goes on") from error
        finally:
            for future in futures:
                future.cancel()


def _finish(source: Source, shards: dict[str, list[Shard]], config: PrepareConfig) -> dict[str, Any]:
    """Adds up what the shards contribute, writes what describes the whole."""
    from alexnet_jax.augment import basis_from_sums

    out, work = config.out, config.out / ".work"
    total = np.zeros((config.size, config.size, 3), np.int64)
    products = np.zeros((3, 3), np.int64)
    summaries: dict[str, list[dict[str, Any]]] = {}
    for split, group in shards.items():
        summaries[split] = []
        for shard in group:
            with np.load(work / f"{shard.name}.npz") as sums:
                total += sums["total"]
                products += sums["products"]
                summaries[split].append(json.loads(str(sums["summary"])))
    counts = {split: sum(s["records"] for s in group) for split, group in summaries.items()}
    skipped = [{"split": split} | entry for split, group in summaries.items() for s in group for entry in s["skipped"]]
    if not counts["train"]:
        raise AlexNetError(f"{config.source}: none of its {len(skipped):,} training files is a picture")
    basis = basis_from_sums(counts["train"] * config.size**2, total.sum(axis=(0, 1)), products)
    arrays = io.BytesIO()
    np.savez(arrays, mean_image=(total / counts["train"]).astype(np.float32), **vars(basis))
    write_atomically(out / "statistics.npz", arrays.getvalue())
    write_atomically(out / "skipped.jsonl", "".join(json.dumps(entry) + "\n" for entry in skipped).encode())
    files = {
        split: [{key: s[key] for key in ("name", "records", "bytes", "sha256")} for s in group]
        for split, group in summaries.items()
    }
    hashes = "".join(s["sha256"] for group in files.values() for s in group)
    description = {
        "name": "imagenet",
        "source": source.kind,
        "size": config.size,
        "store": config.store,
        "classes": [f"{source.words[w]} ({w})" if w in source.words else w for w in source.wnids],
        "counts": counts,
        "skipped": len(skipped),
        "fingerprint": hashlib.sha256(hashes.encode()).hexdigest(),
        "shards": files,
    }
    write_atomically(out / "dataset.json", to_bytes(description))
    shutil.rmtree(work)
    print(f"{out}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()) + " images")
    deviations = ", ".join(f"{value:.2f}" for value in np.sqrt(basis.eigenvalues))
    print(f"mean colour {', '.join(f'{v:.2f}' for v in basis.mean)}; PCA standard deviations {deviations} grey levels")
    if skipped:
        print(f"{len(skipped):,} files were skipped: {out / 'skipped.jsonl'} says which and why")
    return description


def main(args: Sequence[str]) -> None:
    """Parses the flags, prepares."""
    if not args or args[0] != "imagenet":
        if args and args[0] in ("-h", "--help"):
            cli.parse(PrepareConfig, ["--help"], "prepare imagenet", PrepareConfig.__doc__ or "")
        raise UsageError("which data set? python -m alexnet_jax.prepare imagenet --help")
    config = cli.parse(PrepareConfig, args[1:], "prepare imagenet", PrepareConfig.__doc__ or "")
    prepare(validate(config))


if __name__ == "__main__":
    # Not as __main__: worker processes must find what they are sent by the module's own name.
    from alexnet_jax import prepare as module

    cli.run(module.main)

"""ImageNet, once: `python -m alexnet_jax.prepare imagenet --source DIR --out DIR`.

Every picture becomes a square of 256x256 (paper, section 2) in array_record shards; the training pictures' mean image
and PCA basis are measured on the way, exactly. A killed preparation goes on where it stopped.

    OUT/train-00000-of-01282.array_record ..    records of `pictures.encode`
    OUT/statistics.npz                          mean image and PCA basis of the training pictures
    OUT/skipped.jsonl                           files that are no pictures, with the reason
    OUT/dataset.json                            what is there; written last: its presence says that all is
    OUT/.work/                                  what each finished shard contributed; removed at the end
    OUT/prepare.lock                            locked while a process works there
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
import re
import shutil
import signal
import tarfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import tqdm

from alexnet_jax import cli, pictures
from alexnet_jax.config import Path, PositiveInt, shown, validate
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError
from alexnet_jax.files import locked, sync, to_bytes, write_atomically
from alexnet_jax.runtime import available_cores, require_array_record
from alexnet_jax.signals import StopSignals

RECORDS_PER_SHARD = 1000
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"  # Kaggle's
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Prepare ImageNet for training.

    --source is a folder with one of: `train/<class>/*.JPEG` and `val/` (in class folders, or flat); the official tar
    files; TFDS's `imagenet2012`, prepared as array_record. The same command again goes on where one was stopped.
    """

    source: Path
    """Folder that holds ImageNet."""
    out: Path
    """Folder to write to: new, or of a preparation that was stopped."""
    labels: Path | None = None
    """Folder with the devkit (ILSVRC2012_devkit_t12, folder or .tar.gz) or Kaggle's LOC_val_solution.csv: the classes
    of validation pictures that lie in no class folders, and what classes are called. Unset: --source."""
    workers: PositiveInt | None = None
    """Processes. Unset: as many as there are cores. Does not change the result."""
    size: PositiveInt = 256
    """Side of the squares."""
    store: Literal["jpeg", "raw"] = "jpeg"
    """`jpeg`: quality 95; `raw`: the pixels, which takes some 5 times the room and a quarter of the time to read."""


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
      outside: files beside the folders of classes, of each split; they are in no class, and listed as skipped.
    """

    kind: str
    wnids: list[str]
    words: dict[str, str]
    splits: dict[str, list[Picture]]
    outside: dict[str, list[str]]


def find(source: pathlib.Path, labels: pathlib.Path | None = None) -> Source:
    """Lists the pictures of a source; `labels` is as in PrepareConfig.

    Every file counts as one that does not begin with a dot: whether it is a picture shows when it is read.

    Raises:
      AlexNetError: it holds nothing known, or no labels for its validation pictures.
    """
    labels = source if labels is None else labels
    for place in (source, labels):
        if not place.is_dir():
            raise AlexNetError(f"{place}: there is no such folder")
    try:
        if (source / TRAIN_TAR).exists():
            return _find_tars(source, labels)
        if (source / "train").is_dir():
            return _find_folders(source, labels)
        if (folder := _tfds_folder(source)) is not None:
            return _find_tfds(folder)
    except OSError as error:
        raise AlexNetError(f"{error.filename or source}: can't be read ({error.strerror or error})") from error
    raise AlexNetError(f"{source} holds neither train/, nor {TRAIN_TAR}, nor TFDS's imagenet2012")


def _find_folders(source: pathlib.Path, labels: pathlib.Path) -> Source:
    def visible(folder: pathlib.Path) -> list[pathlib.Path]:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))

    def to_pictures(paths: Sequence[pathlib.Path], label: int) -> list[Picture]:
        return [Picture(path.relative_to(source).as_posix(), label, str(path)) for path in paths]

    def by_class(folder: pathlib.Path, wnids: Sequence[str]) -> list[Picture]:
        found = [to_pictures(visible(folder / w), label) for label, w in enumerate(wnids) if (folder / w).is_dir()]
        return [picture for pictures_of_class in found for picture in pictures_of_class]

    def outside(folder: pathlib.Path) -> list[pathlib.Path]:
        return [path for path in visible(folder) if not path.is_dir()]

    wnids = [path.name for path in visible(source / "train") if path.is_dir()]
    if not wnids:
        raise AlexNetError(f"{source / 'train'} has no folders of classes")
    splits, strays = {"train": by_class(source / "train", wnids)}, {"train": outside(source / "train")}
    truth = _ground_truth(labels, wnids)
    for name in ("val", "validation"):
        folder = source / name
        if folder.is_dir():
            folders = [path.name for path in visible(folder) if path.is_dir()]
            if unknown := set(folders) - set(wnids):
                raise AlexNetError(f"{folder / min(unknown)}: there is no such class in {source / 'train'}")
            if folders:
                splits["validation"], strays["validation"] = by_class(folder, wnids), outside(folder)
            else:
                splits["validation"] = _labelled(to_pictures(outside(folder), -1), truth, folder)
            break
    return Source(
        "image folder",
        wnids,
        truth.words,
        {name: found for name, found in splits.items() if found},
        {name: [path.relative_to(source).as_posix() for path in paths] for name, paths in strays.items()},
    )


def _find_tars(source: pathlib.Path, labels: pathlib.Path) -> Source:
    def files(path: pathlib.Path, file: io.BufferedReader, start: int, end: int) -> list[tarfile.TarInfo]:
        """The files of a tar in bytes [start, end) of a file; its members' offsets are from that file's beginning."""
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
        # tarfile takes a damaged member's place, and a cut between two members, for the end.
        blocks = -(-members[-1].size // tarfile.BLOCKSIZE) if members else 0
        mark = members[-1].offset_data + blocks * tarfile.BLOCKSIZE if members else start
        file.seek(mark)
        if file.read(2 * tarfile.BLOCKSIZE) != tarfile.NUL * 2 * tarfile.BLOCKSIZE or file.tell() > end:
            after = f"after {shown(members[-1].name)}" if members else "at its beginning"
            raise AlexNetError(f"{path}: the tar is damaged or was cut off {after}")
        return sorted((member for member in members if member.isfile()), key=lambda member: member.name)

    def to_picture(path: pathlib.Path, name: str, label: int, member: tarfile.TarInfo) -> Picture:
        return Picture(name, label, str(path), member.offset_data, member.size)

    path = source / TRAIN_TAR
    try:
        with path.open("rb") as file:
            outer = files(path, file, 0, path.stat().st_size)
            wnids = [pathlib.PurePosixPath(member.name).stem for member in outer]
            train = [
                to_picture(path, f"{wnid}/{member.name}", label, member)
                for label, (wnid, tar) in enumerate(zip(wnids, outer, strict=True))
                for member in files(path, file, tar.offset_data, tar.offset_data + tar.size)
            ]
        truth, splits = _ground_truth(labels, wnids), {"train": train}
        path = source / VALIDATION_TAR
        if path.exists():
            with path.open("rb") as file:
                found = files(path, file, 0, path.stat().st_size)
                splits["validation"] = _labelled([to_picture(path, m.name, -1, m) for m in found], truth, path)
    except tarfile.TarError as error:
        raise AlexNetError(f"{path}: can't be read ({error})") from error
    return Source("official tar files", wnids, truth.words, splits, {})


def _tfds_folder(source: pathlib.Path) -> pathlib.Path | None:
    """`source`, or the newest version below it, or below `imagenet2012` in it."""
    found = [
        path.parent for place in ("", "*/", "imagenet2012/*/") for path in source.glob(f"{place}dataset_info.json")
    ]
    return max(found, key=lambda folder: [int(n) for n in re.findall("[0-9]+", folder.name)], default=None)


def _find_tfds(source: pathlib.Path) -> Source:
    builder = _tfds_builder(str(source))
    if builder.info.file_format.value != "array_record":
        raise AlexNetError(f"{source}: prepared as {builder.info.file_format.value}, not as array_record")
    wnids = list(builder.info.features["label"].names)
    splits = {}
    for name in SPLITS:
        if name in builder.info.splits:
            examples = _tfds_examples(str(source), name)
            # The label is part of the example: it is read with the picture.
            splits[name] = [Picture(f"{name}/{i}", -1, f"{source}/{name}", i, -1) for i in range(len(examples))]
    return Source("TFDS imagenet2012", wnids, {}, splits, {})


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
    """From the devkit (folder or tar.gz) or Kaggle's files, if they are there."""
    index = {wnid: label for label, wnid in enumerate(wnids)}
    words, labels, ordered = {}, {}, []
    try:
        if (source / MAPPING).exists():
            lines = (source / MAPPING).read_text().splitlines()
            words = {wnid: text for wnid, _, text in (line.partition(" ") for line in lines)}
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
    except (LookupError, ValueError, TypeError, AttributeError, OSError, NotImplementedError, csv.Error) as error:
        reason = shown(f"{type(error).__name__}: {error}", 200)
        raise AlexNetError(f"{source}: the validation labels can't be read ({reason})") from error
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
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise AlexNetError(f"{archive}: can't be read ({shown(' '.join(str(error).split()), 200)})") from error
        if missing := set(names) - set(found):
            raise AlexNetError(f"{archive}: there is no {min(missing)} in it")
        return found[names[0]], found[names[1]]
    return None


def _labelled(files: list[Picture], truth: Truth, where: pathlib.Path) -> list[Picture]:
    if truth.labels:
        stems = [pathlib.PurePosixPath(picture.name).stem for picture in files]
        if unknown := set(stems) - set(truth.labels):
            raise AlexNetError(f"{where}: {SOLUTION} has no class for {shown(min(unknown))}")
        return [picture._replace(label=truth.labels[stem]) for picture, stem in zip(files, stems, strict=True)]
    if truth.ordered:
        if len(truth.ordered) != len(files):
            raise AlexNetError(f"{where} has {len(files):,} pictures, the devkit {len(truth.ordered):,} labels")
        return [picture._replace(label=label) for picture, label in zip(files, truth.ordered, strict=True)]
    raise AlexNetError(f"{where}: no labels for its pictures: --labels needs a folder with {DEVKIT} or {SOLUTION}")


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
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # JPEG does not shrink
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
      AlexNetError: the source can't be used, or `out` not be written; or array_record is not installed.
    """
    require_array_record()
    out = config.out
    source = find(config.source, config.labels)
    work, lock = out / ".work", out / "prepare.lock"
    plan = {
        "size": config.size,
        "store": config.store,
        "pictures": hashlib.sha256(json.dumps([source.wnids, source.splits]).encode()).hexdigest(),
    }
    try:
        if out.exists() and any(out.iterdir()) and not lock.exists():
            raise UsageError(f"--out {out} is not empty: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        with locked(lock, "prepares pictures there; wait for it, or choose another --out"):
            if (out / "dataset.json").exists():
                raise UsageError(f"--out {out} is prepared already; choose another folder")
            work.mkdir(exist_ok=True)
            if (work / "plan.json").exists() and json.loads((work / "plan.json").read_bytes()) != plan:
                raise UsageError(f"--out {out} holds a stopped preparation with other settings or pictures: delete it")
            write_atomically(work / "plan.json", to_bytes(plan))
            shards = {split: list(_shards(split, found, config)) for split, found in source.splits.items()}
            stopped = _write_shards([shard for group in shards.values() for shard in group], config)
            if stopped is not None:
                raise StoppedError(stopped, "stopped; the same command goes on")
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


def _write_shards(shards: Sequence[Shard], config: PrepareConfig) -> int | None:
    """Writes those that are missing, in as many processes as wanted, with a bar.

    Returns:
      The number of the signal that ended it, after the shards that were begun; None if all are written.
    """
    out = config.out
    missing = [shard for shard in shards if not _is_finished(out, shard)]
    there = sum(len(s.pictures) for s in shards) - sum(len(s.pictures) for s in missing)
    context = multiprocessing.get_context("spawn")
    progress = context.Value("q", 0)
    workers = min(config.workers or available_cores(), max(len(missing), 1))
    bar = tqdm.tqdm(
        total=there + sum(len(s.pictures) for s in missing), initial=there, unit=" images", disable=None, smoothing=0.05
    )
    with (
        StopSignals() as signals,
        bar,
        concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (progress,)) as pool,
    ):
        futures = [pool.submit(write_shard, str(out), shard) for shard in missing]
        try:
            running = set(futures)
            while signals.received is None and running:
                done, running = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_COMPLETED)
                bar.update(there + progress.value - bar.n)
                for future in done:
                    future.result()  # raises what ended it
        except concurrent.futures.process.BrokenProcessPool as error:
            raise AlexNetError(f"{out}: a worker was killed (is memory short?); the same command goes on") from error
        finally:
            for future in futures:
                future.cancel()
    return signals.received


def _is_finished(out: pathlib.Path, shard: Shard) -> bool:
    try:
        length = _summary(out / ".work" / f"{shard.name}.npz")["bytes"]
        return bool((out / shard.name).stat().st_size == length)
    except Exception:  # it is not there, or a damaged archive, which raises errors of many kinds
        return False


def _summary(contribution: pathlib.Path) -> dict[str, Any]:
    with np.load(contribution) as arrays:
        summary: dict[str, Any] = json.loads(str(arrays["summary"]))
    return summary


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
            contribution = work / f"{shard.name}.npz"
            summaries[split].append(_summary(contribution))
            with np.load(contribution) as sums:
                total += sums["total"]
                products += sums["products"]
    counts = {split: sum(s["records"] for s in group) for split, group in summaries.items()}
    skipped = [{"split": split} | entry for split, group in summaries.items() for s in group for entry in s["skipped"]]
    reason = "it lies in no folder of a class"
    skipped += [{"split": split, "file": n, "reason": reason} for split, names in source.outside.items() for n in names]
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
    config = validate(cli.parse(PrepareConfig, args[1:], "prepare imagenet", PrepareConfig.__doc__ or ""))
    prepare(config)


if __name__ == "__main__":
    # Not as __main__: worker processes must find what they are sent by the module's own name.
    from alexnet_jax import prepare as module

    cli.run(module.main)

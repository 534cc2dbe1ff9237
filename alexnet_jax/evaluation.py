"""What eval.py does: a run on a split, several runs side by side, a run on a person's own pictures."""

import collections
import dataclasses
import io
import itertools
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from alexnet_jax import batches, pictures, plots, processes, runtime, steps, terminal
from alexnet_jax.config import EvalConfig, shown
from alexnet_jax.datasets import Dataset, ImageNet, load
from alexnet_jax.errors import AlexNetError, UsageError, warn
from alexnet_jax.files import read_bytes, to_bytes, write_atomically, write_together
from alexnet_jax.metrics import (
    Record,
    calibration,
    confusion_matrix,
    cross_entropies,
    mcnemar,
    read_jsonl,
    softmax,
    top_k_correct,
)
from alexnet_jax.run import Run, open_run, versions

MOST_CLASSES_PRINTED = 30
MOST_PICTURES_DRAWN = 60  # on the sheet; beyond, it is no longer looked at
MOST_NAMED = 3  # files that are skipped for the same reason
TOP = 5  # classes told of a picture


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A run and the images that it is to be asked about.

    Attributes:
      run: the opened run.
      dataset: the data.
      split: its name.
    """

    run: Run
    dataset: Dataset | ImageNet
    split: str

    def has_same_images(self, other: "Question") -> bool:
        """Whether both ask about the same images in the same order."""
        if self.split != other.split or self.run.class_names != other.run.class_names:
            return False
        if isinstance(self.dataset, Dataset) and isinstance(other.dataset, Dataset):
            mine, others = self.dataset[self.split], other.dataset[other.split]
            return np.array_equal(mine.labels, others.labels) and np.array_equal(mine.images, others.images)
        return self.dataset.fingerprint() == other.dataset.fingerprint()


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation(Question):
    """What a run's network answered on every image of the split.

    Attributes:
      logits: float32 [N, classes]; with several views logarithms of their mean probabilities.
      labels: int [N].
      results: what `eval/<split>.json` holds.
    """

    logits: np.ndarray
    labels: np.ndarray
    results: dict[str, Any]


def main(config: EvalConfig) -> None:
    """Does what the flags of eval.py ask for.

    Raises:
      UsageError: flags contradict each other.
      AlexNetError: a run, its data or a picture can't be read, or nothing can be written.
    """
    if config.images == ():
        raise UsageError("--images needs pictures, or folders of them")
    if config.images and (config.others or config.report or config.split or config.data_dir):
        raise UsageError("--images goes with one run, and not with --report, --split or --data-dir")
    if config.others and config.report:
        raise UsageError("--report is about one run; to compare several, leave it out")
    if config.images:
        predict_pictures(config)
    elif config.others:
        compare(config)
    else:
        evaluate(config)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Evaluates a run on a split, prints a table, writes the results to `out`, and with `report` a page of them.

    Returns:
      What `eval/<split>.json` holds.

    Raises:
      AlexNetError: the run or its data can't be read, or the data is not the run's.
    """
    runtime.cache_compilations(config.compilation_cache)
    devices = steps.select_devices(config.num_devices)
    question = _opened(config.run, config)
    run, name = question.run, question.split
    records = read_jsonl(run.folder.metrics) if config.report else []
    folder = _results_folder(run, config)
    evaluation = _answered(question, config, devices)
    results = evaluation.results
    written = None
    try:
        if folder is not None:
            write_together(folder, _evaluation_files(evaluation))
            written = folder
    finally:
        print_results(results, written)
    if config.report and folder is not None:
        from alexnet_jax import report  # not before: plotly takes long to import

        page = folder / f"report{_suffix(name)}.html"
        write_atomically(page, report.page(evaluation, records).encode())
        print(f"report in {page}")
    return results


def _results_folder(run: Run, config: EvalConfig) -> pathlib.Path | None:
    """The folder for results; None, with a warning, where the run's folder can't be written.

    Raises:
      AlexNetError: the same, and a report is wanted.
    """
    if config.out is not None:
        return config.out
    existing = next(place for place in (run.folder.eval, run.folder.path) if place.exists())
    if os.access(existing, os.W_OK | os.X_OK):
        return run.folder.eval
    remedy = "give another folder with --out"
    if config.report:
        raise AlexNetError(f"{existing} can't be written: {remedy}")
    warn(f"{existing} can't be written, so the results are only printed: to keep them, {remedy}")
    return None


def _suffix(split: str) -> str:
    """What the names of a split's files end with: nothing for the test images."""
    return "" if split == "test" else f"-{split}"


def _evaluation_files(evaluation: Evaluation) -> dict[str, bytes]:
    """Contents of the files of an evaluation by name; the results come last."""
    run, results, suffix = evaluation.run, evaluation.results, _suffix(evaluation.split)
    predictions = io.BytesIO()
    np.savez_compressed(
        predictions,
        probabilities=softmax(evaluation.logits),
        predicted=evaluation.logits.argmax(axis=1),
        labels=evaluation.labels,
    )
    matrix = np.array(results["confusion"])
    title = f"{evaluation.split}: {results['correct']:,} of {results['count']:,} correct ({results['accuracy']:.2%})"
    return {
        f"predictions{suffix}.npz": predictions.getvalue(),
        f"confusion{suffix}.png": plots.to_png(plots.confusion_matrix(matrix, run.class_names, title)),
        "kernels.png": plots.to_png(plots.kernels(run.params["conv1"]["kernel"])),
        f"{evaluation.split}.json": to_bytes(results),
    }


def _opened(path: pathlib.Path, config: EvalConfig) -> Question:
    """Opens a run and its data, and checks that they go with the flags."""
    run = open_run(path, config.checkpoint)
    _check_views(run, config)
    dataset = _load_data(run, config)
    if dataset.fingerprint() != run.dataset.fingerprint:
        raise AlexNetError(f"{path} was trained on other images than those from {dataset.source}")
    name = config.split or ("test" if "test" in dataset.splits else "validation")
    dataset[name]  # raises if there is none
    return Question(run, dataset, name)


def _load_data(run: Run, config: EvalConfig) -> Dataset | ImageNet:
    """The run's data from --data-dir, or from where it was in training."""
    place = run.config.data.data_dir
    if config.data_dir is not None:
        return load(dataclasses.replace(run.config.data, data_dir=config.data_dir))
    try:
        return load(run.config.data)
    except AlexNetError as error:
        if place is None:
            raise
        lost = f"{run.folder.path}: the run's data was in {place} ({error})"
        raise AlexNetError(f"{lost}: where is it now? Give --data-dir") from error


def _answered(question: Question, config: EvalConfig, devices: Sequence[jax.Device]) -> Evaluation:
    """Predicts and scores."""
    run, dataset, name = question.run, question.dataset, question.split
    logits, labels = predict_split(
        steps.make_predict_step(run.model, run.preprocessing, devices, config.views),
        steps.replicate(run.params, devices),
        dataset,
        name,
        config.batch_size,
        len(devices),
        run.config.data.loader_workers,
    )
    results = score(logits, labels, run.class_names) | {
        "split": name,
        "views": config.views,
        "step": run.step,
        "checkpoint": config.checkpoint,
        "dataset": dataset.name,
        "source": dataset.source,
        "versions": versions(),
    }
    return Evaluation(run, dataset, name, logits, labels, results)


def _check_views(run: Run, config: EvalConfig) -> None:
    augmentation = run.config.augmentation
    if config.views == 10 and not (augmentation.crop_size or augmentation.crop_padding):
        raise UsageError(f"--views 10: {run.folder.path} was trained without crops; 2 adds the mirrored images")


def compare(config: EvalConfig) -> list[dict[str, Any]]:
    """Evaluates several runs on the same images, prints a table, writes `eval/comparison.json` and `.png` of the first.

    Each run is tested against the first by McNemar's test on the images that only one of the two has right. With more
    than two runs the p-values are Holm's, which hold for all of them together.

    Returns:
      One row a run, as in the file.

    Raises:
      AlexNetError: a run or its data can't be read, or they were not asked about the same images.
    """
    runtime.cache_compilations(config.compilation_cache)
    devices = steps.select_devices(config.num_devices)
    paths = [config.run, *config.others]
    questions: list[Question] = []
    for path in paths:
        question = _opened(path, config)
        first = (questions or [question])[0]
        if not first.has_same_images(question):
            raise AlexNetError(f"{paths[0]} and {path} can't be compared: they have other images or classes")
        questions.append(dataclasses.replace(question, dataset=first.dataset))  # one copy of the images will do
    histories = [read_jsonl(question.run.folder.metrics) for question in questions]
    folder = _results_folder(questions[0].run, config)
    evaluations = [
        _answered(question, config, devices)
        for question in tqdm.tqdm(questions, desc="runs", leave=False, disable=None)
    ]
    names = _shortest_names(paths)
    right = [evaluation.logits.argmax(axis=1) == evaluation.labels for evaluation in evaluations]
    tests = [mcnemar(right[0], other) for other in right[1:]]
    adjusted = iter(_holm([test.p_value for test in tests]))
    rows = []
    for path, name, evaluation, test in zip(paths, names, evaluations, [None, *tests], strict=True):
        rows.append(
            {
                "run": str(path),
                "name": name,
                "preset": evaluation.run.config.preset,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(evaluation.run.params)),
                **{key: evaluation.results[key] for key in ("split", "views", "step", "count", "accuracy")},
                **{key: evaluation.results[key] for key in ("top5_accuracy", "loss", "calibration_error")},
                "against_first": None if test is None else dataclasses.asdict(test) | {"p_holm": next(adjusted)},
            }
        )
    records = dict(zip(names, histories, strict=True))
    steps_per_epoch = {
        name: batches.steps_per_epoch(e.run.dataset.counts["train"], e.run.config.schedule.batch_size)
        for name, e in zip(names, evaluations, strict=True)
    }
    written = None
    try:
        if folder is not None:
            curves = plots.to_png(plots.compared_curves(records, steps_per_epoch))
            described = to_bytes({"runs": rows, "versions": versions()})
            write_together(folder, {"comparison.png": curves, "comparison.json": described})
            written = folder
    finally:
        print_comparison(rows, written)
    return rows


def _shortest_names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The last parts of each path, as many as tell them apart; a path that stands there twice gets numbers."""
    parts = [path.absolute().parts[1:] for path in paths]
    count = 1
    while len({part[-count:] for part in parts}) < len(set(parts)):
        count += 1
    names = ["/".join(part[-count:]) for part in parts]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: the i-th smallest of m is multiplied by m - i + 1, and none falls below a smaller one."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def print_comparison(rows: Sequence[Record], folder: pathlib.Path | None) -> None:
    """Prints a comparison."""
    width = max(len("run"), *(len(row["name"]) for row in rows))
    views = f", {rows[0]['views']} views" if rows[0]["views"] > 1 else ""
    print(f"{rows[0]['count']:,} {rows[0]['split']} images{views}; differences from the first run in points\n")
    print(
        f"{'run':<{width}}  accuracy  cross entropy  calibration error      step  "
        "difference (95% interval)   right alone       p"
    )
    for row in rows:
        line = (
            f"{row['name']:<{width}}  {row['accuracy']:8.2%}  {row['loss']:13.4f}  {row['calibration_error']:17.2%}  "
            f"{row['step']:8,}"
        )
        if test := row["against_first"]:
            low, high = (100 * bound for bound in test["interval"])
            difference = f"{100 * test['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
            alone = f"{test['second_only']:,} : {test['first_only']:,}"
            p_value = "<1e-4" if test["p_holm"] < 1e-4 else f"{test['p_holm']:.4f}"
            line += f"  {difference:>25}  {alone:>12}  {p_value:>6}"
        print(line)
    print(
        "\nright alone: images that only this run has right : only the first. p: McNemar's exact test on these"
        + (",\nadjusted by Holm for several runs (the intervals are not)" if len(rows) > 2 else "")
        + ". It says whether these networks\ndiffer; whether their recipes do, only several seeds can say."
        + (f"\ndetails and curves in {folder}" if folder is not None else "")
    )


def predict_pictures(config: EvalConfig) -> list[dict[str, Any]]:
    """Classifies a person's pictures, prints the top 5 of each, writes `eval/images.json` and `.png`.

    Each is turned as its EXIF note says, laid on white where it is transparent, cut to its central square and scaled
    to the size of the run's images.

    Returns:
      One row a picture, as in the file.

    Raises:
      AlexNetError: pictures can't be read: after all others were done, and each was named.
    """
    runtime.cache_compilations(config.compilation_cache)
    devices = steps.select_devices(config.num_devices)
    run = open_run(config.run, config.checkpoint)
    _check_views(run, config)
    folder = _results_folder(run, config)
    predict_step = steps.make_predict_step(run.model, run.preprocessing, devices, config.views)
    params = steps.replicate(run.params, devices)
    paths, broken = _find_pictures(config.images or ())
    batch_size = min(config.batch_size, max(len(paths), 1))
    read = _read_pictures(paths, run.dataset.image_shape[0], broken)
    rows: list[dict[str, Any]] = []
    drawn: list[np.ndarray] = []
    with tqdm.tqdm(total=len(paths), unit=" pictures", leave=False, disable=None) as bar:
        while part := list(itertools.islice(read, batch_size)):
            images = np.stack([pixels for _, pixels in part])
            logits = steps.predict_logits(predict_step, params, images, batch_size, len(devices))
            for (path, pixels), probabilities in zip(part, softmax(logits), strict=True):
                best = np.argsort(-probabilities, kind="stable")[:TOP]
                top = [{"class": run.class_names[i], "probability": float(probabilities[i])} for i in best]
                rows.append({"file": str(path), "top": top})
                if len(drawn) < MOST_PICTURES_DRAWN:
                    drawn.append(pixels)
                bar.clear()
                print_prediction(rows[-1])
            bar.update(len(part))
    if rows and folder is not None:
        described = {"step": run.step, "views": config.views, "versions": versions(), "images": rows}
        names = [shown(pathlib.Path(row["file"]).name) for row in rows[: len(drawn)]]
        tops = [[(entry["class"], entry["probability"]) for entry in row["top"]] for row in rows[: len(drawn)]]
        sheet = plots.to_png(plots.predictions(np.stack(drawn), names, tops))
        write_together(folder, {"images.png": sheet, "images.json": to_bytes(described)})
        left = f" (the first {len(drawn)} of {len(rows):,})" if len(rows) > len(drawn) else ""
        print(f"sheet of pictures{left} in {folder / 'images.png'}, all predictions in {folder / 'images.json'}")
    if broken:
        of = f"{len(broken)} of {len(rows) + len(broken):,}"
        raise AlexNetError(f"{of} could not be read as a picture; the first is {shown(str(broken[0]), 300)}")
    return rows


def _find_pictures(paths: Sequence[pathlib.Path]) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Files named, and in folders those that look like pictures, in order; and what can't be read, which is reported.

    Other files in the folders are counted; what systems leave there (`pictures.is_litter`) is ignored.
    """
    found: list[pathlib.Path] = []
    broken: list[pathlib.Path] = []
    others: list[pathlib.Path] = []

    def unreadable(error: OSError) -> None:
        path = pathlib.Path(error.filename)
        warn(f"skipped {shown(str(path), 300)}: {error.strerror or error}")
        broken.append(path)

    for path in paths:
        try:
            if not stat.S_ISDIR(path.stat().st_mode):
                found.append(path)
                continue
        except OSError as error:
            unreadable(error)
            continue
        before = len(found) + len(broken)
        for file in pictures.files_in(path, unreadable):
            (found if pictures.looks_like_picture(file) else others).append(file)
        if len(found) + len(broken) == before:
            unreadable(OSError(None, "there is no picture in this folder", str(path)))
    if others:
        names = ", ".join(shown(path.name) for path in others[:MOST_NAMED]) + ", ..." * (len(others) > MOST_NAMED)
        are = "other file is no picture" if len(others) == 1 else "other files are no pictures"
        warn(f"{len(others):,} {are} ({names})")
    return found, broken


def _read_pictures(
    paths: Sequence[pathlib.Path], size: int, broken: list[pathlib.Path]
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Each picture as uint8 [size, size, 3]; reports those that can't be read, and adds them to `broken`."""
    reasons: collections.Counter[str] = collections.Counter()
    for path in paths:
        try:
            picture = pictures.decode(read_bytes(path, pictures.MAX_BYTES), as_seen=True)
        except (pictures.PictureError, OSError) as error:
            reason = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
            reasons[reason] += 1
            if reasons[reason] <= MOST_NAMED:  # a phone's folder may hold hundreds of one kind
                warn(f"skipped {shown(str(path), 300)}: {reason}")
            broken.append(path)
            continue
        yield path, pictures.central_square(picture, size)
    for reason, count in reasons.items():
        if count > MOST_NAMED:
            warn(f"skipped {count - MOST_NAMED:,} more: {reason}")


def print_prediction(row: Record) -> None:
    """Prints the most probable classes of a picture for a person."""
    width = max(len(entry["class"]) for entry in row["top"])
    print(shown(row["file"], 300))
    for entry in row["top"]:
        print(f"  {entry['class']:>{width}}  {entry['probability']:6.1%}  {terminal.bar(entry['probability'])}")


def predict_split(
    predict_step: Callable[[Any, np.ndarray], jax.Array],
    params: Any,
    dataset: Dataset | ImageNet,
    split: str,
    batch_size: int,
    num_devices: int,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, float32 [N, classes], and labels, int [N], of every image of a split once, in order.

    Args:
      predict_step: from `steps.make_predict_step`.
      params: replicated over the devices.
      dataset: has the split.
      split: its name.
      batch_size: images a step (of streamed images, in all processes); rounded up to a multiple of the devices.
      num_devices: of this process, that the step runs on. Each of several processes predicts a share.
      workers: processes that decode, if the images are streamed.
    """
    share = process, count = jax.process_index(), jax.process_count()
    if isinstance(dataset, Dataset):
        images, labels = dataset[split].images, dataset[split].labels
        each = -(-len(labels) // count)
        own = np.minimum(
            np.arange(process * each, (process + 1) * each), len(labels) - 1
        )  # what is too many comes last
        own_images = images if count == 1 else images[own]
        logits = steps.predict_logits(predict_step, params, own_images, batch_size, num_devices)
        return processes.gathered(logits)[: len(labels)], labels
    batch_size = -(-batch_size // (num_devices * count)) * num_devices * count
    parts = []
    for batch in tqdm.tqdm(
        dataset.stream(split, 0, None, batch_size, num_devices, share=share, workers=workers),
        total=-(-len(dataset[split]) // batch_size),
        desc=split,
        leave=False,
        disable=None if process == 0 else True,
    ):
        parts.append((jax.device_get(predict_step(params, batch.images)), batch.labels, batch.mask))
    # [devices, batches, ...] of each process, and with those of the others between batches and devices.
    all_logits, all_labels, mask = (
        processes.gathered(np.stack(arrays, axis=1)).swapaxes(0, 1) for arrays in zip(*parts, strict=True)
    )
    return all_logits[mask], all_labels[mask]


def score(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Exact counts and means over examples.

    Args:
      logits: float32 [N, classes].
      labels: int [N].
      class_names: name of each class.

    Returns:
      JSON-ready: accuracy, top5_accuracy (the label is among the five largest logits), loss (mean cross entropy, nats),
      calibration_error (see `metrics.calibration`), count, correct, per_class, confusion (row = true class).
    """
    matrix = confusion_matrix(labels, logits.argmax(axis=1), len(class_names))
    correct, counts = matrix.diagonal(), matrix.sum(axis=1)
    return {
        "accuracy": int(correct.sum()) / len(labels),
        "top5_accuracy": int(top_k_correct(logits, labels, 5)) / len(labels),
        "loss": float(cross_entropies(logits, labels).mean()),
        "calibration_error": calibration(softmax(logits).max(axis=1), logits.argmax(axis=1) == labels).error,
        "count": len(labels),
        "correct": int(correct.sum()),
        "per_class": [
            {"class": name, "count": int(n), "correct": int(c), "accuracy": int(c) / int(n) if n else None}
            for name, n, c in zip(class_names, counts, correct, strict=True)
        ],
        "confusion": matrix.tolist(),
    }


def print_results(results: Record, folder: pathlib.Path | None) -> None:
    """Prints an evaluation."""
    rows = [row for row in results["per_class"] if row["count"]]
    if len(rows) > MOST_CLASSES_PRINTED:
        rows = sorted(rows, key=lambda row: -row["accuracy"])
        rows = rows[: MOST_CLASSES_PRINTED // 2] + rows[-MOST_CLASSES_PRINTED // 2 :]
        print(f"The {len(rows) // 2} best and the {len(rows) // 2} worst of {len(results['per_class'])} classes:")
    width = max(len(row["class"]) for row in rows)
    for row in rows:
        accuracy = row["accuracy"] or 0.0
        print(f"{row['class']:>{width}}  {accuracy:7.2%}  {terminal.bar(accuracy)}")
    print(f"\n{results['split']} accuracy: {results['accuracy']:.4f} ({results['correct']:,} of {results['count']:,})")
    print(f"top-5 accuracy: {results['top5_accuracy']:.4f}, mean cross entropy: {results['loss']:.4f}")
    print(f"step {results['step']:,}" + (f"; details and pictures in {folder}" if folder is not None else ""))

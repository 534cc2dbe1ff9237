"""Runs every command in the README and the documentation unchanged: `python -m tests.stress.commands`.

A long training run is stopped by SIGTERM after a while, and must save and exit with 143; a long measurement likewise,
once it has shown that it works. Everything happens in a copy of the repository, whose `runs/` and `results/` go with
it. `--data-dir` names a folder of CIFAR-10; without it, drawn shapes stand in for it.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator

import markdown_it
import numpy as np
import PIL.Image
import tqdm

from tests.stress import results_file

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/README.md", "results/README.md")
PROGRAM = re.compile(r"(\w+=\S+\s+)*(python|pip|pytest|ruff|mypy|pre-commit|sphinx-build|jupyter)\s\S")

MODULES = {"sphinx-build": "sphinx", "pre-commit": "pre_commit"}  # programs whose modules have other names
TEST_COMMAND = "ruff format --check"
LONG = ("tests.stress", "benchmarks/", "CIFAR10_DIR")  # stopped like trainings, if they take long


def commands(root: pathlib.Path = ROOT) -> dict[str, str]:
    """Every command in a shell block or in backticks, without its comment, and the page where it comes first."""
    found: dict[str, str] = {}
    parser = markdown_it.MarkdownIt("commonmark").enable("table")
    for page in sorted(path for pattern in PAGES for path in root.glob(pattern)):
        for token in parser.parse(page.read_text()):
            lines: list[str] = []
            if token.type == "fence" and token.info.strip() in ("", "bash", "sh", "console"):
                lines = re.sub(r"\\\n\s*", "", token.content).splitlines()  # a command may take several lines
            elif token.type == "inline":
                lines = [child.content for child in token.children or () if child.type == "code_inline"]
            for line in lines:
                line = re.sub(r"\s+#.*", "", line).strip()
                if PROGRAM.match(line):
                    found.setdefault(line, page.relative_to(root).as_posix())
    return found


def steps(command: str) -> Iterator[list[str]]:
    """The programs of a command line, one after another, as words."""
    words: list[str] = []
    for word in shlex.split(command):
        if word == "&&":
            yield words
            words = []
        else:
            words.append(word)
    yield words


def elsewhere(words: list[str]) -> str | None:
    """Who runs this program, if not this script."""
    if words[0] == "pip":
        return "the environment that this script runs in was made by such a line; .ci/run makes one with the extra test"
    if "--distributed" in words:
        return "several at once: tests/test_processes.py"
    return "this script" if "tests.stress.commands" in words else None


class Place:
    """A copy of the repository, and what the placeholders in commands stand for."""

    def __init__(self, folder: pathlib.Path, data_dir: pathlib.Path | None) -> None:
        self.root, self.data_dir = folder / "repository", data_dir
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        for name in files.stdout.split("\n"):
            if name and (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.root / name)
        subprocess.run(["git", "init", "--quiet"], cwd=self.root, check=True)  # for `pre-commit install`
        self.pictures, self.tar = folder / "imagenet", folder / "imagenet.tar"
        self._draw_imagenet()
        self.words = {
            "PREPARED": str(folder / "prepared"),
            "RUN": "runs/quickstart",
            "STUDY": "tips",
            "TAR": str(self.tar),
            "FILE": str(folder / "out.json"),
            "...": str(folder / "out.json"),
            "photo.png": str(next(self.pictures.rglob("*.JPEG"))),
            "pictures/": str(self.pictures / "val"),
        }

    def _draw_imagenet(self) -> None:
        """An image folder with 10 classes in `train` and `val`, larger than 256 pixels, and a tar of its first half."""
        rng = np.random.default_rng(0)
        for split, count in (("train", 30), ("val", 5)):
            for label in range(10):
                folder = self.pictures / split / f"n{label:08d}"
                folder.mkdir(parents=True)
                for number in range(count):
                    coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
                    picture = PIL.Image.fromarray(coarse).resize((400, 300), PIL.Image.Resampling.BICUBIC)
                    picture.save(folder / f"{number}.JPEG", quality=90)
        with tarfile.open(self.tar, "w") as tar:
            tar.add(self.pictures / "train", "train")

    def fill(self, words: list[str]) -> list[str]:
        """Replaces placeholders by existing files, and puts data where CIFAR-10 would be downloaded."""
        filled = [self.words.get(word, word) for word in words if not re.match(r"\w+=", word)]
        if filled[0] == "python":
            filled[0] = sys.executable
        elif filled[0] != "jupyter":
            filled[:1] = [sys.executable, "-m", MODULES.get(filled[0], filled[0])]
        script, shapes = filled[1], ["--dataset", "shapes"]
        data = ["--data-dir", str(self.data_dir)] if self.data_dir else shapes if script == "train.py" else []
        if "DIR" in filled and "imagenet" in filled:
            filled[filled.index("DIR")] = str(self.pictures)
        elif "DIR" in filled:
            place = filled.index("DIR")
            filled[place - 1 : place + 1] = data
        elif script == "benchmarks/ablate.py" or (script == "train.py" and not {"--help", "quickstart"} & set(filled)):
            filled += [] if any("imagenet" in word for word in filled) else data
        # Settings that differ can't share a folder. Without any it is the preset's, which other commands name.
        settings = [word for word in words[2:] if word.startswith("--") and word not in ("--data-dir", "--help")]
        if script == "train.py" and settings and "--workdir" not in words:
            filled += ["--workdir", "runs/" + re.sub(r"\W+", "-", " ".join(words[2:]))]
        return filled


def run(words: list[str], place: Place, seconds: float, settings: dict[str, str]) -> tuple[int, float, bool, str]:
    """Runs a program, stops it after so many seconds; returns exit code, seconds, if it was stopped, last lines."""
    finished = place.root / "runs" / "quickstart"  # for the notebook; without it, the shipped network
    environment = os.environ | settings | {"ALEXNET_JAX_DATA": str(place.data_dir or "")}
    environment |= {"ALEXNET_JAX_RUN": str(finished), "ALEXNET_JAX_DATA": ""} if finished.exists() else {}
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            words, cwd=place.root, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            process.wait(seconds)
            stopped = False
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
        output.seek(0)
        return process.returncode, time.perf_counter() - begin, stopped, "\n".join(output.read().splitlines()[-5:])


def right(words: list[str], code: int, stopped: bool) -> bool:
    """Whether a program ended as it should: on its own with 0, or stopped in the middle of long work."""
    if not stopped:
        return code == 0
    if "train.py" in words:
        return code == 128 + signal.SIGTERM  # it saved
    # pytest answers with 2
    return any(part in " ".join(words) for part in LONG) and code in (-signal.SIGTERM, 128 + signal.SIGTERM, 2)


def main() -> None:
    """Runs all commands, writes the result of each, and exits with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder of CIFAR-10 in a published layout")
    parser.add_argument("--seconds", type=float, default=40, help="after which a long program is stopped")
    parser.add_argument("--only", default="", help="part of the commands to run again")
    options = parser.parse_args()
    chosen = {command: page for command, page in commands().items() if options.only in command}
    # What others need comes first: runs/quickstart, the prepared ImageNet, then what trains before what evaluates.
    order = sorted(chosen, key=lambda c: ("train.py quickstart" not in c, "prepare" not in c, "train.py" not in c))
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(pathlib.Path(folder), options.data_dir and options.data_dir.absolute())
        for command in tqdm.tqdm(order, unit=" commands"):
            programs: list[dict[str, object]] = []
            rows.append({"command": command, "page": chosen[command], "programs": programs})
            if TEST_COMMAND in command:
                programs.append({"elsewhere": ".ci/run, on two versions of Python"})
                continue
            for words in steps(command):
                if reason := elsewhere(words):
                    programs.append({"elsewhere": reason})
                    continue
                settings = dict(word.split("=", 1) for word in words if re.match(r"\w+=", word))
                settings = {name: str(place.data_dir or "") for name in settings}  # there is only CIFAR10_DIR=DIR
                filled = place.fill(words)
                is_long = any(part in command for part in LONG) or ("train.py" in words and "quickstart" not in words)
                limit = options.seconds if is_long else 600
                code, seconds, stopped, last = run(filled, place, limit, settings)
                programs.append({"seconds": round(seconds, 1), "code": code, "stopped": stopped})
                if not right(filled + list(settings), code, stopped):
                    failed.append(command)
                    tqdm.tqdm.write(f"{command}\n  ended with {code} after {seconds:.0f} s:\n{last}")
    data = "CIFAR-10 (JPEG-coded copy)" if options.data_dir else "drawn shapes in the place of CIFAR-10"
    if options.only:  # takes the places of these rows in the file that there is
        before = json.loads((results_file.FOLDER / "stress-commands.json").read_text())["figures"]
        again = {row["command"]: row for row in rows}
        rows = [again.get(row["command"], row) for row in before["rows"]]
        failed += [command for command in before["failed"] if command not in again]
    figures = {"commands": len(rows), "failed": failed, "data": data, "rows": rows}
    results_file.write(
        "commands", f"python -m tests.stress.commands --data-dir DIR --seconds {options.seconds:g}", figures
    )
    if failed:
        sys.exit(f"{len(failed)} of {len(rows)} failed")


if __name__ == "__main__":
    main()

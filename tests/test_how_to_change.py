"""docs/how-to-change.md: each diff applies to the repository, and what it adds trains and has an effect."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.config.settings import AugmentationConfig
from tests import changed_copy

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to-change.md").read_text("utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}


def diff_of(name):
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", SECTIONS[name], re.MULTILINE | re.DOTALL)
    return diff


def apply(diff, copy):
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}  # the copy is in no repository
    command = ["git", "apply", "--verbose", "-"]
    return subprocess.run(command, cwd=copy, env=environment, input=diff, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path.resolve() / "copy"
    shutil.copytree(ROOT / "alexnet_jax", folder / "alexnet_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("train.py", "eval.py"):
        shutil.copy(ROOT / file, folder)
    return folder


def test_every_example_is_run():
    assert changed_copy.EXAMPLES.keys() == {name for name in SECTIONS if "```diff" in SECTIONS[name]}


@pytest.mark.parametrize("name", changed_copy.EXAMPLES)
def test_the_table_counts_the_lines(name):
    lines = diff_of(name).splitlines()
    files = [line.removeprefix("+++ b/alexnet_jax/") for line in lines if line.startswith("+++")]
    added, removed = (
        sum(re.match(rf"\{sign}(?!\{sign}\{sign} )", line) is not None for line in lines) for sign in "+-"
    )
    anchor = name.lower().replace(" ", "-")
    row = f"| [{name}](#{anchor}) | {', '.join(f'`{file}`' for file in files)} | {added} | {removed} |"
    assert row in PAGE.splitlines(), row


@pytest.mark.parametrize("name", changed_copy.EXAMPLES)
def test_examples_apply_train_and_have_an_effect(name, copy, tiny):
    applied = apply(diff_of(name), copy)
    assert applied.returncode == 0, applied.stderr
    images = tiny["train"].images[:30]
    keys = jax.random.split(jax.random.key(1), (len(images), 6))
    augmentation = AugmentationConfig(crop_padding=4, flip=True, pca="dataset-std")
    inputs = Preprocessing(augmentation, tiny.statistics(), 1).training(keys, images, jnp.int32(0))
    np.savez(copy / "before.npz", images=images, inputs=inputs)
    (command,) = re.findall(r"^\$ (python train\.py .*)$", SECTIONS[name], re.MULTILINE)
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "changed_copy.py", name, command],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(copy), str(ROOT)))},  # `tests` is not copied
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_diff_that_no_longer_applies_is_found(copy):
    settings = copy / "alexnet_jax" / "config" / "settings.py"
    settings.write_text(settings.read_text("utf-8").replace("Side to which images are", "Side of images when"), "utf-8")
    failed = apply(diff_of("A new augmentation"), copy)
    assert failed.returncode == 1
    assert "alexnet_jax/config/settings.py: patch does not apply" in failed.stderr

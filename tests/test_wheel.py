"""What `pip wheel` makes works outside the repository: the commands, and the trained network."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with only the installed wheel, whose dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "wheels", ROOT], check=True
    )
    (wheel,) = (folder / "wheels").iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "packages", wheel], check=True)
    return folder / "packages"


def run(installed, cwd, *command):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_trained_network_classifies(installed, tmp_path):
    PIL.Image.fromarray(np.full((50, 60, 3), [90, 140, 220], np.uint8)).save(tmp_path / "photo.png")
    done = run(installed, tmp_path, "-m", "alexnet_jax.eval", "cifar10-best", "--images", "photo.png", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "photo.png"
    assert (tmp_path / "out" / "images.json").is_file()
    where = run(installed, tmp_path, "-c", "import alexnet_jax; print(alexnet_jax.__file__)").stdout
    assert pathlib.Path(where.strip()).is_relative_to(installed)


def test_the_training_command_is_there_and_names_itself(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "alexnet_jax.train", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: train.py [PRESET] [FLAGS]")
    refused = run(installed, tmp_path, "-m", "alexnet_jax.train", "cifar10", "--data-dir", "nothing")
    assert refused.returncode == 1
    assert refused.stderr.startswith("python -m alexnet_jax.train: ")

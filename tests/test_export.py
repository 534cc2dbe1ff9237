"""Networks taken elsewhere predict the same."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_loop import make_config

import alexnet_jax
from alexnet_jax import export, loop
from alexnet_jax.errors import AlexNetError, UsageError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    loop.train_and_evaluate(make_config(workdir, 1), tiny)
    return workdir


@pytest.mark.parametrize("form", ["safetensors", "stablehlo"])
def test_what_is_exported_predicts_the_same(workdir, tiny, tmp_path, form):
    path = export.save(export.ExportConfig(workdir, form, tmp_path / "model"))
    exported, run = export.load(path), alexnet_jax.open_run(workdir)
    assert exported.class_names == run.class_names
    for count in (1, 3, 7):
        images = tiny["test"].images[:count]
        np.testing.assert_allclose(exported.predict(images), run.predict(images), atol=2e-6)
    np.testing.assert_allclose(exported.predict(images / 255), run.predict(images), atol=2e-6)
    with pytest.raises(ValueError, match=r"images must be \[N, 32, 32, 3\]"):
        exported.predict(images[0])


def test_the_function_needs_nothing_of_ours(workdir, tiny, tmp_path):
    path = export.save(export.ExportConfig(workdir, "stablehlo", tmp_path / "model.bin"))
    np.save(tmp_path / "images.npy", tiny["test"].images[:5])
    program = (
        "import sys, numpy as np; from jax import export\n"
        "function = export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))\n"
        "np.save(sys.argv[3], function.call(np.load(sys.argv[2])))\n"
        "assert not any(name.startswith('alexnet_jax') for name in sys.modules)\n"
    )
    files = [str(path), str(tmp_path / "images.npy"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", program, *files], check=True, cwd=tmp_path)
    expected = alexnet_jax.open_run(workdir).predict(tiny["test"].images[:5])
    np.testing.assert_allclose(np.load(files[2]), expected, atol=2e-6)


def test_any_framework_finds_the_weights(workdir, tmp_path):
    path = export.save(export.ExportConfig(workdir, out=tmp_path / "model.safetensors"))
    arrays, params = safetensors.numpy.load_file(path), alexnet_jax.open_run(workdir).params
    assert set(arrays) == {f"{layer}/{kind}" for layer in params for kind in ("kernel", "bias")} | {"mean_image"}
    jax.tree.map(np.testing.assert_array_equal, params, {n: {k: arrays[f"{n}/{k}"] for k in params[n]} for n in params})


def test_nothing_is_overwritten_and_nonsense_is_refused(workdir, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UsageError, match="mine is there already"):
        export.save(export.ExportConfig(workdir, out=tmp_path / "mine"))
    assert (tmp_path / "mine").read_text() == "precious"
    for data in (b"", b"x" * 100, b"\x02" + b"\x00" * 7 + b"{}"):
        (tmp_path / "x").write_bytes(data)
        (tmp_path / "x.json").write_text('{"class_names": [], "image_shape": []}')
        with pytest.raises(AlexNetError, match=r"x: not what alexnet_jax\.export writes"):
            export.load(tmp_path / "x")


def test_the_command(workdir):
    def run(*args):
        command = [sys.executable, "-m", "alexnet_jax.export", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    done = run(str(workdir), "--format", "safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert export.load(workdir / "export" / "model.safetensors").image_shape == (32, 32, 3)
    for args, code in (((str(workdir),), 2), ((str(workdir / "no"),), 1), ((str(workdir), "--checkpoint", "x"), 2)):
        done = run(*args)
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == 1

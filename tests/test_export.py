"""Exported networks make the same predictions."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy

import alexnet_jax
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.exchange import export

pytestmark = pytest.mark.both_lines

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def workdir(tiny_run, tmp_path_factory):
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("runs") / "run")


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


def test_the_layers_are_in_the_order_of_a_checkpoint(workdir, tmp_path):
    path = export.save(export.ExportConfig(workdir, "safetensors", tmp_path / "model"))
    assert list(export.read_run(path).params) == list(alexnet_jax.open_run(workdir).params)


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


def sha256_of(names):
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def test_the_function_refuses_floats_and_says_what_it_takes(workdir, tiny, tmp_path, capsys):
    path = tmp_path / "model.bin"
    export.main([str(workdir), "--format", "stablehlo", "--out", str(path)])
    printed = capsys.readouterr().out
    assert "takes uint8 RGB images [b, H, W, 3], grey levels 0..255 (model.bin.json)" in printed
    assert "six months; to archive the network use --format safetensors" in printed
    described, shape = json.loads((tmp_path / "model.bin.json").read_text()), ["b", 32, 32, 3]
    assert described["input"] == {
        "dtype": "uint8", "shape": shape, "scale": "grey levels 0..255", "layout": "NHWC", "channels": "RGB",
    }  # fmt: skip
    assert described["output"]["shape"] == ["b", 10]
    assert "probabilities" in described["output"]["meaning"]
    assert described["jax"] == jax.__version__
    assert "six months" in described["expires"]
    assert described["class_names_sha256"] == sha256_of(described["class_names"])
    function = jax.export.deserialize(bytearray(path.read_bytes()))
    images = tiny["test"].images[:2]
    for wrong in (images / np.float32(255), images.astype(np.float32), images.astype(np.int32)):
        with pytest.raises(ValueError, match="Dtype mismatch"):
            function.call(wrong)
    exported = export.load(path)
    for wrong in (images.astype(np.float32), images.astype(np.int32), np.full(images.shape, np.nan)):
        with pytest.raises(ValueError, match=r"must be (in \[0, 1\]|uint8)"):
            exported.predict(wrong)
    near = np.clip(images / 255 + 1e-3, 0, 1)  # is rounded to the same grey levels
    np.testing.assert_allclose(exported.predict(near), exported.predict(images), atol=1e-6)


@pytest.fixture
def function(tmp_path):
    """A file with an exported function of images [b, 4, 4, 3], and its description."""

    @jax.jit
    def mean(images):
        return images.mean((1, 2))

    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 4, 4, 3), np.uint8)
    data, names = bytes(jax.export.export(mean)(shape).serialize()), ["a", "b", "c"]
    (tmp_path / "x").write_bytes(data)
    described = {
        "class_names": names, "image_shape": [4, 4, 3], "jax": jax.__version__, "exported": "2025-01-31",
        "sha256": hashlib.sha256(data).hexdigest(), "class_names_sha256": sha256_of(names),
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(described))
    return tmp_path / "x", described


def complaint(path, described, **changes):
    """What `load` says about a file with a changed description."""
    export.description_path(path).write_text(json.dumps(described | changes))
    with pytest.raises(AlexNetError) as error:
        export.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_class_names_that_are_not_the_functions_are_refused(function):
    path, described = function
    assert export.load(path).class_names == ("a", "b", "c")
    for wrong in (["b", "a", "c"], ["a", "b"], ["a", "b", "c", "d"]):
        expected = "class_names in x.json are not those that were exported"
        assert expected in complaint(path, described, class_names=wrong)


def test_a_description_must_be_complete(function):
    path, described = function
    for name in described:
        rest = {key: value for key, value in described.items() if key != name}
        assert f"x.json, which describes it, has no '{name}'" in complaint(path, rest)


def test_a_damaged_function_is_not_taken_for_an_expired_one(function):
    path, described = function
    damaged = bytearray(path.read_bytes())
    at = damaged.index(b"StableHLO_v")
    damaged[at + 30 : at + 90] = bytes(60)
    path.write_bytes(damaged)
    assert "its SHA-256 differs" in complaint(path, described)
    assert "its SHA-256 differs" in complaint(path, described, jax="0.9.0")
    digest = hashlib.sha256(damaged).hexdigest()
    assert f"it can't be read (written by JAX {jax.__version__} on 2025-01-31" in complaint(
        path, described, sha256=digest
    )


def test_an_expired_file_says_so(function, monkeypatch):
    """In JAX's own words, or by the version of JAX that wrote it."""
    path, described = function

    def older(_):
        raise ValueError("Exported being deserialized seems to be older than the 6-month backward-compatibility window")

    def other(_):
        raise ValueError("unknown version")

    archive = "to archive a network use --format safetensors"
    monkeypatch.setattr(jax.export, "deserialize", older)
    assert "x: it has expired (written by JAX 0.9.0 on 2025-01-31; JAX" in complaint(path, described, jax="0.9.0")
    assert archive in complaint(path, described)
    monkeypatch.setattr(jax.export, "deserialize", other)
    assert "it has expired" in complaint(path, described, jax="0.9.0")
    assert "it is from a newer JAX" in complaint(path, described, jax="99.1")


def test_any_framework_finds_the_weights(workdir, tmp_path):
    path = export.save(export.ExportConfig(workdir, out=tmp_path / "model.safetensors"))
    arrays, params = safetensors.numpy.load_file(path), alexnet_jax.open_run(workdir).params
    assert set(arrays) == {f"{layer}/{kind}" for layer in params for kind in ("kernel", "bias")} | {"mean_image"}
    jax.tree.map(np.testing.assert_array_equal, params, {n: {k: arrays[f"{n}/{k}"] for k in params[n]} for n in params})


def rewritten(path, change):
    """An exported file, changed by `change(arrays, metadata)`, with the SHA-256 of its new contents."""
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    arrays = safetensors.numpy.load(data)
    del metadata["sha256"]
    change(arrays, metadata)
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode() + array.tobytes())
    path.write_bytes(safetensors.numpy.save(arrays, metadata | {"sha256": digest.hexdigest()}))
    return path


def without_a_class(arrays, metadata):
    dataset = json.loads(metadata["dataset"])
    metadata["dataset"] = json.dumps(dataset | {"class_names": dataset["class_names"][1:]})


def with_nan_in_the_basis(arrays, metadata):
    metadata["pca_basis"] = json.dumps(json.loads(metadata["pca_basis"]) | {"mean": [float("nan")] * 3})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a, _: a["conv1/kernel"].__setitem__(0, np.nan), "conv1/kernel contains Inf or NaN"),
        (lambda a, _: a.update({"extra": a["conv1/bias"]}), "it has extra, which would not be used"),
        (lambda a, _: a.pop("fc1/bias"), "fc1/bias is missing"),
        (lambda a, _: a.pop("mean_image"), r"mean_image is float64\[0\], but must be floats \[32, 32, 3\]"),
        (lambda a, _: a.update({"fc1/kernel": a["fc1/kernel"].T.copy()}), r"fc1/kernel is float32\[.*but must be"),
        (
            lambda a, _: a.update({"conv1/bias": a["conv1/bias"].astype(np.int32)}),
            r"conv1/bias is int32\[8\], but must be floats",
        ),
        (lambda a, _: a.update({"mean_image": np.zeros((1, 1, 3), np.float32)}), r"mean_image is float32\[1, 1, 3\]"),
        (without_a_class, r"logits/.* is float32\[.*10\], but must be floats \[.*9\]"),
        (with_nan_in_the_basis, "pca_basis mean contains Inf or NaN"),
        (lambda _, m: m.pop("config"), r"alexnet_jax\.exchange\.weights\.load_weights reads torchvision's"),
    ],
)
def test_safetensors_that_do_not_fit_are_refused(workdir, tmp_path, change, expected):
    path = export.save(export.ExportConfig(workdir, out=tmp_path / "x"))
    with pytest.raises(AlexNetError, match=f"x: can't be loaded as an exported network .*{expected}") as error:
        export.load(rewritten(path, change))
    assert "\n" not in str(error.value)


def test_a_flipped_bit_in_safetensors_is_found(workdir, tmp_path):
    path = export.save(export.ExportConfig(workdir, out=tmp_path / "x"))
    data = path.read_bytes()
    name = export.load(path).class_names[0].encode()
    for at in (len(data) - 1, len(data) // 2, data.index(name)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(AlexNetError, match="its SHA-256 differs"):
            export.load(path)
    path.write_bytes(data)
    export.load(rewritten(path, lambda *_: None))


def test_nothing_is_overwritten_and_nonsense_is_refused(workdir, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UsageError, match="mine exists already"):
        export.save(export.ExportConfig(workdir, out=tmp_path / "mine"))
    assert (tmp_path / "mine").read_text() == "precious"
    with pytest.raises(AlexNetError, match=r"no: can't be read \(No such file"):
        export.load(tmp_path / "no")
    (tmp_path / "page").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(AlexNetError, match=r"page: .*HTML page"):
        export.load(tmp_path / "page")
    (tmp_path / "page").write_bytes(b"a" * 100)
    with pytest.raises(AlexNetError, match=r"page\.json, which describes it, can't be read"):
        export.load(tmp_path / "page")
    for data in (b"", b"x" * 100, b"\x02" + b"\x00" * 7 + b"{}"):
        (tmp_path / "x").write_bytes(data)
        (tmp_path / "x.json").write_text('{"class_names": [], "image_shape": []}')
        with pytest.raises(AlexNetError, match="x: can't be loaded as an exported network"):
            export.load(tmp_path / "x")


def test_the_command(workdir, capsys):
    def run(*args):
        command = [sys.executable, "-m", "alexnet_jax.exchange.export", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    done = run(str(workdir), "--format", "safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert export.load(workdir / "export" / "model.safetensors").image_shape == (32, 32, 3)
    with pytest.raises(SystemExit):
        export.main(["--help"])
    assert "for six months" in " ".join(capsys.readouterr().out.split())
    done = run(str(workdir / "no"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    for args in ((str(workdir),), (str(workdir), "--checkpoint", "x")):
        with pytest.raises(UsageError):
            export.main(args)

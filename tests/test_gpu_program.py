"""The program that XLA compiles for a GPU, and the reader of its text."""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys

import jax
import pytest

from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.network.small import AlexNetSmall
from alexnet_jax.training import optimizer
from alexnet_jax.training.state import create_state

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import hlo  # noqa: E402

needs_compiler = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="no compiler for GPUs"
)

# A loop of 3 turns with a convolution, a fusion that takes one row of a table and updates one row in place, and a copy.
TEXT = """HloModule jit_step, is_scheduled=true

%fused_row (p0: f32[100,8], p1: s32[], p2: f32[3,8]) -> f32[3,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %p2 = f32[3,8]{1,0} parameter(2)
  %row = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
  ROOT %updated = f32[3,8]{1,0} dynamic-update-slice(%p2, %row, %p1, %zero), metadata={op_name="jit(step)/keys/add"}
}

%body (arg: (s32[], f32[100,8], f32[3,8], bf16[2,4,4,3], bf16[5,3,3,3])) -> (s32[], f32[3,8]) {
  %arg = (s32[], f32[100,8]{1,0}, f32[3,8]{1,0}, bf16[2,4,4,3]{3,2,1,0}, /*index=4*/bf16[5,3,3,3]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %table = f32[100,8]{1,0} get-tuple-element(%arg), index=1
  %rows = f32[3,8]{1,0} get-tuple-element(%arg), index=2
  %x = bf16[2,4,4,3]{3,2,1,0} get-tuple-element(%arg), index=3
  %kernel = bf16[5,3,3,3]{3,2,1,0} get-tuple-element(%arg), index=4
  %conv = (bf16[2,4,4,5]{3,2,1,0}, u8[0]{0}) custom-call(%x, %kernel), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/conv1/conv"}
  %fusion = f32[3,8]{1,0} fusion(%table, %i, %rows), kind=kLoop, calls=%fused_row
  ROOT %result = (s32[], f32[3,8]{1,0}) tuple(%i, %fusion)
}

%condition (arg: (s32[], f32[3,8])) -> pred[] {
  %arg.1 = (s32[], f32[3,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main (start: (s32[], f32[3,8])) -> f32[3,8] {
  %start = (s32[], f32[3,8]{1,0}) parameter(0)
  %loop = (s32[], f32[3,8]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %end = f32[3,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %copy = f32[3,8]{0,1} copy(%end)
}
"""


def compiled(folder: pathlib.Path, *flags: str) -> tuple[dict, str]:
    """The figures and the text of one program; skips the test where the compiler can't be had."""
    command = [sys.executable, "benchmarks/gpu_program.py", "--dtypes", "bfloat16", "--steps", "train", *flags]
    command += ["--json", str(folder / "figures.json"), "--hlo", str(folder)]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # no flag that needs a GPU
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "pip could not install" in ended.stderr:
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == 0, ended.stderr
    assert "Compiled for H100, not measured on it" in ended.stdout
    (figures,) = json.loads((folder / "figures.json").read_text())["programs"]
    (path,) = folder.glob("*.txt")
    return figures, path.read_text()


def test_kernels_their_bytes_and_flops():
    conv, fusion, compare, copy = hlo.kernels(hlo.parse(TEXT))
    assert (conv.target, conv.runs, conv.dtype) == ("__cudnn$convForward", 3, "bf16")
    assert conv.flops == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert (conv.bytes_read, conv.bytes_written) == (2 * (2 * 4 * 4 * 3 + 5 * 3 * 3 * 3), 2 * (2 * 4 * 4 * 5))
    assert (fusion.target, fusion.runs, fusion.scopes) == ("kLoop", 3, ("jit(step)/keys/add",))
    assert (fusion.bytes_read, fusion.bytes_written) == (8 * 4 + 4, 8 * 4)  # a row, its number; the row
    assert (compare.target, compare.runs) == ("compare", 4)
    assert (copy.target, copy.runs, copy.bytes_read, copy.bytes_written) == ("copy", 1, 96, 96)


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        hlo.parse("Traceback (most recent call last):")


def test_sizes_of_types():
    sizes = {
        "f32[16,2]{1,0}": 128,
        "pred[5]": 5,
        "bf16[]": 2,
        "s4[2]": 1,
        "f8e4m3fn[3]": 3,
        "(f32[2], (u8[0], s64[1]))": 16,
    }
    assert {text: sum(array.nbytes for array in hlo.arrays(text)) for text in sizes} == sizes
    with pytest.raises(ValueError, match="HLO type x7: its size is not known"):
        _ = hlo.arrays("x7[2]")[0].nbytes


@needs_compiler
def test_the_step_compiled_for_an_h100(tmp_path):
    """Ceilings with some slack; the figures are in benchmarks/README.md."""
    figures, text = compiled(tmp_path, "--presets", "cifar10")
    rule, _ = optimizer.from_config(PRESETS["cifar10"].config.optimizer, 1, 1)
    state = jax.eval_shape(lambda key: create_state(AlexNetSmall(), rule, (32, 32, 3), key), jax.random.key(0))
    header = text.splitlines()[0]
    aliased = {int(number) for number in re.findall(r"\{\d+\}: \((\d+), \{\}", header)}
    assert aliased == set(range(len(jax.tree.leaves(state))))  # the state is donated whole
    convolutions = [kernel for kernel in hlo.kernels(hlo.parse(text)) if "cudnn$conv" in kernel.target]
    assert [kernel.runs for kernel in convolutions] == [25] * 14
    for absent in ("select-and-scatter", "f64[", "S(5)", "infeed", "outfeed"):  # S(5): memory of the host
        assert absent not in text, absent
    assert figures["kernels"]["all"] <= 98
    assert figures["gigabytes"] <= 0.29
    assert figures["roofline_us"]["all"] <= 96
    assert figures["floored_us"]["all"] <= 220


@pytest.mark.stress
@needs_compiler
def test_dense_gradients_are_sent_during_the_backward_pass(tmp_path):
    """On 8 GPUs, before the gradients of the first two convolutions are computed."""
    _, text = compiled(tmp_path, "--presets", "imagenet-paper", "--devices", "8", "--batch-size", "256")
    lines = text[text.index("ENTRY") :].splitlines()

    def place(pattern: str) -> int:
        (found,) = (number for number, line in enumerate(lines) if re.search(pattern, line))
        return found

    for shape in ("9216,4096", "4096,4096", "4096,1000"):
        begins = place(rf"= \(\(f32\[{shape}\].* all-reduce-start\(")
        assert (
            begins < place(r"= \(bf16\[256,5,5,48\].*BackwardFilter") < place(r"= \(bf16\[96,11,11,3\].*BackwardFilter")
        )
        assert begins < place(rf"= f32\[{shape}\].* all-reduce-done\(")

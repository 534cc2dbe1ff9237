"""The benchmark compares like with like, and computes and shows its figures correctly."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from alexnet_jax.errors import AlexNetError
from alexnet_jax.network import small

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its modules import one another as a script's neighbours

import collectives  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import step_profile  # noqa: E402
from programs import Spec  # noqa: E402

PEERS = [("torch", "eager"), ("tensorflow", "function"), ("tensorflow", "graph")]

# Runs in a separate process, to keep a peer's threads and warnings out of the tests'.
PEER = """
import importlib, sys
import numpy as np
from programs import Spec

framework, variant, arrays, answers = sys.argv[1:]
module = importlib.import_module(f"programs_{framework}")
given = dict(np.load(arrays))
params = {}
for name in given:
    if "/" in name:
        layer, key = name.split("/")
        params.setdefault(layer, {})[key] = given[name]
program = module.train(Spec(framework, module.platform(), variant=variant, batch_size=4, data=arrays))
program.run(1)
np.savez(answers, logits=module.logits(params, given["large"]), parameters=program.parameters)
"""


@pytest.mark.parametrize(("framework", "variant"), PEERS)
def test_peers_are_the_same_network(framework, variant, tmp_path):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    rng = np.random.default_rng(0)
    # So large that LRN divides by far more than k ^ beta.
    large = rng.uniform(0, 1000, (4, 32, 32, 3)).astype(np.float32)
    model = small.AlexNetSmall()
    params = jax.device_get(model.init(jax.random.key(0), large)["params"])
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.01, leaf.shape).astype(np.float32), params)
    named = {f"{layer}/{key}": value for layer, values in params.items() for key, value in values.items()}
    images = rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "in.npz", large=large, images=images, labels=np.arange(16, dtype=np.int32) % 10, **named)

    files = [str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    command = [sys.executable, "-c", PEER, framework, variant, *files]
    environment = run.worker_environment(Spec(framework, "cpu"))
    subprocess.run(command, cwd=ROOT / "benchmarks", env=environment, check=True)
    answers = np.load(tmp_path / "out.npz")
    expected = np.asarray(model.apply({"params": params}, large))
    assert answers["parameters"] == 2_887_306
    np.testing.assert_allclose(answers["logits"], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def program(framework: str, seconds: list[float], dtype: str = "float32", **more: object) -> dict[str, object]:
    return {
        "program": {"jax": "alexnet_jax", "torch": "PyTorch eager", "tensorflow": "TensorFlow graph"}[framework],
        "framework": framework,
        "dtype": dtype,
        "batch_size": 10,
        "devices": 1,
        "build_seconds": 3.0,
        "imported_bytes": 100 * 2**20,
        "peak_bytes": 350 * 2**20,
        "device_peak_bytes": None,
        "steps": 2,
        "seconds": seconds,
    } | more


def made_up_results() -> dict[str, object]:
    slow = program("torch", [4.0, 2.0, 8.0], program="PyTorch compile")
    results = {
        "date": "2026-01-02T03:04:05+00:00",
        "device": {"platform": "cpu", "name": "A processor", "count": 1, "cores": 2},
        "versions": {"python": "3.13.0", "jax": "0.12.0"},
        "settings": {"rounds": 3, "steps": 2, "batch_size": 10, "data": "shapes"},
        "left_out": ["TensorFlow: not installed"],
        "train": [
            program("jax", [1.0, 2.0, 4.0]),
            slow,
            program("torch", [3.0, 2.0, 2.0]),
            program("torch", [9.0, 9.0, 9.0], "bfloat16"),
        ],
        "operations": {"LRN": [program("jax", [0.2, 0.4, 0.2]), program("torch", [0.4, 0.4, 1.0])]},
        "start": [{"empty": 9.0, "filled": 5.0}, {"empty": 8.0, "filled": 6.0}, {"empty": 7.0, "filled": 7.0}],
        "epoch": [{"bare": program("jax", [1.0]), "loop": [18.0, 19.0, 30.0]}],
        "scaling": [program("jax", [1.0, 2.0, 4.0]), program("jax", [1.0, 1.0, 1.0], devices=2)],
        "imagenet": {
            "product_side": 1000,
            "products": [program("jax", [0.2, 0.1], steps=5)],  # 1e11 operations a second at best
            "programs": [
                program("jax", [2.0, 1.0], parameters=61_100_840),
                program("torch", [3.0, 3.0], parameters=61_100_840),
            ],
        },
    }
    return results | {"summary": report.summarize(results)}


def test_ratios_are_taken_round_by_round():
    ours, peer = {"seconds": [1.0, 2.0, 4.0]}, {"seconds": [3.0, 2.0, 2.0]}
    # 3, 1 and 1/2; the ratio of the medians would be 1 too, that of the sums 1.
    assert report.ratios(ours, peer) == {"median": 1.0, "min": 0.5, "max": 3.0}
    assert report.ratios({"seconds": [1.0, 2.0, 4.0]}, {"seconds": [4.0, 2.0, 8.0]})["median"] == 2.0


def test_summary_of_training():
    summary = made_up_results()["summary"]["train"]
    ours = summary["programs"][0]
    assert ours["images_per_second"] == {"median": 10.0, "min": 5.0, "max": 20.0}
    assert ours["memory_mib"] == 250
    # The fastest peer of each dtype; in bfloat16 there is nothing of ours to compare with.
    best = [(row["program"], row["dtype"], row["ours_by_this"]) for row in summary["best_peers"]]
    assert best == [
        ("PyTorch eager", "float32", {"median": 1.0, "min": 0.5, "max": 3.0}),
        ("PyTorch eager", "bfloat16", None),
    ]


def test_tables_come_from_the_file_alone(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(made_up_results()))
    run.main(["--table", str(path)])
    lines = capsys.readouterr().out.splitlines()
    for line in [
        "A processor, 2 cores; Python 3.13.0, JAX 0.12.0; 2026-01-02. "
        "Median (smallest to largest) of 3 rounds of 2 steps; data: shapes.",
        "| PyTorch eager | float32 | 10 (7 to 10) | 1.00 (0.50 to 3.00) | 250 MiB | 3.0 s |",
        "| PyTorch eager | bfloat16 |  |",
        "| LRN | PyTorch eager | 200.00 (200.00 to 500.00) | 2.00 (1.00 to 5.00) |",
        "| quickstart's first step, empty cache | 8.0 (7.0 to 9.0) |",
        "| 20 (20 to 20) | 19 (19 to 19) | 0.950 (0.950 to 0.950) |",
        "| 10 | 2 | 20 (20 to 20) | 500.0 (500.0 to 500.0) |",
        "Blocks of 2 steps:",
        # 10 images/s of 2 (3 * 714,188,480 - 70,276,800) operations each, of 1e11.
        "| PyTorch eager | float32 | 10 | 6.7 (6.7 to 6.7) | 2.25 (1.50 to 3.00) | 28% |",
        "- TensorFlow: not installed",
    ]:
        assert line in lines


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(f)/jvp(AlexNet)/conv1/conv_general_dilated", "conv1"),
        ("jit(f)/transpose(jvp(AlexNet))/max_pool/select_n", "max_pool"),
        ("jit(f)/transpose(jvp(AlexNetSmall))/jit(relu)/select_n", "activation"),
        ("jit(f)/update/jit(_where)/select_n", "update"),
        ("", "copies and other"),
    ],
)
def test_the_profile_knows_which_part_an_operation_is_of(scope, part):
    assert step_profile.part_of(scope) == part


def test_the_figure_shows_every_section():
    results = made_up_results()
    training, operations, _ = report.figure(results).axes
    medians = [row["images_per_second"]["median"] for row in results["summary"]["train"]["programs"]]
    assert [bar.get_width() for bar in training.patches] == sorted(medians)
    assert len(operations.patches) == len(results["summary"]["operations"])
    assert report.figure(results | {"summary": {}}) is None


def test_operations_without_peers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "installed", lambda framework: False)
    out = tmp_path / "deeper" / "operations.json"
    run.main(["--quick", "--sections", "operations", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["left_out"] == ["PyTorch: not installed", "TensorFlow: not installed"]
    assert [len(row["seconds"]) for rows in results["operations"].values() for row in rows] == [2] * 5
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "| LRN 16x16x48 | alexnet_jax |" in printed.out
    assert "skip PyTorch: not installed\n" in printed.err


def test_a_worker_that_fails_gives_its_reason(tmp_path):
    spec = Spec("jax", "cpu", data=str(tmp_path / "nowhere.npz"))
    with (tmp_path / "log").open("wb") as log, pytest.raises(run.WorkerError, match=r"^FileNotFoundError: .*nowhere"):
        run.Worker(spec, log)


# Lines of compiled programs, for a CPU and for a GPU, cut short.
HLO = """
%all-to-all = (f32[16,512]{1,0}, /*index=1*/f32[16,512]{1,0}) all-to-all(%a, %b), channel_id=1, dimensions={0}
%reduce_scatter.2 = bf16[16,1000]{1,0} reduce-scatter(%x), channel_id=1, dimensions={0}, to_apply=%sum
ROOT %all-reduce.7 = (s32[], pred[3]{0}) all-reduce(%c, %d), to_apply=%region
%all-reduce-start.1 = f32[7]{0} all-reduce-start(%e), to_apply=%region
%all-reduce-done.1 = f32[7]{0} all-reduce-done(%all-reduce-start.1)
%all-gather-start = ((f32[2,3]{1,0:T(8,128)}, s8[1]{0}), (f32[8,3]{1,0}, s8[4]{0})) all-gather-start(%f, %g)
%all-gather-done = (f32[8,3]{1,0}, s8[4]{0}) all-gather-done(%all-gather-start)
%collective-permute-start = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%h)
%fusion = f32[9]{0} fusion(%all-reduce.7), calls=%all-gather.2
"""


def test_collectives_are_found_and_weighed():
    found = collectives.collectives(HLO)
    assert found == [
        ("all-to-all", 2 * 16 * 512 * 4),
        ("reduce-scatter", 16 * 1000 * 2),
        ("all-reduce", 4 + 3),
        ("all-reduce", 28),
        ("all-gather", 8 * 3 * 4 + 4),
        ("collective-permute", 20),
    ]
    assert [c.sent_bytes(4) for c in found] == [49152, 96000, 10.5, 42, 75, 20]


def test_collectives_on_file_cross_where_they_do_on_paper():
    written = json.loads((ROOT / "results" / "collectives-cpu.json").read_text())
    for devices, crossing in written["crossings"].items():
        assert collectives.crossing(written["counts"], int(devices)) == crossing["compiled"]
        assert collectives.on_paper(written["variant"], int(devices)) == crossing["paper"]
        assert crossing["compiled"]["crossing"] == pytest.approx(crossing["paper"]["crossing"], rel=1e-6)
        assert crossing["compiled"]["largest_deviation"] < 1e-9


def test_a_platform_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(AlexNetError, match=r"^JAX_PLATFORMS='nonsense': JAX can't use such a device"):
        run.describe_device()

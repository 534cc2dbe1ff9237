"""The files of deploy/: valid by their own rules, consistent with the program, and tried with local processes."""

import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tomllib

import kubernetes_validate
import pytest
import yaml

from alexnet_jax.config import cli
from tests.stress import process_faults

ROOT = pathlib.Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
WORKER = process_faults.WORKER.replace("draw_nothing()\n", "")  # draws, as train.py does
SBATCH = DEPLOY / "slurm.sbatch"
DOCUMENTS = [document for path in DEPLOY.glob("*.yaml") for document in yaml.safe_load_all(path.read_text())]
SERVICE, JOB, CLAIM = (
    next(d for d in DOCUMENTS if d["kind"] == k) for k in ("Service", "Job", "PersistentVolumeClaim")
)
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
INDEX = "$(JOB_COMPLETION_INDEX)"  # which Kubernetes puts in

# Stands in for srun: two tasks on one node, with the variables that Slurm sets; the highest exit code, as srun's.
SRUN = """
import os, subprocess, sys
command = sys.argv[sys.argv.index("python") :]
step = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}
tasks = [
    subprocess.Popen(command, env=os.environ | step | {"SLURM_PROCID": task, "SLURM_LOCALID": task})
    for task in ("0", "1")
]
sys.exit(max(task.wait() for task in tasks))
"""


def sbatch(folder, arguments=(), *, srun, worker="", **variables):
    """Runs the batch script with programs of ours before Slurm's; returns its exit code, its output and what it
    requeued."""
    programs = {
        "srun": srun,
        "python": f"import sys\ndel sys.argv[1]\n{worker}",
        "scontrol": "import sys\nprint(*sys.argv)",
    }
    for name, text in programs.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = worker_environment() | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | variables
    command = ["bash", str(SBATCH), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def worker_environment():
    """This process's, without the job that it may run in."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return outer | {"PYTHONPATH": str(ROOT)}


def free_port(first=0):
    """A port that is free now, and not less than `first`."""
    for port in range(first, 65536):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return free.getsockname()[1]
    raise AssertionError("no port is free")


def assert_one_finished_run(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["split"] == "validation"] == [2]
    assert (workdir / "checkpoints" / "2" / "manifest.json").exists()
    assert (workdir / "plots" / "curves.png").exists()


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck here")
    checked = subprocess.run([shellcheck, str(SBATCH)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


def test_slurm_reads_every_option():
    """It reads none that follows a command."""
    lines = SBATCH.read_text().splitlines()
    first_command = next(place for place, line in enumerate(lines) if line and not line.startswith("#"))
    options = dict(
        re.match(r"#SBATCH --([\w-]+)=?(\S*)$", line).groups() for line in lines if line.startswith("#SBATCH")
    )
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["open-mode"] == "append"
    assert "requeue" in options
    signal, seconds = options["signal"].split("@")
    assert signal == "TERM"
    assert int(seconds) > 60  # by which Slurm may be late or early


def test_slurm_starts_train_with_the_arguments(tmp_path):
    ended = sbatch(
        tmp_path, ["imagenet-paper", "--data-dir", "a b"], srun="import sys\nprint(*sys.argv[1:], sep='\\n')"
    )
    assert ended.returncode == 0
    *options, python, script = (words := ended.stdout.splitlines())[:4]
    assert options == ["--kill-on-bad-exit=0", "--wait=120"]  # or the others' 143 hides a failure
    assert [python, script] == ["python", "train.py"]
    config = cli.parse_train(words[4:])
    assert config.run.distributed
    assert config.preset == "imagenet-paper"
    assert config.data.data_dir == pathlib.Path("a b")


@pytest.mark.parametrize(
    ("code", "restarts", "requeues"),
    [(0, "0", False), (1, "0", False), (2, "0", False), (137, "0", False), (143, "0", True), (143, "100", False)],
)
def test_slurm_starts_again_only_what_was_stopped_and_saved(tmp_path, code, restarts, requeues):
    ended = sbatch(tmp_path, srun=f"import sys\nsys.exit({code})", SLURM_RESTART_COUNT=restarts)
    assert ended.returncode == code
    assert ended.stdout.endswith("scontrol requeue 7\n") == requeues


def test_slurm_dry_run(tmp_path):
    """Two tasks with Slurm's variables find each other by the job's number and train as one."""
    job = free_port(2**16 - 2**12) - (2**16 - 2**12)  # JAX makes the port from it
    arguments = ["quickstart", "--workdir", str(tmp_path / "run"), "--epochs", "1"]
    ended = sbatch(tmp_path, arguments, srun=SRUN, worker=WORKER, SLURM_JOB_ID=str(job))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("on 2 x cpu") == 1
    assert_one_finished_run(tmp_path / "run")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_kubernetes_schema(document, version):
    kubernetes_validate.validate(document, version, strict=True)


def test_kubernetes_processes_find_each_other():
    spec, service = JOB["spec"], SERVICE["spec"]
    config = cli.parse_train([argument.replace(INDEX, "1") for argument in CONTAINER["args"]])
    assert config.run.process_id == 1
    assert config.run.num_processes == spec["completions"] == spec["parallelism"]
    host, port = config.run.coordinator.split(":")
    assert spec["completionMode"] == "Indexed"  # so the pods' host names are JOB-INDEX.SERVICE
    assert host == f"{JOB['metadata']['name']}-0.{SERVICE['metadata']['name']}"
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert service["selector"] == {"batch.kubernetes.io/job-name": JOB["metadata"]["name"]}
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"]
    assert [int(port)] == [p["port"] for p in service["ports"]] == [p["containerPort"] for p in CONTAINER["ports"]]


def test_kubernetes_writes_to_the_volume():
    (mount,) = [mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "shared"]
    (volume,) = [volume for volume in POD["volumes"] if volume["name"] == "shared"]
    assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    config = cli.parse_train([argument.replace(INDEX, "0") for argument in CONTAINER["args"]])
    assert config.workdir.is_relative_to(mount["mountPath"])


def test_kubernetes_counts_failures_and_no_stops():
    rules = JOB["spec"]["podFailurePolicy"]["rules"]
    assert POD["restartPolicy"] == "Never"  # or the rules are refused
    codes = {code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]}
    assert codes == {2: "FailJob", 143: "Ignore"}
    assert {r["onExitCodes"]["containerName"] for r in rules if "onExitCodes" in r} == {CONTAINER["name"]}


@pytest.mark.stress
def test_kubernetes_dry_run(tmp_path):
    """Two processes with the manifest's arguments and Kubernetes' variables train as one."""
    port, running = free_port(), []
    host = CONTAINER["args"][CONTAINER["args"].index("--coordinator") + 1]
    for index in ("0", "1"):
        puts = {INDEX: index, host: f"127.0.0.1:{port}", "/shared": str(tmp_path)}
        arguments = [re.sub("|".join(map(re.escape, puts)), lambda m: puts[m[0]], a) for a in CONTAINER["args"]]  # noqa: B023
        environment = worker_environment() | {"JOB_COMPLETION_INDEX": index, "KUBERNETES_SERVICE_HOST": "127.0.0.1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", WORKER, *arguments, "--epochs", "1"]
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    said = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said[0][0].count("on 2 x cpu") == 1
    assert_one_finished_run(tmp_path / "runs" / "quickstart")


def test_flags_in_the_readme():
    starts = re.compile(r"(?:.*slurm\.sbatch|(?:mpirun .*)?python train\.py|docker run .* alexnet-jax(?::cpu)?) (.*)")
    found = [match[1] for line in (DEPLOY / "README.md").read_text().splitlines() if (match := starts.match(line))]
    assert len(found) == 7
    for flags in found:
        cli.parse_train(shlex.split(flags, comments=True))


def test_container():
    """It copies files that are there, and they pass .dockerignore; its extra exists; its user is that of the pods."""
    lines = [line.split() for line in (DEPLOY / "Dockerfile").read_text().splitlines()]
    copied = {name for line in lines if line[:1] == ["COPY"] for name in line[1:-1]}
    passed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name.split("/")[0] for name in copied - {"."}} <= passed
    assert all((ROOT / name).exists() for name in copied | passed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    values = {line[0]: line[1:] for line in lines if line}
    assert values["ARG"][0].removeprefix("EXTRA=") in project["optional-dependencies"]
    assert values["USER"] == [str(POD["securityContext"]["runAsUser"])]
    assert json.loads(" ".join(values["ENTRYPOINT"])) == ["python", "train.py"]
    assert {project["readme"], *project["license-files"]} <= copied

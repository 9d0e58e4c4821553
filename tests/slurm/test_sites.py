"""What sites are like: GPUs by --gres, containers, conda, limits of a QOS; and the way there from a fresh clone."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY
from tests.slurm.cluster import Cluster, read_logs
from tests.slurm.runs import shown, submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

APPTAINER = """#!/bin/bash
[[ $1 == exec ]] || exit 9
shift
while [[ $1 == --* ]]; do [[ $1 == --bind ]] && shift; shift; done
[[ -f $1 ]] || { echo "no image $1"; exit 9; }
export IN_CONTAINER=$1
shift
exec "$@"
"""
CONDA = """
conda() {{
  [ "$1" = activate ] && export CONDA_DEFAULT_ENV=$2 PATH={envs}/$2/bin:$PATH
}}
"""
PYTHON = """#!/bin/bash
echo "$IN_CONTAINER $CONDA_DEFAULT_ENV" >>{log}
exec {python} "$@"
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_gres_a_container_and_a_conda_environment(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    """Ranks, and what decides after them, run in both; each rank sees the node's two GPUs."""
    apptainer = write_program(tmp_path / "apptainer", APPTAINER)
    conda = write_program(tmp_path / "conda.sh", CONDA.format(envs=tmp_path / "envs"))
    log, image = tmp_path / "pythons", tmp_path / "torch.sif"
    write_program(tmp_path / "envs" / "hpc" / "bin" / "python", PYTHON.format(log=log, python=sys.executable))
    image.touch()
    profile = tmp_path / "site.yaml"
    lines = [
        (REPOSITORY / "configs" / "cluster" / "devcluster.yaml").read_text(),
        "gpu_option: gres",
        f"container: {apptainer} exec --nv --bind /tmp:/tmp {image}",
        "python: python",
        f"setup: ['. {conda}', conda activate hpc]",
    ]
    profile.write_text("\n".join(lines))
    run = tmp_path / "run"
    submitted(cluster, "train", "--cluster", profile, "--out", run, "--data", tiny_packed, *TINY)
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", run).returncode == 0, read_logs(run / "jobs")
    assert log.read_text().splitlines() == 3 * [f"{image} hpc"]  # two ranks, launch.after_job
    assert read_logs(run / "jobs").count("CUDA_VISIBLE_DEVICES 0,1") == 2
    assert [event["event"] for event in shown(cluster, run)["tasks"].popitem()[1]["events"]] == ["start", "end"]


def test_the_doctor_reads_the_limits_of_a_qos(cluster: Cluster, tmp_path: Path) -> None:
    """From the accounting; the development cluster does not enforce them, so its configuration says that it does."""
    real = cluster.run("bash", "-c", "command -v scontrol").strip()
    pretend = "s/^AccountingStorageEnforce *= none/AccountingStorageEnforce = limits/"
    write_program(tmp_path / "scontrol", f"#!/bin/bash\n{real} \"$@\" | sed '{pretend}'\n")
    user = cluster.run("id", "-un").strip()
    limits = ["MaxWall=0:10:00", "MaxTRESPerJob=node=1", "MaxSubmitJobsPerUser=2", "MaxJobsPerUser=1"]
    for words in (
        ["add", "account", "lab"],
        ["add", "user", user, "account=lab"],
        ["add", "qos", "small", "set", *limits],
        ["modify", "user", user, "set", "qos+=small"],
    ):
        cluster.attempt("sacctmgr", "-i", *words)  # of a cluster that is used again, some is there
    profile = tmp_path / "site.yaml"
    profile.write_text("partition: gpu\nqos: small\naccount: lab\nnodes: 2\ncpus_per_gpu: 1\ngpu_type: a100\n")
    path = f"{tmp_path}:{cluster.env['PATH']}"
    done = cluster.attempt("env", f"PATH={path}", "hpc-ddpm", "doctor", "--cluster", profile, "--json")
    assert done.returncode == 2
    said = {f["found"]: f["status"] for f in json.loads(done.stdout) if f["check"] in ("profile", "limits")}
    assert said == {
        "gpu has no GPU of type a100, it has GPUs without a type": "fail",
        "QOS small ends jobs after 00:10:00, 24:00:00 asked": "fail",
        "QOS small allows node=1 (MaxTRESPerJob), 2 asked": "fail",
        "QOS small takes 2 jobs and array tasks of a user at a time (MaxSubmitJobs)": "warn",
        "QOS small runs 1 jobs of a user at a time (MaxJobs), array_parallelism=64": "warn",
    }


def test_from_a_fresh_clone_to_a_running_job(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    """The six commands of docs/cluster.md, one after the other in one shell; `make` finds .venv set up."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    block = page.split("From a fresh clone to a running job")[1].split("```")[1]
    commands = [line.partition("  #")[0].strip() for line in block.strip().splitlines()]
    assert len(commands) <= 6
    first, *rest = "\n".join(commands).replace("/tmp/hpc_ddpm-devcluster-$UID", str(cluster.folder)).splitlines()
    first = re.sub(r"https://\S+", f"-q {REPOSITORY} hpc_ddpm", first)
    is_set_up = f"mkdir .venv && ln -s {Path(sys.executable).parent} .venv/bin && touch .venv/.installed"
    source = tiny_packed.parent / "source"
    rest = [re.sub(r"(submit .*) DATA(.*)", rf"\1 {source}\2 {shlex.join(TINY)}", line) for line in rest]
    script = "\n".join(["set -e", first, is_set_up, *rest])
    clone = tmp_path / "hpc_ddpm"
    plain = ["env", "-u", "SLURM_CONF", f"PYTHONPATH={clone}", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin"]
    said = cluster.run(*plain, "bash", "-c", script, cwd=tmp_path)
    jobs = re.findall(r"submitted job (\d+)", said)
    assert len(jobs) == 4
    waited = cluster.attempt("hpc-ddpm", "jobs", "wait", clone / "runs" / "first" / "packed")
    cluster.run("scancel", *jobs[1:])
    assert waited.returncode == 0, read_logs(clone / "runs" / "first" / "packed" / "jobs")

"""`hpc-ddpm doctor`: look at this machine, a path and a cluster before anything is queued; one line for each check."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.doctor_slurm import look_at_slurm
from launch.finding import Finding
from launch.profiles import Profile

TIMEOUT_S, TIMED_OUT = 120, 124
GIB = 2**30
LITTLE_SPACE_GIB = 50.0
DRIVER = Path("/proc/driver/nvidia/gpus")
"""A folder for each GPU of the node, also for those that are hidden from this process."""
NEEDED = ("torch", "deepspeed", "h5py", "hdf5plugin", "nibabel", "submitit", "pydantic", "numpy", "cramjam")


Check = Callable[[], Iterator[Finding]]


def examine(profile: Profile | None, path: Path) -> Iterator[Finding]:
    """All checks, in the order in which they matter."""
    checks: list[Check] = [_python, _gpu, _peers, _conv3d, _deepspeed, _ranks, _mpi]
    for check in [*checks, lambda: _hdf5(path), lambda: _space(path), lambda: look_at_slurm(profile)]:
        yield from check()


def _python_says(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What another Python process does with these arguments; as `timeout` has it, 124 is the code of one that hangs."""
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, TIMED_OUT, "", f"TimeoutError: nothing within {TIMEOUT_S} s")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a failed process wrote, which in most cases says why it failed."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


# -------------------------------------------------------------------------------------------------- this machine


def _python() -> Iterator[Finding]:
    from hpc_ddpm.runlog import package_versions

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", "pip install hpc_ddpm in this environment")
        return
    versions = package_versions()
    shown = ", ".join(f"{name} {versions[name]}" for name in ("hpc_ddpm", "torch", "deepspeed", "h5py"))
    yield Finding("python", "pass", f"{sys.version.split()[0]}, {shown}")


def _deepspeed() -> Iterator[Finding]:
    """In another process: it looks for compilers and GPUs when it is loaded."""
    code = "import deepspeed; from deepspeed.accelerator import get_accelerator as a; print(a().device_name())"
    done = _python_says("-c", code)
    if done.returncode:
        yield Finding("deepspeed", "fail", f"cannot be loaded: {_last_line(done)}", "install it for this torch")
    else:
        yield Finding("deepspeed", "pass", f"loads, and computes on {done.stdout.split()[-1]}")


def _gpu() -> Iterator[Finding]:
    import torch

    from hpc_ddpm.device import KNOWN_BAD_CUDNN

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield Finding("gpu", "warn", f"no GPU here; torch {torch.__version__} is {built}", "right on a login node only")
        return
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    yield Finding("gpu", "pass", f"{torch.cuda.device_count()} × {', '.join(names)}, CUDA {torch.version.cuda}")
    cudnn = torch.backends.cudnn.version() or 0
    if cudnn in KNOWN_BAD_CUDNN:
        yield Finding("cudnn", "fail", f"{cudnn} computes bf16 conv3d wrongly or not at all", "install cuDNN ≥ 9.15")
    else:
        yield Finding("cudnn", "pass", str(cudnn))


def _peers() -> Iterator[Finding]:
    """Whether the GPUs of this node reach each other directly: where they do not, NCCL is slow and says nothing."""
    import torch

    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_node = sum(1 for _ in DRIVER.glob("*"))
    if visible == 1 < on_node:
        advice = "ask for them with --gpus-per-node, not --gpus-per-task, and run this there: srun hpc-ddpm doctor"
        yield Finding("peers", "warn", f"1 of the {on_node} GPUs of this node is visible here", advice)
    if visible < 2:
        return
    pairs = list(itertools.combinations(range(visible), 2))
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        shown = ", ".join(f"{one}-{other}" for one, other in apart[:6]) + (", …" if len(apart) > 6 else "")
        found = f"{len(apart)} of {len(pairs)} pairs of GPUs do not reach each other directly: {shown}"
        advice = "NCCL goes through host memory there; see `nvidia-smi topo -p2p r`, or ask the site (ACS, IOMMU)"
        yield Finding("peers", "warn", found, advice)
    else:
        yield Finding("peers", "pass", f"all {visible} GPUs reach each other directly")


def _conv3d() -> Iterator[Finding]:
    """bf16 against fp32, with the padding and width that the network uses."""
    import torch
    import torch.nn.functional as F

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(1, 32, 16, 16, 16, generator=generator).to(device)
    weight = torch.randn(32, 32, 3, 3, 3, generator=generator).to(device) / 30
    exact = F.conv3d(volume, weight, padding=1)
    half = F.conv3d(volume.bfloat16(), weight.bfloat16(), padding=1).float()
    error = float((half - exact).abs().max() / exact.abs().max())
    if error > 0.02:
        yield Finding("conv3d", "fail", f"bf16 is off by {error:.1%} on {device.type}", "use another torch or cuDNN")
    else:
        yield Finding("conv3d", "pass", f"bf16 agrees with fp32 to {error:.2%} on {device.type}")


def _ranks() -> Iterator[Finding]:
    """Two processes of this machine sum a number, over nccl where there are two GPUs, else gloo."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "ranks.py")
        script.write_text(_RANKS, encoding="utf-8")
        done = _python_says("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script))
    if done.returncode == TIMED_OUT:
        yield Finding("ranks", "fail", f"no all-reduce within {TIMEOUT_S} s", "set NCCL_SOCKET_IFNAME=lo")
    elif done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "failed")
        yield Finding("ranks", "fail", last.strip(), "run it by hand: torchrun --nproc-per-node=2 ...")
    else:
        yield Finding("ranks", "pass", f"all-reduce over {done.stdout.strip()} across 2 local ranks")


_RANKS = """
import os, torch, torch.distributed as dist
gpus = torch.cuda.device_count() >= 2
backend = "nccl" if gpus else "gloo"
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
dist.init_process_group(backend)
value = torch.full((1,), dist.get_rank() + 1.0, device=device)
dist.all_reduce(value)
assert value.item() == 3
if dist.get_rank() == 0:
    print(backend)
dist.destroy_process_group()
"""


def _mpi() -> Iterator[Finding]:
    """In another process: loading an MPI library that does not fit ends the process that tries."""
    code = "from mpi4py import MPI; print(MPI.Get_library_version().split(',')[0].splitlines()[0])"
    done = _python_says("-c", code)
    advice = "only `mpirun hpc-ddpm pack` needs it, srun does without; pip install 'hpc_ddpm[mpi]' or load a module"
    if done.returncode:
        yield Finding("mpi", "warn", f"mpi4py finds no MPI library: {_last_line(done)}", advice)
    elif shutil.which("mpirun") is None:
        yield Finding("mpi", "warn", f"{done.stdout.strip()}, but no mpirun on PATH", advice)
    else:
        yield Finding("mpi", "pass", f"{done.stdout.strip()}, {shutil.which('mpirun')}")


# ------------------------------------------------------------------------------------------------------ the path


def _hdf5(path: Path) -> Iterator[Finding]:
    """A compressed file is written and read there, in another process, with locking as HDF5 does it by default."""
    if not path.is_dir():
        yield Finding("path", "fail", f"{path} is no folder", "give --path a folder on the disk that jobs will use")
        return
    code = (
        "import sys, h5py, hdf5plugin, numpy as np\n"
        "with h5py.File(sys.argv[1], 'w') as f: f.create_dataset('x', data=np.arange(999), **hdf5plugin.Zstd())\n"
        "with h5py.File(sys.argv[1], 'r') as f: assert f['x'][:].sum() == 498501\n"
    )
    try:
        with tempfile.TemporaryDirectory(dir=path, prefix=".hpc-ddpm-doctor-") as folder:
            done = _python_says("-c", code, f"{folder}/probe.h5")
    except OSError as error:
        yield Finding("path", "fail", f"{path}: cannot write here ({error.strerror})", "choose another --path")
        return
    if done.returncode:
        last = _last_line(done)
        advice = "set HDF5_USE_FILE_LOCKING=FALSE in the profile's environment" if "lock" in last else "see the message"
        yield Finding("hdf5", "fail", f"{path}: {last}", advice)
    else:
        yield Finding("hdf5", "pass", f"zstd filter and file locking work in {path}")


def _space(path: Path) -> Iterator[Finding]:
    if not path.is_dir():
        return
    free_gib = shutil.disk_usage(path).free / GIB
    status = "pass" if free_gib > LITTLE_SPACE_GIB else "warn"
    advice = (
        "" if status == "pass" else "`hpc-ddpm estimate CONFIG` says what checkpoints take; `checkpoint prune` frees"
    )
    yield Finding("space", status, f"{free_gib:.0f} GiB free in {path} (quotas not seen)", advice)

"""What this rank computes on: its GPU or CPU, the precision that is fast and right there, and freed memory."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ddpm.errors import ClusterError, ConfigError
from hpc_ddpm.files import private_folder, writing_to

if TYPE_CHECKING:
    import torch

    from hpc_ddpm.distributed import Ranks

KNOWN_BAD_CUDNN = range(90_800, 91_500)
"""bf16 conv3d is wrong up to 9.10 (pytorch#163539); PyTorch goes round these up to 9.14, slowly (pytorch#166643)."""
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
"""Variables that name the folders in which compilers keep what they made; a submitted job sets them."""
BAD_CPU_DEPTH = 2
"""bf16 weight gradients of conv3d hold uninitialised memory at this depth (seen in PyTorch 2.13, AVX512-BF16)."""

WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""What ONEDNN_MAX_CPU_ISA can be where oneDNN has no bf16 instructions to use."""


def give_back_freed_memory() -> None:
    """Let glibc return every freed block of 1 MiB or more to the system; elsewhere do nothing.

    By default its threshold rises to 32 MiB while a process runs, and smaller tensors then come from a heap that keeps
    what is freed: the process grows by up to twice what its tensors take.
    """
    mmap_threshold = -3  # malloc.h
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next allocation; elsewhere do nothing.

    By default it returns them to the system, and activations on a CPU cost a page fault per 4 KiB each time they
    are made: a tenth of a denoising step.
    """
    mmap_max, trim_threshold = -4, -1  # malloc.h
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def local_device(ranks: Ranks) -> torch.device:
    """This rank's GPU, or the CPU where there is none (or HPC_DDPM_DEVICE=cpu asks for it).

    From here on fp32 is fp32 in this process: PyTorch computes convolutions on GPUs in TF32 by default.

    Raises:
        ClusterError: fewer visible GPUs than ranks on this node, or a compiler's cache that is not ours.
    """
    import torch

    _see_that_caches_are_ours()
    if os.environ.get("HPC_DDPM_DEVICE") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    index = ranks.local_rank if visible > 1 else 0
    if index >= visible or (visible == 1 and ranks.local_world_size > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ):
        raise ClusterError(
            f"{ranks.local_world_size} ranks on this node but {visible} visible GPU(s); start one rank per GPU "
            "or set HPC_DDPM_DEVICE=cpu"
        )
    if visible == 1 and ranks.local_world_size > 1 and ranks.local_rank == 0:
        _warn_of_hidden_gpus(ranks)
    torch.cuda.set_device(index)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", index)


def _warn_of_hidden_gpus(ranks: Ranks) -> None:
    """The ranks of a node that see one GPU each work, but without NVLink; parts of a GPU (MIG) have none anyway."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
        warnings.warn(
            f"rank {ranks.rank} sees one GPU, while its node runs {ranks.local_world_size} ranks: either they share "
            "it, or the other GPUs are hidden (as `srun --gpus-per-task=1` does) and NCCL falls back from NVLink to "
            f"host memory; start one task per GPU with --gpus-per-node={ranks.local_world_size}, so that each sees all",
            stacklevel=3,
        )


def _see_that_caches_are_ours() -> None:
    """Compiled code is loaded from these folders of a shared /tmp, of which each node has its own.

    Raises:
        ClusterError: another user has made one, or it cannot be made.
    """
    folders = {Path(os.environ[name]).parent for name in CACHES if name in os.environ}
    for folder in folders:
        if folder.name == f"hpc_ddpm-{os.getuid()}":
            with writing_to(folder, "scratch in the cluster profile"):
                private_folder(folder)


def resolve_precision(precision: str, device: torch.device, depths: Sequence[int] = ()) -> str:
    """`auto` to `bf16` where the device computes it fast and right, else `fp32`.

    Args:
        precision: as set.
        device: of this rank.
        depths: for training, voxels along Z at every level of the network.

    Raises:
        ConfigError: bf16 asked for where cuDNN, or PyTorch on a CPU, is known to compute it wrongly.
    """
    import torch

    if device.type == "cpu" and BAD_CPU_DEPTH in depths:
        if precision == "bf16":
            raise ConfigError(
                f"a level of the network is {BAD_CPU_DEPTH} voxels deep (Z), where PyTorch computes bf16 weight "
                "gradients wrongly on CPUs; set training.precision=fp32, or another data.size or fewer levels"
            )
        return "fp32" if precision == "auto" else precision
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    is_bad = cudnn is not None and cudnn in KNOWN_BAD_CUDNN
    if precision == "bf16" and is_bad:
        raise ConfigError(
            f"cuDNN {cudnn} computes bf16 conv3d wrongly, or PyTorch does without it; install 9.15 or newer, "
            "or precision=fp32"
        )
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision=fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if precision != "auto":
        return precision
    return "bf16" if not is_bad and is_bf16_fast(device) else "fp32"


def is_bf16_fast(device: torch.device) -> bool:
    """Whether bf16 runs in hardware: Ampere or newer GPUs, CPUs with AVX512-BF16 or AMX."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return has_native_bf16()


def has_native_bf16() -> bool:
    """Whether oneDNN computes bf16 in hardware on this CPU, by AVX512-BF16 or AMX; ONEDNN_MAX_CPU_ISA may forbid it.

    Elsewhere PyTorch emulates bf16, many times as slowly as fp32 and with other memory for its work.
    """
    import torch

    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if limit.upper() in WITHOUT_BF16:
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes convolutions of this type on this CPU.

    A trial decides: besides the CPU's instructions, `ONEDNN_MAX_CPU_ISA` may forbid it. Without oneDNN, PyTorch
    multiplies matrices, which is slow and takes more memory.
    """
    import torch

    volume = torch.zeros(1, 1, 1, 1, 1, dtype=dtype)
    try:
        torch.mkldnn_convolution(volume, volume, None, [0, 0, 0], [1, 1, 1], [1, 1, 1], 1)
    except RuntimeError:
        return False
    return True

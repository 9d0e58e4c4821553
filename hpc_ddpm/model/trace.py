"""One training step without data: the real network on tensors that have shapes but no values.

Every operation of forward and backward is seen as PyTorch dispatches it, so a change of the network, of a
checkpointing policy or of a dtype changes the counts by itself. Nothing here needs a GPU or much memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from hpc_ddpm.config import Config
from hpc_ddpm.device import has_onednn
from hpc_ddpm.model.unet3d import build_unet

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Trace:
    """What one micro step of one volume costs; gradients of parameters are left out, weights too."""

    forward_flops: int
    """As torch.utils.flop_counter counts: convolutions, matrix products, attention; 2 per multiply-add."""
    flops: int
    """Forward and backward, with what the checkpointing policy recomputes."""
    saved_bytes: int
    """Alive between forward and backward: the batch and what backward needs."""
    peak_bytes: int
    """Most that is alive at any instant."""
    largest_numel: int
    """Elements of the largest tensor."""
    host_bytes: int
    """Activations that wait for backward in the host's memory; no other figure here counts them."""
    workspace_bytes: int
    """What the largest convolution takes beside its input and output. An estimate; see `_workspace`."""


@dataclass(frozen=True)
class Forward:
    """One evaluation for sampling, of one volume."""

    flops: int
    peak_bytes: int
    workspace_bytes: int


def trace_step(config: Config, dtype: torch.dtype, device_type: str = "cuda") -> Trace:
    """Forward and backward of one volume under the configured checkpointing policy.

    Args:
        config: complete; its data section gives the shapes.
        dtype: of weights and activations.
        device_type: `cpu` follows the network's CPU code paths, anything else the GPU's.
    """
    watch = _Watch(lays_out=_lays_out(dtype, device_type))
    with _no_values(device_type) as device:
        network = _network(config, dtype, device)
        with watch:
            batch = example_batch(config, config.data.training_shape, device)
            loss = example_loss(network, batch)
            forward_flops, saved = watch.flops, watch.live
            loss.backward()
    return Trace(forward_flops, watch.flops, saved, watch.peak, watch.largest_numel, watch.host, watch.workspace)


def trace_forward(config: Config, dtype: torch.dtype, device_type: str = "cuda") -> Forward:
    """One evaluation of the network without gradient, as in sampling."""
    watch = _Watch(lays_out=_lays_out(dtype, device_type))
    with _no_values(device_type) as device, torch.no_grad():
        network = _network(config, dtype, device).eval()
        with watch:
            x_start, _, condition, timesteps = example_batch(config, config.data.spatial_shape, device)
            network(x_start, condition, timesteps)
    return Forward(watch.flops, watch.peak, watch.workspace)


def count_parameters(config: Config) -> int:
    """Parameters of the network that `config` describes."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_unet(config).parameters())


def example_batch(
    config: Config, shape: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean volume, noise, condition and timestep of one sample (D, H, W), as the training loop holds them."""
    volume = (1, config.data.num_modalities, *shape)
    x_start, noise = (torch.zeros(volume, device=device) for _ in range(2))
    condition = torch.zeros(1, config.data.num_labels, *volume[2:], device=device)
    return x_start, noise, condition, torch.zeros(1, dtype=torch.long, device=device)


def example_loss(network: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The training loss, with the tensors that the real one makes on its way."""
    x_start, noise, condition, timesteps = batch
    x_t = x_start * 0.5 + noise * 0.5
    output = network(x_t, condition.clone(), timesteps)
    return F.l1_loss(output, noise, reduction="none").flatten(1).mean(1).mean()


def release_gradients(network: torch.nn.Module) -> None:
    """Let go of each parameter's gradient when it is complete, as DeepSpeed does when it takes it over."""

    def release(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(release)


def _network(config: Config, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network = build_unet(config).train()
    finally:
        torch.set_default_dtype(before)
    release_gradients(network)
    return network


@contextlib.contextmanager
def _no_values(device_type: str) -> Iterator[torch.device]:
    """CPU tensors without memory, or meta tensors, which take every branch that is not the CPU's."""
    with FakeTensorMode() if device_type == "cpu" else contextlib.nullcontext():
        yield torch.device("cpu" if device_type == "cpu" else "meta")


def _lays_out(dtype: torch.dtype, device_type: str) -> bool:
    """Whether PyTorch lays out a convolution's input as a matrix: on CPUs that lack what oneDNN needs for the type."""
    return device_type == "cpu" and dtype != torch.float32 and not has_onednn(dtype)


def _workspace(x: Tensor, weight: Tensor, out: Tensor, *, lays_out: bool) -> int:
    """Bytes that a convolution takes beside its input and output.

    Libraries reorder both, which makes a second copy. A matrix holds the input once for each element of the kernel.
    """
    if lays_out:
        return weight[0].numel() * out[:, 0].numel() * x.itemsize
    return x.nbytes + out.nbytes


class _Watch(TorchDispatchMode):
    """Counts FLOPs and the bytes of all storages that are alive."""

    def __init__(self, *, lays_out: bool) -> None:
        super().__init__()
        self._lays_out = lays_out
        self.flops = self.live = self.peak = self.largest_numel = self.host = self.workspace = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        is_on_host = packet is torch.ops.aten.empty_like and args[0].is_meta and kwargs.get("device") == HOST
        if is_on_host:
            kwargs = kwargs | {"device": args[0].device, "pin_memory": False}
        out = func(*args, **kwargs)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        if packet is torch.ops.aten.convolution:
            self.workspace = max(self.workspace, _workspace(args[0], args[1], out, lays_out=self._lays_out))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.largest_numel = max(self.largest_numel, value.numel())
                self._add(value.untyped_storage(), is_on_host=is_on_host)
        return out

    def _add(self, storage: torch.UntypedStorage, *, is_on_host: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: object) -> None:
            del self._storages[key]
            self.live -= 0 if is_on_host else size

        self._storages[key] = weakref.ref(storage, gone)
        self.host += size if is_on_host else 0
        self.live += 0 if is_on_host else size
        self.peak = max(self.peak, self.live)

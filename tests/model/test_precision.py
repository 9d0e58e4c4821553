"""What is float32 whatever the weights are: GroupNorm's statistics, attention's softmax, the loss.

The inputs are exact in bf16 and fp16, and chosen so that these parts in half precision would be far off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_ddpm.diffusion.gaussian import diffusion_loss
from hpc_ddpm.model import norm as norm_module
from hpc_ddpm.model.attention import AttentionBlock
from hpc_ddpm.model.norm import GroupNormSiLU

HALVES = [torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
GROUPS, CHANNELS = 2, 8


def far_from_zero(dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """100s with a few 101s: their mean lies between two numbers of bf16 and is 200 standard deviations from zero."""
    generator = torch.Generator().manual_seed(0)
    x = 100 + (torch.rand(2, CHANNELS, 4, 6, 6, generator=generator) < 0.3).float()
    return x.to(dtype).contiguous(memory_format=layout)


def close(found: Tensor, exact: Tensor) -> bool:
    """Within 2 % of the largest value."""
    return bool((found.double() - exact).abs().max() < 0.02 * exact.abs().max())


def rounded_normalise(
    x: Tensor, *options: Any, exact: Callable[..., tuple[Tensor, Tensor, Tensor]] = norm_module._normalise
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = exact(x, *options)
    return y, mean.to(x.dtype), rstd.to(x.dtype)


@pytest.mark.parametrize("kernel", ["CPU", "contiguous only", "rounds its statistics"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_group_norm_statistics(
    dtype: torch.dtype, layout: torch.memory_format, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels of CPUs, and as those of GPUs are."""
    monkeypatch.setattr(norm_module, "CPU_CHUNK", 2 * 2 * CHANNELS * 6 * 6)  # two slices at a time
    if kernel == "contiguous only":
        monkeypatch.setattr(norm_module, "_has_kernel", lambda x: False)
    elif kernel == "rounds its statistics":
        monkeypatch.setattr(norm_module, "_normalise", rounded_normalise)
        monkeypatch.setattr(norm_module, "_has_exact_backward", lambda x: False)
    norm, x = GroupNormSiLU(GROUPS, CHANNELS), far_from_zero(dtype, layout).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    norm = norm.to(dtype)
    parameters = [norm.weight, norm.bias]
    grad = torch.randint(-2, 3, x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad = grad.contiguous(memory_format=layout)
    y = norm(x)
    found = torch.autograd.grad(y, [x, *parameters], grad)
    exact_inputs = [value.detach().double().requires_grad_() for value in (x, *parameters)]
    exact_y = F.silu(F.group_norm(exact_inputs[0], GROUPS, *exact_inputs[1:]))
    exact = torch.autograd.grad(exact_y, exact_inputs, grad.double())
    assert y.dtype == dtype and close(y, exact_y.detach()) and close(norm.recompute(x)(), exact_y.detach())
    for name, value, truth in zip(("input", "weight", "bias"), found, exact, strict=True):
        assert close(value, truth), f"gradient by {name}"


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_normalises_with_exact_statistics(dtype: torch.dtype) -> None:
    block, x = AttentionBlock(CHANNELS, GROUPS, None).to(dtype), far_from_zero(dtype).requires_grad_()
    y = block.norm(x.flatten(2))
    grad = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, *_ = torch.autograd.grad(y, [x], grad)
    exact_x = x.detach().double().requires_grad_()
    exact_y = F.group_norm(exact_x.flatten(2), GROUPS)
    exact, *_ = torch.autograd.grad(exact_y, [exact_x], grad.double())
    assert y.dtype == dtype and close(y, exact_y.detach()) and close(found, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_softmax(dtype: torch.dtype) -> None:
    """Scores of 4096 that differ by a fraction of one: in half precision they are all the same."""
    channels = 64
    block = AttentionBlock(channels, 1, None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (1, channels, 4, 4, 4), generator=generator) * 2.0 - 1
    x[:, 1::2] = -x[:, ::2]  # mean 0, variance 1: the norm changes nothing
    identity = torch.eye(channels)
    with torch.no_grad():
        query, key = 0.5 * identity, identity.clone()
        query[0], key[0] = 0, 0
        block.qkv.weight.copy_(torch.cat([query, key, identity])[..., None])
        block.qkv.bias.zero_()
        block.qkv.bias[0], block.qkv.bias[channels] = 64, 512
        block.proj_out.weight.copy_(identity[..., None])
        update = block.to(dtype)(x.to(dtype)).double() - x.double()
        exact = block.double()(x.double()) - x.double()
    assert close(update, exact)


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
@pytest.mark.parametrize("dtype", HALVES)
def test_loss(dtype: torch.dtype, loss: str) -> None:
    """Differences that half precision cannot see beside the values, and more of them than it can count."""
    target = torch.full((1, 1, 32, 32, 32), 1.0) + 2**-12
    found = diffusion_loss(torch.ones_like(target, dtype=dtype), target, loss)
    exact = {"l1": 2**-12, "l2": 2**-24, "huber": 2**-25}[loss]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, rel=1e-3)

import pytest
import torch
import torch.nn.functional as F

from hpc_ddpm.model import norm as norm_module
from hpc_ddpm.model.norm import GroupNormSiLU

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def example(layout: torch.memory_format, dtype: torch.dtype = torch.float64) -> tuple[GroupNormSiLU, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = GroupNormSiLU(3, 12).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(12, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(12, generator=generator))
    x = (3 * torch.randn(2, 12, 4, 5, 6, generator=generator) + 2).to(dtype)
    return norm, x.contiguous(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("native", [True, False])
def test_values_and_gradients_are_group_norm_then_silu(
    layout: torch.memory_format, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:  # the path for accelerators whose kernels need contiguous volumes
        monkeypatch.setattr(norm_module, "_has_kernel", lambda x: False)
    norm, x = example(layout, torch.float32)
    grad = torch.randn(x.shape).contiguous(memory_format=layout)
    y = norm(x)
    found = torch.autograd.grad(y, [x, norm.weight, norm.bias], grad)
    expected_y = F.silu(F.group_norm(x.double(), 3, norm.weight.double(), norm.bias.double()))
    expected = torch.autograd.grad(expected_y, [x, norm.weight, norm.bias], grad.double())
    assert y.is_contiguous(memory_format=layout)
    for value, truth in zip((y, *found), (expected_y, *expected), strict=True):
        torch.testing.assert_close(value.double(), truth.double(), rtol=1e-4, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_statistics_are_float32(layout: torch.memory_format) -> None:
    norm, x = example(layout, torch.bfloat16)
    shifted = (x.detach() + 30).requires_grad_()  # bf16 statistics would lose the variance beside this mean
    y = norm(shifted)
    assert y.dtype == torch.bfloat16
    exact = F.silu(F.group_norm(shifted.double(), 3, norm.weight.double(), norm.bias.double()))
    assert (y.double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recompute_repeats_forward(layout: torch.memory_format) -> None:
    norm, x = example(layout, torch.float32)
    assert torch.equal(norm.recompute(x)(), norm(x))


@pytest.mark.parametrize("shape", [(1, 64, 128, 128, 128), (1, 64, 144, 192, 192), (2, 128, 144, 192, 192)])
def test_parts_on_a_gpu_are_neither_many_nor_large(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device="meta")
    part = x.split(norm_module._slices(x), 2)[0]
    assert 4 << 20 < part.numel() <= norm_module.GPU_CHUNK == 1 << 24

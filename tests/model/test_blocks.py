import math

import pytest
import torch
import torch.nn.functional as F

from hpc_ddpm.model.blocks import Conv3d, Upsample, conv3, timestep_embedding


def test_time_embedding_is_cosines_then_sines_of_falling_frequency() -> None:
    found = timestep_embedding(torch.tensor([0, 137]), 6, max_period=1000.0)
    angles = [137 * 1000 ** (-index / 3) for index in range(3)]
    expected = [[1, 1, 1, 0, 0, 0], [*map(math.cos, angles), *map(math.sin, angles)]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert timestep_embedding(torch.tensor([5]), 7, 1000.0)[0, -1] == 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_shift_adds_to_every_voxel_and_the_layout_stays(batch: int, channels_last: bool) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    conv, x = conv3(3, 5), torch.randn(batch, 3, 4, 4, 6).contiguous(memory_format=layout)
    shift = torch.randn(batch, 5)
    y = conv(x, shift)
    torch.testing.assert_close(y, F.conv3d(x, conv.weight, conv.bias, padding=1) + shift[..., None, None, None])
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_small_volume_in_halves_is_the_same_convolution(kernel_size: int) -> None:
    conv = Conv3d(16, 24, kernel_size=kernel_size, padding=kernel_size // 2)
    x = torch.randn(1, 16, 12, 16, 16, requires_grad=True)
    assert conv._is_slow_for(x) and not conv._is_slow_for(x[:, :, :11]) and not conv._is_slow_for(x.bfloat16())
    found, expected = conv(x), F.conv3d(x, conv.weight, conv.bias, padding=kernel_size // 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grad, wanted = torch.randn_like(expected), [x, conv.weight, conv.bias]
    pairs = zip(torch.autograd.grad(found, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_upsampling_interpolates_between_voxel_centres() -> None:
    block = Upsample(1)
    with torch.no_grad():
        block.conv.weight.zero_()[0, 0, 1, 1, 1] = 1
        block.conv.bias.zero_()
    ramp = torch.tensor([0.0, 4.0]).expand(1, 1, 2, 2, 2)
    assert block(ramp)[0, 0, 0, 0].tolist() == [0, 1, 3, 4]

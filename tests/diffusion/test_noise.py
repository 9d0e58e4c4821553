import pytest
import torch

from hpc_ddpm.config import DiffusionConfig
from hpc_ddpm.diffusion import NoiseSource, draw_training, mix64, sample_noise

CONFIG = DiffusionConfig(condition_dropout=0.25)
SHAPE = (2, 4, 4, 4)


def test_mix64_separates_neighbours_and_order() -> None:
    keys = {mix64(seed, index) for seed in range(50) for index in range(200)}
    assert len(keys) == 10_000 and max(keys) < 2**64
    assert mix64(1, 2) != mix64(2, 1) and mix64(0) != mix64(0, 0)
    flipped = [bin(mix64(7, 1 << bit) ^ mix64(7, 0)).count("1") for bit in range(64)]
    assert 24 < sum(flipped) / 64 < 40  # each input bit changes half of the output bits
    assert mix64(3, 5) == 0x57A2D2CEF1214168  # runs must stay reproducible across versions


def test_a_draw_depends_on_the_sample_not_on_its_batch() -> None:
    whole = draw_training(7, range(6), SHAPE, CONFIG)
    for rank in range(2):
        mine = draw_training(7, range(rank, 6, 2), SHAPE, CONFIG)
        assert torch.equal(mine.timesteps, whole.timesteps[rank::2])
        assert torch.equal(mine.noise, whole.noise[rank::2])
        assert torch.equal(mine.keep, whole.keep[rank::2])


def test_other_seeds_and_samples_draw_differently() -> None:
    noise = torch.stack([draw_training(seed, [index], SHAPE, CONFIG).noise for seed in (0, 1) for index in (0, 1)])
    assert (torch.cdist(noise.flatten(1), noise.flatten(1)) + 99 * torch.eye(4)).min() > 1


def test_draws_have_the_right_distributions() -> None:
    draw = draw_training(0, range(20_000), (1, 1, 1, 2), CONFIG)
    counts = draw.timesteps.bincount(minlength=250)
    assert len(counts) == 250 and counts.min() > 40 and counts.max() < 125  # 80 expected, sigma 9
    assert (~draw.keep).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert draw.noise.mean().item() == pytest.approx(0, abs=0.02)
    assert draw.noise.std().item() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(torch.stack([draw.timesteps.double(), draw.keep.double(), draw.noise[:, 0, 0, 0, 0]]))
    assert (correlation - torch.eye(3)).abs().max() < 0.03


def test_no_dropout_keeps_every_condition() -> None:
    assert draw_training(0, range(500), (1, 1, 1, 1), DiffusionConfig()).keep.all()


def test_streams_continue_and_start_like_sample_noise() -> None:
    source = NoiseSource([4, 2**40 + 4])  # seeds that share their lower 32 bits
    first, second = source((2, 3, 5)), source((2, 3, 5))
    assert torch.equal(first, sample_noise((3, 5), [4, 2**40 + 4]))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    with pytest.raises(ValueError, match="3 samples asked of 2 streams"):
        source((3, 1))

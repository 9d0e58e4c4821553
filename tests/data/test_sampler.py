import pytest

from hpc_ddpm.data.sampler import StepBatches, dataset_index
from hpc_ddpm.errors import ConfigError


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    epochs = [[dataset_index(3, epoch * 7 + i, 7) for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [dataset_index(4, i, 7) for i in range(7)]
    assert dataset_index(3, 10**12, 7) in range(7)


def test_the_order_is_fixed_for_good() -> None:
    assert [dataset_index(0, i, 5) for i in range(10)] == [2, 4, 3, 0, 1, 1, 4, 3, 0, 2]


def steps_of(world_size: int, micro_batch: int, start: int, count: int) -> list[list[int]]:
    """The samples of each step in global order, put together from all ranks."""
    ranks = [StepBatches(5, 0, start, count, 8, micro_batch, rank, world_size) for rank in range(world_size)]
    lists = [list(batches) for batches in ranks]
    assert all(len(batches) == len(found) for batches, found in zip(ranks, lists, strict=True))
    micro_steps = 8 // (micro_batch * world_size)
    return [
        [
            index
            for micro in range(micro_steps)
            for rank in range(world_size)
            for index in lists[rank][step * micro_steps + micro]
        ]
        for step in range(count)
    ]


def test_all_world_sizes_see_the_same_samples_per_step() -> None:
    expected = [[dataset_index(0, step * 8 + i, 5) for i in range(8)] for step in range(2, 5)]
    for world_size in (1, 2, 4):
        for micro_batch in (1, 2):
            assert steps_of(world_size, micro_batch, 2, 3) == expected


def test_sample_indices_name_what_is_drawn() -> None:
    batches = StepBatches(5, 1, 3, 1, 8, 2, 1, 2)
    assert batches.accumulation == 2
    assert [list(batches.sample_indices(3, micro)) for micro in range(2)] == [[26, 27], [30, 31]]
    assert list(batches) == [[dataset_index(1, i, 5) for i in pair] for pair in ((26, 27), (30, 31))]


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"training.global_batch=6 is not a multiple of micro_batch x ranks = 2 x 2"):
        StepBatches(5, 0, 0, 1, 6, 2, 0, 2)

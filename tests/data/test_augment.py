import numpy as np
import pytest
import torch
from scipy import ndimage

from hpc_ddpm.config import AugmentConfig, load_config
from hpc_ddpm.data.augment import _draw_affine, _voxel_noise, augment
from hpc_ddpm.errors import ConfigError

EVERYTHING = AugmentConfig(
    flip_probability=(0.5, 0.5, 0.5),
    affine_probability=0.7,
    bias_field_probability=0.7,
    contrast_probability=0.7,
    gamma_probability=0.7,
    noise_probability=0.7,
)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three samples of two modalities, (D, H, W) = (12, 10, 8), with labels in a block and background around it."""
    image = torch.full((3, 2, 12, 10, 8), -1.0)
    image[..., 2:10, 2:8, 1:7] = torch.rand(3, 2, 8, 6, 6, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    mask = torch.zeros((3, 12, 10, 8), dtype=torch.uint8)
    mask[:, 2:10, 2:8, 1:7] = 1
    mask[:, 4:8, 3:6, 2:5] = 200
    return image, mask


def test_off_by_default(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    image, mask = augment(*batch, [0, 1, 2], 0, AugmentConfig())
    assert image is batch[0]
    assert mask is batch[1]


def test_a_sample_is_changed_alike_in_any_batch(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    image, mask = batch
    together = augment(image, mask, [7, 8, 9], 3, EVERYTHING)
    for position, sample in enumerate((7, 8, 9)):
        alone = augment(image[position : position + 1], mask[position : position + 1], [sample], 3, EVERYTHING)
        assert torch.equal(alone[0][0], together[0][position])
        assert torch.equal(alone[1][0], together[1][position])
    for samples, seed in (([8, 9, 10], 3), ([7, 8, 9], 4)):
        assert not torch.equal(augment(image, mask, samples, seed, EVERYTHING)[0], together[0])
    assert (together[0].shape, together[0].dtype) == (image.shape, torch.float32)
    assert (together[1].shape, together[1].dtype) == (mask.shape, torch.uint8)
    assert set(together[1].unique().tolist()) == {0, 1, 200}


@pytest.mark.parametrize(("axis", "dim"), [(0, 4), (1, 3), (2, 2)])
def test_flips_are_exact_and_axes_are_those_of_the_nifti(
    batch: tuple[torch.Tensor, torch.Tensor], axis: int, dim: int
) -> None:
    chances = [0.0, 0.0, 0.0]
    chances[axis] = 1
    image, mask = augment(*batch, [0, 1, 2], 0, AugmentConfig(flip_probability=tuple(chances)))
    assert torch.equal(image, batch[0].flip(dim))
    assert torch.equal(mask, batch[1].flip(dim - 1))


def test_the_affine_is_that_of_scipy(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    config = AugmentConfig(
        affine_probability=1,
        rotation_degrees=(10, 20, 30),
        zoom_range=(0.8, 1.3),
        translation_voxels=(2, 3, 1),
        flip_probability=(0, 1, 0),
    )
    rng = np.random.Generator(np.random.PCG64([5, 11, 1]))
    rng.random(4)
    matrix, offset = _draw_affine(rng, np.array([False, True, False]), config)
    image, mask = augment(batch[0][:1], batch[1][:1], [11], 5, config)
    centre = (np.array([8, 10, 12]) - 1) / 2
    offset = centre + offset - matrix @ centre
    for found, before, order, outside in (
        (image[0, 1], batch[0][0, 1], 1, -1),
        (mask[0], batch[1][0], 0, 0),
    ):
        expected = ndimage.affine_transform(
            before.numpy().T, matrix, offset, order=order, mode="grid-constant", cval=outside
        )
        np.testing.assert_allclose(found.numpy().T, expected, atol=1e-5)
    assert np.linalg.det(matrix) < 0


def test_translation_is_in_voxels_along_its_axis(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    still = {"rotation_degrees": (0, 0, 0), "zoom_range": (1, 1)}
    config = AugmentConfig(affine_probability=1, translation_voxels=(0, 0, 2), **still)
    image, mask = augment(*batch, [0, 1, 2], 0, config)
    moved = [torch.nonzero(one)[:, 0].float().mean() - 5.5 for one in mask]
    assert all(0 < abs(shift) <= 2 for shift in moved)
    assert torch.equal(mask.amax(dim=(0, 1)), batch[1].amax(dim=(0, 1)))
    for channel in image.unbind(1):
        assert channel[mask == 0].mean() < channel[mask > 0].mean()


@pytest.mark.parametrize("name", ["bias_field", "contrast", "gamma", "noise"])
def test_intensities_change_and_background_does_not(batch: tuple[torch.Tensor, torch.Tensor], name: str) -> None:
    image, mask = augment(*batch, [0, 1, 2], 0, AugmentConfig(**{f"{name}_probability": 1}))
    background = batch[0] == -1
    assert (image[background] == -1).all()
    assert (image != batch[0])[~background].float().mean() > 0.99
    assert image.abs().max() <= 1
    assert 0.001 < (image - batch[0]).abs()[~background].mean() < 0.4
    assert torch.equal(mask, batch[1])
    assert not torch.equal(image[0, 0] - batch[0][0, 0], image[0, 1] - batch[0][0, 1])


def test_extreme_settings_stay_in_range(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    config = AugmentConfig(contrast_probability=1, brightness_offset=3, noise_probability=1, noise_std=5)
    image, _ = augment(*batch, [0, 1, 2], 0, config)
    assert image.abs().max() <= 1
    assert (image[batch[0] == -1] == -1).all()


def test_voxel_noise_is_about_normal_and_fixed_for_good() -> None:
    noise, other = (_voxel_noise((32, 32, 32), key, torch.device("cpu")).flatten() for key in (1, 2))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert 2.5 < (noise**4).mean() < 3
    for neighbour in (noise.roll(1), noise.roll(32), noise.roll(1024), other):
        assert abs((noise * neighbour).mean()) < 0.02
    bytes_of_first = (noise[:4] * 147.8005).round().int() + 510
    assert bytes_of_first.tolist() == [280, 340, 326, 410]


@pytest.mark.gpu
def test_cpu_and_gpu_change_alike(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image, mask = augment(*batch, [7, 8, 9], 3, EVERYTHING)
    on_gpu = augment(batch[0].cuda(), batch[1].cuda(), [7, 8, 9], 3, EVERYTHING)
    torch.testing.assert_close(on_gpu[0].cpu(), image, rtol=1e-4, atol=1e-4)
    assert (on_gpu[1].cpu() != mask).float().mean() < 1e-3


def test_wrong_ranges() -> None:
    with pytest.raises(ConfigError, match=r"augment: zoom_range: the smallest comes first, found 1.2 and 0.8"):
        load_config(None, ["augment.zoom_range=1.2,0.8"])
    with pytest.raises(ConfigError, match=r"augment.flip_probability=2: .*less than or equal to 1"):
        load_config(None, ["augment.flip_probability=[0,2,0]"])

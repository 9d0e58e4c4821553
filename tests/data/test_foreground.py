"""The brain is told from the background in images as they come, and refused where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.case import open_case
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.foreground import above_background, brain
from hpc_ddpm.data.preprocess import prepare, prepare_mask
from hpc_ddpm.errors import DataFormatError

SHAPE = (30, 36, 32)
PATH = Path("t1.nii")


def ball(radius: float = 0.8, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    axes = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij")
    return np.asarray(sum(np.square(axis) for axis in axes) < radius**2)


def scan(seed: int = 0) -> np.ndarray:
    """A brain without skull: smooth texture from 100 to 900, background 0."""
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2)
    texture = 500 + 400 * texture / np.abs(texture).max()
    return np.where(ball(), texture, 0).astype(np.float32)


def with_minus_one(image: np.ndarray) -> np.ndarray:
    image[0, 0, 0] = -1
    return image


def with_noise(image: np.ndarray) -> np.ndarray:
    return image + np.abs(np.random.default_rng(1).normal(0, 1e-3, SHAPE)).astype(np.float32)


def as_z_scores(image: np.ndarray) -> np.ndarray:
    """Z-scores by the brain alone; the background stays 0, in the middle of the values."""
    inside = image > 0
    return np.where(inside, (image - image[inside].mean()) / image[inside].std(), 0).astype(np.float32)


def as_z_scores_of_all(image: np.ndarray) -> np.ndarray:
    return (image - image.mean()) / image.std()


def with_ringing(image: np.ndarray) -> np.ndarray:
    """What a spline leaves around a brain: 1e-4 of its values, beyond which the background is 0."""
    near = ndimage.binary_dilation(image > 0, iterations=3)
    return np.where(near & (image == 0), 0.01, image).astype(np.float32)


def bright_background(image: np.ndarray) -> np.ndarray:
    return image - 1024


@pytest.mark.parametrize(
    "change", [with_minus_one, with_noise, as_z_scores, as_z_scores_of_all, with_ringing, bright_background]
)
def test_the_brain_is_the_same_however_the_image_is_scaled(change: Callable[[np.ndarray], np.ndarray]) -> None:
    inside = above_background(change(scan()))
    assert inside is not None
    assert int((inside != ball()).sum()) == 0


def test_an_even_background_gives_every_voxel_above_it() -> None:
    """As Med-DDPM has it: specks stay, and so do holes."""
    image = scan()
    image[15, 18, 16] = 0
    image[1, 1, 1] = 5
    inside = above_background(image)
    assert inside is not None
    np.testing.assert_array_equal(inside, image > 0)


@pytest.mark.parametrize("flat", [False, True], ids=["textured", "flat"])
def test_a_field_of_view_inside_the_brain_is_refused(flat: bool) -> None:
    image = scan() if not flat else np.where(ball(), 300, 0).astype(np.float32)
    crop = image[6:24, 8:28, 7:25]
    assert (crop > 0).mean() > 0.9
    assert above_background(crop) is None
    with pytest.raises(DataFormatError, match=r"t1.nii: the brain cannot be told .* wider field of view") as refused:
        brain([None], PATH)
    assert refused.value.kind == "brain-unclear"


def test_a_field_of_view_that_touches_the_brain_will_do() -> None:
    image, (z, y, x) = scan(), ndimage.find_objects(ball().astype(int))[0]
    inside = above_background(image[z, y, x])
    assert inside is not None
    np.testing.assert_array_equal(inside, ball()[z, y, x])


def test_other_modalities_help_and_contradict() -> None:
    usual, small = ball(), ball(0.3)
    np.testing.assert_array_equal(brain([usual, usual, small], PATH), usual)
    np.testing.assert_array_equal(brain([None, usual, usual, small], PATH), usual)
    np.testing.assert_array_equal(brain([usual, None, None], PATH), usual)
    with pytest.raises(DataFormatError, match=r"voxels differ from its background, \d+ in the other modalities"):
        brain([small, usual, usual, usual], PATH)
    np.testing.assert_array_equal(brain([small, usual], PATH), small)  # who is right?


def test_pack_check_and_sample_have_the_same_brain(write: Callable[..., Path], tmp_path: Path) -> None:
    tumour = np.zeros(SHAPE, np.uint8)
    tumour[12:16, 14:18, 14:18] = 1
    names = {1: "tumour", 2: "brain"}
    config = DataConfig(
        size=SHAPE[::-1], modalities=("t1", "t2"), labels={"names": names, "foreground_label": 2}, fit="exact"
    )
    images = {
        "t1": write(tmp_path / "t1.nii", with_noise(scan())),
        "t2": write(tmp_path / "t2.nii", as_z_scores(scan(1))),
    }
    subject = Subject("s", write(tmp_path / "m.nii", tumour), images)
    packed = prepare(subject, config).mask
    np.testing.assert_array_equal(packed, np.where(tumour == 1, 1, 2 * ball()))
    np.testing.assert_array_equal(open_case(subject, config).labels, packed)
    np.testing.assert_array_equal(prepare_mask(subject.mask, config, tuple(images.values()))[0], packed)
    with pytest.raises(DataFormatError, match=r"label 2 \(brain\) is missing"):
        prepare_mask(subject.mask, config)

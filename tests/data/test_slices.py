"""Planes, orientation, lesion centre, colours and similarity, against cases known by construction."""

import numpy as np
import pytest

from hpc_ddpm.data.slices import (
    Case,
    crop_to_mask,
    grey_window,
    label_colours,
    labels_by_size,
    lesion_centre,
    orthogonal_slices,
    outlined_labels,
    plane_sizes_mm,
    voxel_correlation,
)

SHAPE = (5, 6, 7)


def make_case(mask, **changes):
    volume = np.zeros((1, *mask.shape), np.float32)
    fields = {"real": volume, "synthetic": volume, "voxel_size_mm": (1.0, 2.0, 3.0), "modality_names": ["t1"]}
    return Case("case", mask, **(fields | changes))


def test_planes_show_anterior_superior_up_and_left_left():
    z, y, x = np.indices(SHAPE)
    centre = (2, 3, 4)
    axial, coronal, sagittal = orthogonal_slices(y, centre)
    assert axial.shape == (6, 7) and coronal.shape == (5, 7) and sagittal.shape == (5, 6)
    assert axial[0, 0] == 5 and axial[-1, 0] == 0 and (coronal == 3).all()
    assert list(sagittal[0]) == [0, 1, 2, 3, 4, 5]
    axial, coronal, sagittal = orthogonal_slices(z, centre)
    assert (axial == 2).all() and list(coronal[:, 0]) == list(sagittal[:, 0]) == [4, 3, 2, 1, 0]
    assert list(orthogonal_slices(x, centre)[0][0]) == [0, 1, 2, 3, 4, 5, 6]


def test_plane_sizes_follow_the_voxel_size():
    assert plane_sizes_mm((1, *SHAPE), (1.0, 2.0, 3.0)) == [(7, 12), (7, 15), (12, 15)]


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAS", "PIR", "SLA"])
def test_every_orientation_is_turned_to_ras(orientation):
    ras = np.arange(np.prod(SHAPE), dtype=np.uint8).reshape(SHAPE)
    world = {"R": (2, 1), "L": (2, -1), "A": (1, 1), "P": (1, -1), "S": (0, 1), "I": (0, -1)}
    turns = [world[code] for code in orientation[::-1]]
    stored = ras.transpose([axis for axis, _ in turns])[tuple(slice(None, None, sign) for _, sign in turns)]
    sizes = tuple({2: 1.0, 1: 2.0, 0: 3.0}[world[code][0]] for code in orientation)
    case = make_case(stored, synthetic=stored[None].astype(np.float32), voxel_size_mm=sizes, orientation=orientation)
    turned = case.to_ras()
    np.testing.assert_array_equal(turned.mask, ras)
    np.testing.assert_array_equal(turned.synthetic[0], ras)
    assert turned.voxel_size_mm == (1.0, 2.0, 3.0) and turned.real.shape == (1, *SHAPE)
    assert turned.orientation == "RAS"


def test_centre_is_in_the_largest_piece_of_the_rarest_label():
    mask = np.ones((16, 16, 16), np.uint8)
    mask[2, 2, 2] = mask[13, 13, 13] = 2
    mask[8:11, 4:7, 5:8] = 2
    z, y, x = lesion_centre(mask)
    assert 8 <= z < 11 and 4 <= y < 7 and 5 <= x < 8
    assert lesion_centre(np.zeros((4, 6, 8), np.uint8)) == (2, 3, 4)


def test_labels_are_ordered_by_volume_and_small_ones_outlined():
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[:5], mask[5:8], mask[8, 0], mask[8, 1, :3] = 4, 9, 1, 3
    assert labels_by_size([mask]) == [4, 9, 1, 3]
    assert labels_by_size([mask, np.full((20, 10, 10), 3, np.uint8)]) == [3, 4, 9, 1]
    assert outlined_labels(mask) == [1, 3]
    assert outlined_labels(np.ones((2, 2, 2), np.uint8)) == [1]


def test_crop_keeps_the_mask_and_a_margin_in_mm():
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[9:11, 9:11, 9:11] = 1
    cropped = crop_to_mask(make_case(mask), margin_mm=4.0)
    assert cropped.mask.shape == (2 + 2 * 2, 2 + 2 * 2, 2 + 2 * 4)  # voxels of 3, 2, 1 mm
    assert cropped.real.shape[1:] == cropped.synthetic.shape[1:] == cropped.mask.shape
    assert cropped.mask.sum() == 8
    empty = make_case(np.zeros(SHAPE, np.uint8))
    assert crop_to_mask(empty) is empty


@pytest.mark.parametrize("n", [0, 1, 2, 4, 9, 30])
def test_colours_are_distinct_and_the_last_is_the_accent(n):
    colours = label_colours(n)
    assert len(colours) == len(set(colours)) == n
    assert all(0 <= part <= 1 for colour in colours for part in colour)
    if n > 1:
        assert colours[-1] == label_colours(2)[-1] and colours[0] == label_colours(1)[0]


def test_grey_window_is_that_of_the_real_volume():
    mask = np.ones((4, 4, 4), np.uint8)
    real = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    low, high = grey_window(make_case(mask, real=real, synthetic=5 * real), 0)
    assert -1 <= low < -0.9 and 0.9 < high <= 1
    low, high = grey_window(make_case(mask, real=None, synthetic=5 * real), 0)
    assert low < -4.5 and high > 4.5
    low, high = grey_window(make_case(mask), 0)
    assert high > low


def test_correlation_inside_and_overall():
    rng = np.random.default_rng(0)
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[2:6, 2:6, 2:6] = 1
    real = np.where(mask > 0, rng.normal(size=(2, 8, 8, 8)), -5)
    assert voxel_correlation(real, 3 * real + 1, mask) == pytest.approx((1, 1))
    assert voxel_correlation(real, -real, mask) == pytest.approx((-1, -1))
    noise = np.where(mask > 0, rng.normal(size=(2, 8, 8, 8)), -5)
    found = voxel_correlation(real, noise, mask)
    expected = np.mean([np.corrcoef(real[c][mask > 0], noise[c][mask > 0])[0, 1] for c in range(2)])
    assert found.inside == pytest.approx(expected) and found.overall > 0.7
    assert np.isnan(voxel_correlation(real, np.zeros_like(real), mask)).all()
    assert np.isnan(voxel_correlation(real, real, np.zeros_like(mask)).inside)

"""Real DICOM files, written with pydicom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

COSINES = np.array([[0.0, 0.8, -0.6], [1.0, 0.0, 0.0]])  # rising column, rising row; LPS
NORMAL = np.cross(*COSINES)
FIRST = np.array([-10.0, 20.0, 5.0])
SPACING, DISTANCE = (1.5, 0.5), 2.0  # between rows, between columns; between slices


def write_slice(path: Path, pixels: np.ndarray, height: float, series: str, **tags: Any) -> None:
    """One (rows, columns) int16 slice, `height` mm along the normal."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.StudyInstanceUID, file.SeriesInstanceUID, file.Modality = "1.2.3", series, "MR"
    file.ImagePositionPatient = [f"{v:.6f}" for v in FIRST + height * NORMAL]
    file.ImageOrientationPatient, file.PixelSpacing = COSINES.ravel().tolist(), list(SPACING)
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 1
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = pixels.astype("<i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def write_series(
    folder: Path, volume: np.ndarray, slopes: Sequence[float] = (), series: str = "1.2.3.4", name: str = "{:03d}.dcm"
) -> Path:
    """(slices, rows, columns), under names that say nothing of the order."""
    for number, pixels in enumerate(volume):
        scale = {"RescaleSlope": slopes[number], "RescaleIntercept": -100} if len(slopes) else {}
        path = folder / name.format(number * 7 % len(volume))
        write_slice(path, pixels, number * DISTANCE, series, InstanceNumber=1, **scale)
    return folder


def true_affine() -> np.ndarray:
    """Columns, rows, slices to mm, RAS."""
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = COSINES[0] * 0.5, COSINES[1] * 1.5, NORMAL * DISTANCE
    affine[:3, 3] = FIRST
    return np.diag([-1, -1, 1, 1]) @ affine

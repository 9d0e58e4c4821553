"""NIfTI-1, NIfTI-2, MGH and pairs of .hdr and .img through nibabel, which sees no more than the header promises."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from numpy.typing import NDArray

from hpc_ddpm.data.bounded import check_size, is_gzipped, read_head, unpack
from hpc_ddpm.data.formats import GZIPPED, PAIR, Header, pair_of
from hpc_ddpm.data.header_text import identifying_fields
from hpc_ddpm.errors import DataFormatError

Affine = NDArray[np.float64]
HEAD_BYTES = 540
"""Size of the longest header, that of NIfTI-2."""
MM = {1: 1000.0, 3: 0.001}
"""Codes of metre and micron; all others count as mm."""
nib.imageglobals.logger.setLevel(logging.CRITICAL + 1)  # what it warns of is checked here, and told in one line
MAGIC = (b"n+1\0", b"ni1\0")


def read_array(path: Path) -> tuple[NDArray[Any], Affine]:
    """Voxels (X, Y, Z[, C]) with scale factors applied, and the affine to mm.

    Raises:
        DataFormatError: it is ANALYZE.
        Exception: whatever nibabel meets in a damaged file.
    """
    header, (_, voxels) = open_header(path), pair_of(path)
    sides = [int(side) for side in header.get_data_shape()]
    if min(sides, default=0) < 1:
        raise ValueError(f"it gives itself the shape {sides}")
    promised = header.get_data_offset() + math.prod(sides) * header.get_data_dtype().itemsize
    if is_gzipped(voxels):
        return np.asanyarray(ArrayProxy(unpack(voxels, promised), header)), affine_of(header)
    check_size(voxels, promised)
    with voxels.open("rb") as file:
        return np.asanyarray(ArrayProxy(file, header)), affine_of(header)


def read_facts(path: Path) -> Header:
    """What the header says; raises as `read_array` does."""
    header, (first, voxels) = open_header(path), pair_of(path)
    slope, offset = header.get_slope_inter()
    codes = [int(header[name]) for name in ("sform_code", "qform_code") if name in header]
    return Header(
        tuple(map(int, header.get_data_shape())),
        (1.0 if slope is None else float(slope), offset or 0.0) != (1.0, 0.0),
        any(codes) or not codes,
        identifying_fields(header, first),
        _two_places(header) if codes and all(codes) else 0.0,
        path.suffix.lower() not in PAIR and is_gzipped(voxels) != path.name.lower().endswith(GZIPPED),
    )


def open_header(path: Path) -> Any:
    """Nibabel's header.

    Raises:
        DataFormatError: it is ANALYZE.
        Exception: whatever nibabel meets in a damaged file.
    """
    first, voxels = pair_of(path)
    if not first.is_file() or not voxels.is_file():
        absent = first if not first.is_file() else voxels
        raise DataFormatError(f"{absent}: no such file; check the path", "missing-file")
    head = read_head(first, HEAD_BYTES)
    if not head:
        raise EOFError("0 bytes")
    if head.startswith(b"\x1f\x8b"):
        raise ValueError("gzipped twice: unpack it once")
    if path.name.lower().endswith((".mgh", ".mgz")):
        return _checked(nib.freesurfer.mghformat.MGHHeader, head)
    is_second = 540 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    if path.suffix.lower() not in PAIR:
        return _checked(nib.Nifti2Header if is_second else nib.Nifti1Header, head)
    if not is_second and head[344:348] not in MAGIC:
        raise DataFormatError(
            f"{path}: ANALYZE 7.5 found, which does not say where left is; convert the original images to NIfTI "
            "(from DICOM: dcm2niix)",
            "unreadable",
        )
    return _checked(nib.nifti2.Nifti2PairHeader if is_second else nib.nifti1.Nifti1PairHeader, head)


def _checked(kind: Any, head: bytes) -> Any:
    size = kind.template_dtype.itemsize if kind is not nib.freesurfer.mghformat.MGHHeader else kind._hdrdtype.itemsize
    if len(head) < size:
        raise EOFError(f"a header of {size} bytes expected, {len(head)} found")
    return kind(head[:size])


def affine_of(header: Any) -> Affine:
    """(4, 4), X, Y, Z voxels to mm."""
    affine = np.array(header.get_best_affine(), np.float64)
    affine[:3] *= _mm(header)
    return affine


def _mm(header: Any) -> float:
    if "xyzt_units" not in header:
        return 1.0
    return MM.get(int(header["xyzt_units"]) & 7, 1.0)


def _two_places(header: Any) -> float:
    """Largest distance in mm between the corners of the grid by sform and by qform."""
    ends = [(0, int(side) - 1) for side in header.get_data_shape()[:3]]
    corners = np.vstack([np.array(np.meshgrid(*ends)).reshape(len(ends), -1), np.ones(2 ** len(ends))])
    apart = (header.get_sform() - header.get_qform()) @ corners
    return float(np.linalg.norm(apart[:3], axis=0).max()) * _mm(header)

"""What sampling.json and a sidecar hold, as far as somebody reads it; more is kept as it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from hpc_ddpm.files import FileName, InnerPath
from hpc_ddpm.sealed import Count, Finite

OPEN = ConfigDict(extra="allow")


@with_config(OPEN)
class MadeBy(TypedDict):
    """Weights."""

    path: str
    sha256: str


@with_config(OPEN)
class Fidelity(TypedDict):
    """Settings of `sampling.fidelity`."""

    reject_below: Finite


@with_config(OPEN)
class Identity(TypedDict):
    """Settings that decide what a volume is."""

    fidelity: Fidelity


@with_config(OPEN)
class MadeWith(TypedDict):
    """sampling.json."""

    seed: int
    weights: MadeBy
    identity: Identity
    config: dict[str, Any]


@with_config(OPEN)
class Try(TypedDict):
    """A rejected one."""

    attempt: Count
    seed: Count
    fidelity: Finite


@with_config(OPEN)
class Sidecar(TypedDict):
    """sidecar/ID.json."""

    id: FileName
    mask_id: FileName
    mask: str
    layout: str
    replica: Count
    seed: Count
    covariates: NotRequired[dict[str, float | str]]
    planned_seed: Count
    attempt: Count
    rejected: list[Try]
    mask_sha256: str
    mask_changes: list[str]
    mask_coding: str
    fidelity: Finite | None
    fidelity_method: str | None
    voxels_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    files: NotRequired[dict[InnerPath, str]]
    packed: NotRequired[dict[str, str]]
    weights: MadeBy
    sampling: dict[str, Any]
    precision: Literal["float32", "bfloat16", "float16"]
    device: str
    threads: Count
    versions: dict[str, str]
    seconds: Finite

"""Every setting of the toolkit: its type, default, meaning and limits."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hpc_ddpm.errors import ConfigError


class Section(BaseModel):
    """A group of settings: frozen, and unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]


def _as_texts(value: Any) -> Any:
    """Numbers among names as text: [1.5, 3] is what a table with 1.5 and 3 holds."""
    if not isinstance(value, list | tuple):
        return value
    return [f"{part:g}" if isinstance(part, int | float) and not isinstance(part, bool) else part for part in value]


Categories = Annotated[tuple[str, ...], BeforeValidator(_as_texts)]


class LabelsConfig(Section):
    """The label scheme of the masks: which integer means what, and how it becomes condition channels."""

    names: dict[int, str] = Field(default={1: "head", 2: "tumour"}, min_length=1)
    """Label value -> name. Each gets one condition channel, in this order; 0 is background and has none."""
    coding: Literal["auto", "as_named", "brats2021", "brats2023", "brats2024", "brats_ped"] = "auto"
    """What the values on disk mean: what `names` says, or BraTS until 2021, of 2023, of 2024, of children.

    auto: by what all masks and their images hold; where that does not tell, packing asks."""
    remap: dict[int | Literal["*"], int] = {}
    """Applied to the values on disk before anything else, for example {4: 3}; unlisted values stay.

    "*" is every value that is neither listed nor in `names`: {"*": 0} makes the rest background."""
    foreground_label: int | None = None
    """Given to unlabelled voxels where the first modality is above its background (BraTS: 4 = brain)."""
    off_value: float = 0.0
    """Value of a condition channel outside its label (Med-DDPM: 0 for BraTS, -1 for whole head)."""
    on_value: float = 1.0
    """Value of a condition channel inside its label."""

    @model_validator(mode="after")
    def _check(self) -> LabelsConfig:
        bad = [value for value in self.names if not 1 <= value <= 255]
        if bad:
            raise ValueError(f"label values must be 1..255 (0 is background), found {bad}")
        if self.foreground_label is not None and self.foreground_label not in self.names:
            raise ValueError(f"foreground_label {self.foreground_label} is not one of names {list(self.names)}")
        if self.off_value == self.on_value:
            raise ValueError("off_value and on_value are equal: the mask would be invisible to the network")
        return self


class CovariateConfig(Section):
    """Something else to condition on, besides the mask: a number with mean and std, or one of some values."""

    mean: float | None = None
    """The mean of a number, about; the network sees (value - mean) / std."""
    std: float | None = Field(default=None, gt=0)
    """The standard deviation of a number, about."""
    values: Categories = ()
    """The categories, as they stand in the table."""

    @model_validator(mode="after")
    def _check(self) -> CovariateConfig:
        is_number = self.mean is not None and self.std is not None
        if is_number == bool(self.values) or (self.mean is None) != (self.std is None):
            raise ValueError("a covariate has either mean and std (a number) or values (categories)")
        if len(set(self.values)) != len(self.values) or len(self.values) == 1:
            raise ValueError(f"values must be two or more different ones, found {list(self.values)}")
        return self


class HookConfig(Section):
    """A program that every image goes through before anything else; a plain list is its command."""

    command: tuple[str, ...] = Field(min_length=1)
    """Program and arguments; `{image}` and `{output}`, each an argument of its own, become NIfTI paths."""
    modalities: Names = ()
    """Images that it is for; none named is all."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"command": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _check(self) -> HookConfig:
        absent = [name for name in ("{image}", "{output}") if name not in self.command[1:]]
        if absent:
            raise ValueError(f"command {list(self.command)} has no argument {' and no '.join(absent)}")
        return self


READING_SETTINGS = frozenset({"path", "num_workers", "patch_size", "cache", "stage_dir", "group"})
"""Settings of DataConfig that say how a packed dataset is read and divided. All others decide what is packed."""


class DataConfig(Section):
    """What is packed and how it reaches the network."""

    path: str = ""
    """Packed dataset (a directory with index.json) that training and sampling read."""
    layout: Literal[
        "auto", "table", "tree", "nnunet", "decathlon", "bids", "freesurfer", "brats_raw", "cases", "chaos", "flat"
    ] = "auto"
    """How the source is organised, see the table in docs/data.md; auto finds out."""
    names: dict[str, Names] = {}
    """Words for a role (mask or a modality) at the end of files' names, instead of the usual: {t1ce: [T1gad]}."""
    modalities: Names = ("t1",)
    """Image channels, in order."""
    size: tuple[int, int, int] = (128, 128, 128)
    """Packed size in voxels, (X, Y, Z) of the oriented NIfTI."""
    orientation: str = Field(default="RAS", pattern=r"^[LRAPSI]{3}$|^native$")
    """Axis codes every volume is brought to, or `native` to keep the file's own order."""
    hooks: tuple[HookConfig, ...] = ()
    """Programs that images go through first, such as bias-field correction; run by `pack`, in this order."""
    voxel_size_mm: tuple[float, float, float] | None = None
    """Resample to this voxel size, (X, Y, Z) after orientation, before the fit; null keeps the file's."""
    fit: Literal["crop_pad", "resize", "exact"] = "crop_pad"
    """How a volume of another size becomes `size`: crop/pad, resample the field of view, or refuse."""
    crop_center: Literal["volume", "head"] = "volume"
    """Middle of crop_pad: of the volume, or of the box around what is not background."""
    normalization: Literal["percentile", "window", "zscore", "med_ddpm_whole_head", "med_ddpm_brats", "none"] = (
        "percentile"
    )
    """Intensities to [-1, 1]: percentiles, a window (HU), mean and std in the head, or Med-DDPM's own two ways."""
    low: float = 0.5
    """Lower percentile, or lower end of the window."""
    high: float = 99.5
    """Upper percentile, or upper end of the window."""
    zscore_clip: float = Field(default=3.0, gt=0)
    """Standard deviations from the mean that become -1 and 1 under zscore."""
    storage_dtype: Literal["int16", "float32"] = "int16"
    """On disk: int16 (largest error 1.5e-5) or float32 (lossless)."""
    compression: Literal["lz4", "none"] = "lz4"
    """On disk; none where storage is faster than LZ4 decodes, such as node-local memory."""
    shard_size_gib: float = Field(default=1.0, gt=0)
    """Uncompressed volume data per HDF5 file, about."""
    chunk_size: tuple[int, int, int] | None = None
    """Voxels that are compressed and read together, (X, Y, Z); null is the whole volume. Set it for patches."""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of subjects held out (at least one where there are two), chosen by a hash of the subject id."""
    group: str = Field(default="auto", min_length=1)
    """Who stays in one split. auto: the patient, as layout, table or name tell; subject: everyone alone; else a
    column of the table, or a pattern with the patient in parentheses, such as '(P[0-9]+)_.*'."""
    num_workers: int = Field(default=2, ge=0)
    """Threads per rank that read ahead; 0 reads when a batch is needed."""
    patch_size: tuple[int, int, int] | None = None
    """Train on random crops of this size, (X, Y, Z); null is the whole volume. Sampling is always at full size."""
    cache: Literal["none", "ram"] = "none"
    """ram: every volume is decoded once and kept in memory, one copy per node for all ranks."""
    stage_dir: str = ""
    """Node-local folder that the shards are copied to before training, for example '$TMPDIR'; empty: read `path`."""
    labels: LabelsConfig = LabelsConfig()
    covariates: dict[Annotated[str, Field(pattern=r"^\w+$")], CovariateConfig] = {}
    """What else is known of a subject, from the source's table: {age: {mean: 50, std: 15}, sex: {values: [F, M]}}."""

    @property
    def num_modalities(self) -> int:
        """Channels of a volume."""
        return len(self.modalities)

    @property
    def num_labels(self) -> int:
        """Channels of a condition."""
        return len(self.labels.names)

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """(D, H, W) = (Z, Y, X), the network's order."""
        x, y, z = self.size
        return z, y, x

    @property
    def training_shape(self) -> tuple[int, int, int]:
        """(D, H, W) of what the network is trained on: the patch, or the whole volume."""
        x, y, z = self.patch_size or self.size
        return z, y, x

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if min(self.size) < 1:
            raise ValueError(f"size must be positive, found {self.size}")
        for name in ("chunk_size", "patch_size"):
            part = getattr(self, name)
            if part and not all(1 <= side <= whole for side, whole in zip(part, self.size, strict=True)):
                raise ValueError(f"{name} {list(part)} must lie between 1 and size {list(self.size)} on every axis")
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities must be distinct and at least one, found {list(self.modalities)}")
        if self.low >= self.high:
            raise ValueError(f"low must be below high, found {self.low} and {self.high}")
        if self.normalization == "percentile" and not 0 <= self.low < self.high <= 100:
            raise ValueError(f"percentiles must lie in 0..100, found {self.low} and {self.high}")
        if self.voxel_size_mm and min(self.voxel_size_mm) <= 0:
            raise ValueError(f"voxel_size_mm must be positive, found {self.voxel_size_mm}")
        if self.voxel_size_mm and self.fit == "resize":
            raise ValueError("fit=resize sets the voxel size itself; use voxel_size_mm=null or fit=crop_pad")
        if self.crop_center == "head" and self.fit != "crop_pad":
            raise ValueError(f"crop_center=head needs fit=crop_pad, found fit={self.fit}")
        reserved = {"subject", "participant_id", "mask", "split", *self.modalities} & set(self.covariates)
        if reserved:
            raise ValueError(f"covariates cannot be called {', '.join(sorted(reserved))}: those columns mean something")
        self._check_names()
        if "(" in self.group:
            _check_pattern("group", self.group)
        unknown = {name for hook in self.hooks for name in hook.modalities} - set(self.modalities)
        if unknown:
            raise ValueError(f"hooks are for {sorted(unknown)}, not among modalities {list(self.modalities)}")
        return self

    def _check_names(self) -> None:
        unknown = sorted(set(self.names) - {"mask", *self.modalities})
        if unknown:
            raise ValueError(f"names are for {unknown}, neither mask nor among modalities {list(self.modalities)}")
        empty = [role for role, words in self.names.items() if not words or not all(words)]
        if empty:
            raise ValueError(f"names of {empty} are empty; give how the files' names end")


def _check_pattern(name: str, pattern: str) -> None:
    """Raises ValueError where a regular expression is none, or has no group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is not a regular expression ({error})") from None
    if not groups:
        raise ValueError(f"{name} {pattern!r} has no part in parentheses to be the patient")


class ModelConfig(Section):
    """The 3-D U-Net. Input and output channels follow from the data section."""

    base_channels: int = Field(default=64, gt=0)
    channel_multipliers: tuple[int, ...] = Field(default=(1, 1, 2, 3, 4), max_length=16)
    """One per level; each level below the first halves every axis."""
    num_res_blocks: int = Field(default=1, gt=0)
    """Residual blocks per level on the way down (one more on the way up)."""
    attention_factors: tuple[int, ...] = ()
    """Downsampling factors (1, 2, 4, ...) whose levels have self-attention, besides the middle."""
    head_channels: int | None = Field(default=None, gt=0)
    """Channels per attention head; null is one head, as in Med-DDPM."""
    num_groups: int = Field(default=32, gt=0)
    """GroupNorm groups; must divide every level's channels."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    time_max_period: float = Field(default=1000.0, gt=1)
    """Longest period of the timestep embedding (Med-DDPM: 1000; guided-diffusion: 10000)."""
    activation_checkpointing: Literal["none", "norm", "block", "full", "auto"] = "none"
    """What backward recomputes: nothing, the norm+SiLU, each block, or each level and its blocks.

    auto: the least of these that fits into the memory that is free when training starts."""
    offload_activations: Literal["none", "cpu"] = "none"
    """With block or full: keep what is stored between forward and backward in the host's memory (no effect on CPUs)."""
    channels_last: bool = False
    """Keep activations in channels_last_3d: faster on CPUs; on a GPU, measure. Weights stay contiguous."""

    @property
    def downsampling_factor(self) -> int:
        """Every axis of a volume must be divisible by this."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.offload_activations != "none" and self.activation_checkpointing in {"none", "norm"}:
            raise ValueError(
                f"offload_activations=cpu needs activation_checkpointing=block, full or auto, found "
                f"{self.activation_checkpointing}"
            )
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive, found {list(self.channel_multipliers)}")
        for multiplier in self.channel_multipliers:
            channels = self.base_channels * multiplier
            if channels % self.num_groups:
                raise ValueError(
                    f"num_groups {self.num_groups} does not divide {channels} channels; "
                    f"largest that fits all levels: {math.gcd(self.base_channels, 32)}"
                )
        factors = [2**level for level in range(len(self.channel_multipliers))]
        wrong = [factor for factor in self.attention_factors if factor not in factors]
        if wrong:
            raise ValueError(f"attention_factors {wrong} are not among this network's levels {factors}")
        return self


class DiffusionConfig(Section):
    """The noising process and the training target."""

    schedule: Literal["cosine", "linear", "sigmoid"] = "cosine"
    num_timesteps: int = Field(default=250, gt=1)
    prediction_type: Literal["epsilon", "x_start", "v"] = "epsilon"
    loss: Literal["l1", "l2", "huber"] = "l1"
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Clip of the SNR in min-SNR loss weighting (Hang et al. 2023); null weights all timesteps alike."""
    condition_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of training samples whose mask is blanked, with all covariates unknown; guidance needs it above 0."""
    covariate_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Chance of each covariate of a training sample to be unknown, so that it may be left out when sampling."""


Probability = Annotated[float, Field(ge=0, le=1)]
Extent = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(gt=0)]


class AugmentConfig(Section):
    """Random changes of training volumes, drawn for each sample by itself. All are off by default.

    Axes are X, Y, Z of the oriented NIfTI. Intensities are meant on a scale from 0 (background) to 1, and each
    modality is changed by itself; background stays background.
    """

    flip_probability: tuple[Probability, Probability, Probability] = (0.0, 0.0, 0.0)
    """Chance of mirroring each axis; (0.5, 0, 0) swaps left and right of a head."""
    affine_probability: Probability = 0.0
    """Chance of a rotation, zoom and shift, in one interpolation."""
    rotation_degrees: tuple[Extent, Extent, Extent] = (10.0, 10.0, 10.0)
    """Largest rotation about each axis, either way."""
    zoom_range: tuple[Factor, Factor] = (0.9, 1.1)
    """Smallest and largest zoom; above 1 enlarges."""
    translation_voxels: tuple[Extent, Extent, Extent] = (5.0, 5.0, 5.0)
    """Largest shift along each axis, either way."""
    bias_field_probability: Probability = 0.0
    """Chance of a smooth change of brightness over the volume."""
    bias_field_strength: Extent = 0.3
    """Largest exponent s of the field, which multiplies by exp(-s) to exp(s)."""
    contrast_probability: Probability = 0.0
    """Chance of a factor and an offset."""
    contrast_range: tuple[Factor, Factor] = (0.9, 1.1)
    """Smallest and largest factor."""
    brightness_offset: Extent = 0.05
    """Largest offset, either way."""
    gamma_probability: Probability = 0.0
    """Chance of a power of the intensities."""
    gamma_range: tuple[Factor, Factor] = (0.7, 1.5)
    """Smallest and largest power; below 1 brightens."""
    noise_probability: Probability = 0.0
    """Chance of noise in every voxel that is not background."""
    noise_std: Extent = 0.05
    """Largest standard deviation of the noise."""

    @property
    def is_on(self) -> bool:
        """Whether anything can happen."""
        chances = (getattr(self, name) for name in type(self).model_fields if name.endswith("_probability"))
        return any(chance not in (0, (0, 0, 0)) for chance in chances)

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        for name in ("zoom_range", "contrast_range", "gamma_range"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the smallest comes first, found {low} and {high}")
        return self


class TrainingConfig(Section):
    """The optimizer, the sharding and what is written when."""

    num_steps: int = Field(default=100_000, gt=0)
    """Optimizer steps (Med-DDPM calls its micro steps "epochs")."""
    global_batch: int = Field(default=2, gt=0)
    """Volumes per optimizer step over all ranks; accumulation = global_batch / (micro_batch * ranks)."""
    micro_batch: int = Field(default=1, gt=0)
    """Volumes per forward pass on one rank."""
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = Field(default=1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    gradient_clip: float = Field(default=0.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 (with fp32 master weights) where the device is fast at it, else fp32."""
    compile: bool = False
    """Compile the network on GPUs with torch.compile; CPUs run it as it is. `bench tune` finds out whether it pays."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: partition nothing / optimizer state / + gradients / + parameters."""
    reduce_bucket_size: int = Field(default=5_000_000, gt=0)
    """Elements per gradient all-reduce; small, so that communication overlaps with backward."""
    """Also per all-gather; at stage 3 per prefetch."""
    overlap_comm: bool = True
    """Reduce gradients while backward still runs."""
    max_live_parameters: int = Field(default=50_000_000, gt=0)
    """Stage 3: whole parameters that one rank holds at a time, and elements per optimizer pass."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Stages 1 to 3: keep masters, moments and EMA in the host's memory, and step there (slow)."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Stage 3: keep the sharded weights in the host's memory."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """How slowly the average `ema` follows; sampling takes it by default. The newest weights' share is 1 - decay."""
    ema_warmup: bool = True
    """Start with a short memory, min(decay, (1 + n) / (10 + n)) after n updates."""
    ema_every_steps: int = Field(default=1, gt=0)
    ema_extra_decays: Numbers = ()
    """More averages of the same kind, called `ema_DECAY`; 4 bytes per parameter each, over all ranks."""
    ema_power_sigmas: Numbers = ()
    """Power-function averages of these relative widths (Karras et al. 2024), called `ema_power_SIGMA`."""
    log_every_steps: int = Field(default=10, gt=0)
    profile_steps: tuple[int, int] | None = None
    """First and last step that rank 0 profiles, counted from 1 at every start; `train --profile` is [3, 5]."""
    validate_every_steps: int = Field(default=0, ge=0)
    """How often the loss on the val split is measured, with the average `ema`; 0 is never."""
    validation_volumes: int = Field(default=32, gt=0)
    """Volumes of the val split that are used, at most."""
    preview_every_steps: int = Field(default=0, ge=0)
    """How often masks of the val split are sampled, with the average `ema` and `sampling.*`; 0 is never."""
    preview_volumes: int = Field(default=4, gt=0)
    """Masks of the val split that are used, at most."""
    checkpoint_every_steps: int = Field(default=1000, gt=0)
    keep_checkpoints: int = Field(default=3, gt=0)
    """The newest ones that stay."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Checkpoints of multiples of this step stay for good; 0 is off."""
    async_checkpoints: bool = True
    """Write in the background while training goes on, from a copy in the host's memory."""
    init_from: str = ""
    """Run or weights folder that training starts from, also with other modalities and labels; `train --from`."""
    freeze: Names = ()
    """Parameters or modules that stay as they are, by name: out, time_embed, 'input_blocks.[0-3]'."""
    max_bad_steps: int = Field(default=10, gt=0)
    """Steps in a row with a loss or gradient that is not finite (each is skipped) that roll the run back."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Roll-backs to the last good checkpoint, each with another data order, before the run ends."""
    hang_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest that a step, the validation and previews after it, or a save may take; then a rank counts as hanging."""
    allow_batch_change: bool = False
    """Let a resumed run change global_batch: it goes on at volume step * global_batch of the data order."""

    @property
    def ema_names(self) -> tuple[str, ...]:
        """The averages that a checkpoint holds; `ema` first."""
        extra = [f"ema_{decay:g}" for decay in self.ema_extra_decays]
        return ("ema", *extra, *(f"ema_power_{sigma:g}" for sigma in self.ema_power_sigmas))

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError("precision=fp16 needs zero_stage 1, 2 or 3: DeepSpeed accumulates in fp16 at stage 0")
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("offload_optimizer=cpu needs zero_stage 1, 2 or 3")
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(f"offload_parameters=cpu needs zero_stage=3, found {self.zero_stage}")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), found {list(self.betas)}")
        if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps are the first and last step, from 1, found {list(self.profile_steps)}")
        if any(not 0 <= decay < 1 for decay in self.ema_extra_decays):
            raise ValueError(f"ema_extra_decays must lie in [0, 1), found {list(self.ema_extra_decays)}")
        if any(not 0 < sigma < 0.28 for sigma in self.ema_power_sigmas):
            raise ValueError(f"ema_power_sigmas must lie in (0, 0.28), found {list(self.ema_power_sigmas)}")
        if len(set(self.ema_names)) != len(self.ema_names):
            raise ValueError(f"two averages have the same name: {', '.join(self.ema_names)}")
        return self

    def accumulation(self, world_size: int) -> int:
        """Micro steps per optimizer step at `world_size` ranks; raises ConfigError where it does not divide."""
        per_micro_step = self.micro_batch * world_size
        if self.global_batch % per_micro_step:
            raise ConfigError(
                f"training.global_batch={self.global_batch} is not a multiple of micro_batch x ranks = "
                f"{self.micro_batch} x {world_size} = {per_micro_step}; set training.global_batch="
                f"{per_micro_step * max(1, round(self.global_batch / per_micro_step))} or use other ranks"
            )
        return self.global_batch // per_micro_step


class OutputConfig(Section):
    """What is written of every generated volume."""

    formats: Annotated[
        tuple[Literal["nifti", "bids", "packed"], ...], BeforeValidator(_as_tuple), Field(min_length=1)
    ] = ("nifti",)
    """One folder per modality, a BIDS-derivatives tree in bids/, a packed dataset in packed/; several at once."""
    dtype: Literal["float32", "int16", "uint8"] = "float32"
    """The type of NIfTI voxels; integers carry the scale that gives the values back, and clip to the value range."""
    value_range: Literal["model", "unit", "zero_one"] = "model"
    """The range of NIfTI voxels: about [-1, 1] as the network gave them, clipped to [-1, 1], or [0, 1]."""
    original_grid: bool = False
    """Put NIfTI volumes back on the grid of the mask's file; outside the model's field of view is background."""
    mask_coding: Literal["packed", "brats_raw"] = "packed"
    """The values in NIfTI masks: the label scheme's values, or raw BraTS (0, 1, 2, 4; no brain label)."""
    compression_level: int = Field(default=1, ge=0, le=9)
    """The effort of gzip: 1 is fast, 9 is small."""
    num_writers: int = Field(default=2, gt=0)
    """Threads per worker that check, compress and write while the next volume is computed."""
    record_origin: bool = False
    """Name the host and absolute paths in sidecars; else paths are relative to the folder of masks that was given."""


class FidelityConfig(Section):
    """How well a volume follows its mask, and what happens to one that does not."""

    method: Literal["auto", "background", "segmenter", "none"] = "auto"
    """auto: the segmenter if one is given, else the background where the label scheme covers the whole brain."""
    segmenter: str = ""
    """TorchScript file, or MONAI bundle folder, that maps (1, C, ...) in [-1, 1] to labels or logits.

    It is a program that runs with your rights: what a generated set or imported weights name is not loaded."""
    segmenter_axes: Literal["zyx", "xyz"] = "zyx"
    """Order of the segmenter's spatial axes; MONAI bundles see xyz."""
    reject_below: float = Field(default=0.0, ge=0, le=1)
    """Volumes that score less are made again with the next seed; 0 keeps all."""
    max_tries: int = Field(default=3, gt=0)
    """Seeds per volume before it counts as failed."""


class SamplingConfig(Section):
    """How volumes are generated."""

    weights: str = "ema"
    """Which weights of a run: `ema`, another average (`ema_0.9999`, `ema_power_0.1`), or `master` (not averaged)."""
    sampler: Literal["ddpm", "ddim", "dpmpp_2m", "unipc", "deis", "ipndm", "heun"] = "dpmpp_2m"
    num_steps: int = Field(default=20, gt=0)
    """Network evaluations per volume; at most diffusion.num_timesteps. heun uses two per step; guidance doubles."""
    spacing: Literal["quadratic", "uniform", "logsnr", "karras"] = "quadratic"
    """Which timesteps are visited: dense at the end, even in the timestep, in log SNR, or as Karras et al. 2022."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Stochasticity of ddim: 0 deterministic, 1 as noisy as ddpm."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """1 is off; needs a model trained with diffusion.condition_dropout > 0."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at timesteps between these shares of the last one (0 clean, 1 noise); Kynkäänniemi et al. 2024."""
    clip_x_start: bool = True
    """Clamp the predicted clean volume to [-1, 1] at every step."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device is fast at it, else fp32."""
    batch_size: int = Field(default=1, gt=0)
    """Volumes that a worker holds at once: masks read ahead and, with `exact` false, computed in one batch."""
    exact: bool = True
    """The network sees one volume at a time, so that batches change no bit; false allows about 1e-4 in fp32."""
    compile: bool = False
    """Compile the network on GPUs with torch.compile; CPUs run it as it is."""
    replicas: int = Field(default=1, gt=0)
    """Volumes per mask."""
    mask_fit: Literal["resample", "refuse"] = "resample"
    """Masks of another grid, orientation or with labels missing: bring them to the model's grid, or refuse them."""
    output: OutputConfig = OutputConfig()
    fidelity: FidelityConfig = FidelityConfig()

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide what a volume is and how it is stored."""
        only_effort: dict[str, Any] = {
            "batch_size": True,
            "replicas": True,
            "mask_fit": True,
            "output": {"compression_level", "num_writers", "record_origin"},
            "fidelity": {"max_tries"},
        }
        return self.model_dump(mode="json", exclude=only_effort)

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval must be [low, high] with 0 <= low < high <= 1, found {[low, high]}")
        return self


class Config(Section):
    """One experiment, whole."""

    name: str = "custom"
    seed: int = Field(default=0, ge=0)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    augment: AugmentConfig = AugmentConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        factor = self.model.downsampling_factor
        for name, size in (("size", self.data.size), ("patch_size", self.data.patch_size or ())):
            if any(side % factor for side in size):
                near = [max(factor, round(side / factor) * factor) for side in size]
                raise ValueError(
                    f"data.{name} {list(size)} is not divisible by {factor} "
                    f"({len(self.model.channel_multipliers)} levels); nearest that is: {near}"
                )
        if self.sampling.num_steps > self.diffusion.num_timesteps:
            raise ValueError(
                f"sampling.num_steps {self.sampling.num_steps} exceeds diffusion.num_timesteps "
                f"{self.diffusion.num_timesteps}"
            )
        if self.sampling.guidance_scale != 1 and not self.diffusion.condition_dropout:
            raise ValueError("sampling.guidance_scale != 1 needs diffusion.condition_dropout > 0 in training")
        return self

    @property
    def training_depths(self) -> list[int]:
        """Voxels along Z of what the network is trained on, at each of its levels."""
        return [self.data.training_shape[0] // 2**level for level in range(len(self.model.channel_multipliers))]

    def dump(self) -> dict[str, Any]:
        """Plain values, as stored in a run directory."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Hash of all values (first 12 hexadecimal digits of SHA-256)."""
        return hashlib.sha256(json.dumps(self.dump(), sort_keys=True).encode()).hexdigest()[:12]

"""Programs that images go through before anything else: NIfTI in, NIfTI out, no shell."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.nifti import read_nifti, write_nifti
from hpc_ddpm.errors import ConfigError, DataFormatError


def check_hooks(config: DataConfig) -> None:
    """See that the programs are there.

    Raises:
        ConfigError: names those that are not.
    """
    absent = dict.fromkeys(hook.command[0] for hook in config.hooks if shutil.which(hook.command[0]) is None)
    if absent:
        raise ConfigError(f"data.hooks: no program {', '.join(absent)} found; install it, or give its full path")


@contextmanager
def hooked(image: Path, subject: str, modality: str, config: DataConfig) -> Iterator[Path]:
    """The image after the hooks for its modality, as a file that is gone afterwards; `image` itself if there are none.

    Raises:
        DataFormatError: a program failed or wrote nothing; names image, program, subject and its last words.
    """
    commands = [hook.command for hook in config.hooks if modality in (hook.modalities or config.modalities)]
    if not commands:
        yield image
        return
    with TemporaryDirectory(prefix="hpc_ddpm_hooks_") as folder:
        file = _as_nifti(image, Path(folder))
        for number, command in enumerate(commands):
            output = Path(folder) / f"{number}.nii.gz"
            if problem := _run(command, file, output):
                raise DataFormatError(
                    f"{image}: subject {subject}: {command[0]} of data.hooks {problem}; try it on this file by hand"
                )
            file = output
        yield file


def _as_nifti(image: Path, folder: Path) -> Path:
    """The image, converted where it is a DICOM series or another format."""
    if image.name.lower().endswith((".nii", ".nii.gz")):
        return image
    volume = read_nifti(image)
    write_nifti(folder / "image.nii.gz", volume.data, volume.affine)
    return folder / "image.nii.gz"


def _run(command: tuple[str, ...], image: Path, output: Path) -> str:
    """What went wrong, or nothing."""
    paths = {"{image}": str(image), "{output}": str(output)}
    arguments = [paths.get(argument, argument) for argument in command]
    try:
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
        )
    except OSError as error:
        return f"did not start ({error.strerror})"
    words = done.stderr.decode(errors="replace").strip().splitlines()
    last = words[-1].strip() if words else "it said nothing on stderr"
    if done.returncode:
        return f"ended with code {done.returncode}: {last}"
    return "" if output.is_file() else f"wrote no output file: {last}"

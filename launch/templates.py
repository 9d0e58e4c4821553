"""`hpc-ddpm templates`: the batch scripts of `slurm/`, for whoever has the installed package and no checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import hpc_ddpm
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.files import write_text, writing_to


def templates(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder that takes them.")] = Path("slurm"),
) -> None:
    """Write out the batch scripts for `sbatch`: train, sample, pack, scaling. Changed files are not replaced."""
    shipped = {path.name: path.read_text(encoding="utf-8") for path in sorted(templates_dir().glob("*.sbatch"))}
    with writing_to(out):
        for name, text in shipped.items():
            path = out / name
            if path.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
                raise ConfigError(f"{path}: there already, and not as shipped; move it away, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        for name, text in shipped.items():
            write_text(out / name, text)
            typer.echo(str(out / name))


def templates_dir() -> Path:
    """Inside the installed package, or the checkout's `slurm/`."""
    package = Path(hpc_ddpm.__file__).parent
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"

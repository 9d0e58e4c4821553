"""`hpc-ddpm sample compare`: quality against cost of the samplers, on a user's own model and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.options import Overrides, Quiet

SAMPLERS = "ddpm,ddim,dpmpp_2m,unipc,deis,ipndm,heun"


def compare_command(
    source: Annotated[Path, typer.Argument(help="Run directory or imported weights.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for table and figure; finished cells are kept.")],
    masks: Annotated[Path | None, typer.Option(help="Mask, folder of masks, or table.")] = None,
    split: Annotated[
        str, typer.Option(help="Without --masks: take the masks of this split of the packed data.")
    ] = "val",
    max_masks: Annotated[int, typer.Option(min=1, help="Use the first so many masks.")] = 4,
    samplers: Annotated[str, typer.Option(help="Comma-separated.")] = SAMPLERS,
    steps: Annotated[str, typer.Option(help="Network evaluations per volume, comma-separated.")] = "5,10,20,50",
    spacings: Annotated[str, typer.Option(help="Comma-separated; by default that of sampling.spacing.")] = "",
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Compare samplers and step counts on fixed masks and seeds: a table and a figure of quality against cost."""
    import torch

    from hpc_ddpm.distributed import detect_ranks, keep_freed_memory, local_device, resolve_precision
    from hpc_ddpm.files import writing_to
    from hpc_ddpm.sampling.compare import compare, grid
    from hpc_ddpm.sampling.run import masks_from_files, masks_from_packed
    from hpc_ddpm.weights import load_model
    from launch.progress import progress_bar

    keep_freed_memory()
    device = local_device(detect_ranks())
    model = load_model(source, overrides=list(overrides or []))
    config = model.config
    cells = grid(samplers.split(","), steps.split(","), (spacings or config.sampling.spacing).split(","))
    found = masks_from_files(masks, config) if masks else masks_from_packed(config.data.path, split)
    loaded = {mask_id: load()[0] for mask_id, load in list(found.items())[:max_masks]}
    is_bf16 = resolve_precision(config.sampling.precision, device) == "bf16"
    model = model.to(device, torch.bfloat16 if is_bf16 else torch.float32)
    with writing_to(out), progress_bar("comparing", show=not quiet) as update:
        compare(model, loaded, out, cells, on_cell=update)
    typer.echo((out / "table.md").read_text(encoding="utf-8"))
    typer.echo(f"figure: {out / 'figure.png'}")

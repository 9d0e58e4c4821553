"""Options that several commands share: one name, one meaning."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="Preset name or YAML file; `config ls` lists presets.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that win over the file."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Plain JSON on standard output.")]

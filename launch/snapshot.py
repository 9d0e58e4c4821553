"""A copy of the code beside the job, so that a job that waits for days runs what was submitted."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import hpc_ddpm
from hpc_ddpm.config import presets_dir
from hpc_ddpm.runlog import COMMIT_FILE, git_commit

LEAVE_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def take_snapshot(folder: Path) -> Path:
    """Copy both packages and the presets into `folder`, unless they are there; the folder to import them from."""
    package = Path(hpc_ddpm.__file__).parent
    launch = Path(__file__).parent
    commit = git_commit() or "unknown"
    target = folder / f"code-{_digest([package, launch, presets_dir()])}"
    if not target.is_dir():
        copy = target.with_suffix(".tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(package, copy / "hpc_ddpm", ignore=LEAVE_OUT)
        shutil.copytree(launch, copy / "launch", ignore=LEAVE_OUT)
        shutil.copytree(presets_dir(), copy / "hpc_ddpm" / "configs", dirs_exist_ok=True)
        (copy / "hpc_ddpm" / COMMIT_FILE).write_text(commit, encoding="utf-8")
        copy.rename(target)
    return target


def _digest(folders: list[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in {".py", ".yaml"}):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]

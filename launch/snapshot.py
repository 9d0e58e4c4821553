"""A copy of the code beside the job, so that a job that waits for days runs what was submitted."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

import hpc_ddpm
from hpc_ddpm.config import presets_dir
from hpc_ddpm.runlog import COMMIT_FILE, git_commit

NOT_FOR_OTHERS = stat.S_IWGRP | stat.S_IWOTH
LEAVE_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def take_snapshot(folder: Path) -> Path:
    """Copy both packages and the presets into `folder`, unless they are there; the folder to import them from."""
    package = Path(hpc_ddpm.__file__).parent
    launch = Path(__file__).parent
    commit = git_commit() or "unknown"
    name = f"code-{_digest([package, launch, presets_dir()])}"
    if there := next(filter(_is_ours, folder.glob(f"{name}*")), None):
        return there
    folder.mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(dir=folder, prefix=".code-"))
    try:
        shutil.copytree(package, copy / "hpc_ddpm", ignore=LEAVE_OUT)
        shutil.copytree(launch, copy / "launch", ignore=LEAVE_OUT)
        shutil.copytree(presets_dir(), copy / "hpc_ddpm" / "configs", dirs_exist_ok=True)
        (copy / "hpc_ddpm" / COMMIT_FILE).write_text(commit, encoding="utf-8")
        for path in copy.rglob("*"):
            path.chmod(path.stat().st_mode & ~NOT_FOR_OTHERS)
        copy.chmod(0o755)
        target = folder / name
        return copy.rename(target.with_name(f"{name}-{secrets.token_hex(4)}") if target.exists() else target)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have changed the code there: what is in it was closed before it got its name."""
    facts = path.lstat()
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & NOT_FOR_OTHERS


def _digest(folders: list[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in {".py", ".yaml"}):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]

"""Where words come in and errors go out: what a user or the system did is one line, a bug of ours a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence

from hpc_ddpm.distributed import end_mpi_ranks
from hpc_ddpm.errors import ConfigError, HpcDdpmError
from hpc_ddpm.text import has_control, show

ADVICE = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "these links lead in a circle; mend them",
    errno.ENOTDIR: "a file stands where a folder is meant; give another place",
    errno.EEXIST: "a file stands where a folder is meant; give another place",
    errno.EISDIR: "a folder stands where a file is meant; give another place",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "mend its permissions, or give another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, or give another place"),
}
"""What the system says of a path that was given. Others, such as a file that is gone, may be bugs of ours."""

_SETTING = re.compile(r"[a-z_]+(\.\w+)*\s*=", re.ASCII)


def check_words(words: Sequence[str]) -> None:
    """Words of a command line: settings may have several lines, names and paths may not.

    Raises:
        ConfigError: a control character, or a name that is not UTF-8: no script, log or record could hold it.
    """
    for word in words:
        if has_control(word) and not _SETTING.match(word):
            raise ConfigError(f"{show(word)} has a line break or another control character; rename it")
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise ConfigError(f"{show(word)} is not UTF-8; rename it")


def as_users_error(error: Exception) -> HpcDdpmError | None:
    """What the command line's parser or the system refused, as an error of ours; None for a bug."""
    if hasattr(error, "format_message"):  # of the parser, in all its versions
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), end="", file=sys.stderr)  # empty where the help was shown already
            return ConfigError()
        context = getattr(error, "ctx", None)
        command = (context.command_path if context else "").removeprefix("hpc-ddpm").strip()
        words = " ".join(filter(None, ("hpc-ddpm", command, "--help")))
        return ConfigError(f"{error.format_message().rstrip('.')}; `{words}` says what there is")
    if isinstance(error, OSError) and error.errno in ADVICE and error.filename is not None:
        name = show(os.fsdecode(error.filename))[1:-1]
        return HpcDdpmError(f"{name}: {error.strerror}; {ADVICE[error.errno]}")
    return None


def end(error: HpcDdpmError) -> None:
    """Print the message once, or once per rank if ranks differ, and end; under MPI the other ranks end too."""
    rank = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("SLURM_PROCID") or "0"
    if str(error) and (rank == "0" or not error.is_on_all_ranks):
        print(f"hpc-ddpm: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
    end_mpi_ranks(error.exit_code)
    sys.exit(error.exit_code)

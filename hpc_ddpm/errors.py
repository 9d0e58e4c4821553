"""The user's mistakes, as exceptions: the command line prints each as one line and exits with code 2.

Every other exception is a bug of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hpc_ddpm.text import one_line


class HpcDdpmError(Exception):
    """Base of all errors that the user can mend; the message says what was found, expected, and what to do."""

    exit_code = 2
    is_on_all_ranks = False
    """Every rank raises it, so it is enough that rank 0 says it."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class ConfigError(HpcDdpmError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""

    is_on_all_ranks = True


class DataFormatError(HpcDdpmError):
    """An input file or packed dataset is missing, damaged, or not what the configuration says."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        """Which finding of `data.check` it is, a key of `SOURCE_KINDS`; empty where it is none of them."""


class CheckpointError(HpcDdpmError):
    """Weights or a checkpoint are missing, damaged, or do not fit the network."""


class ClusterError(HpcDdpmError):
    """The process group, the scheduler or the environment of the ranks is not as needed."""


class LostRankError(ClusterError):
    """Another rank has died or hangs; the same command goes on from what is saved."""

    exit_code = 75  # EX_TEMPFAIL


class TrainingError(HpcDdpmError):
    """Training diverged and cannot go on by itself."""

    is_on_all_ranks = True


@contextmanager
def refusing(subject: str) -> Iterator[None]:
    """Let no fault in the work on one subject end the work on all: whatever it is, this subject is refused for it.

    Raises:
        DataFormatError: names the subject, and for a bug of ours also the line of code.
    """
    try:
        yield
    except HpcDdpmError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:200]
        raise DataFormatError(
            f"subject {subject}: {type(error).__name__}: {reason} (in {last.name}, line {last.lineno}); "
            "leave it out with --skip-bad, and report this",
            "cannot-pack",
        ) from error

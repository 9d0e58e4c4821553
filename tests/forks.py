"""Processes that need not load torch and DeepSpeed first: a server has loaded them, has one thread, and forks them.

What they run is `python ARGUMENTS` in every other respect; `Fork` is used as `subprocess.Popen` is.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self


class Server:
    """It ends with its `with` block, and with this process; what it started goes on."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self.address = f"{self._folder.name}/socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(listener.fileno())],
                env=dict(env),
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()
        self._folder.cleanup()


class Fork:
    """`python ARGUMENTS` in this folder: `-m MODULE …` or `FILE …`. Output goes to the files, or where ours goes."""

    def __init__(
        self,
        server: Server,
        arguments: list[str],
        env: Mapping[str, str],
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(server.address)
        request = json.dumps({"arguments": arguments, "env": dict(env), "cwd": str(Path.cwd())}).encode()
        outputs = [1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno()]
        sent = socket.send_fds(self._line, [request], outputs)
        self._line.sendall(request[sent:])
        self._line.shutdown(socket.SHUT_WR)
        self._answers = self._line.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.wait(0) if self.returncode is not None or select.select([self._line], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, at its end."""
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._line.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Where it still runs."""
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _serve(listener: socket.socket) -> list[str]:
    """Fork for every request until standard input ends. Returns in the forked processes: with what they are to run."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:
            os._exit(0)
        line, _ = listener.accept()
        if not os.fork():
            listener.close()
            return _become(line)
        line.close()


def _become(line: socket.socket) -> list[str]:
    """Fork once more: the first process waits for the second and tells how it ended."""
    first, outputs, _, _ = socket.recv_fds(line, 1 << 16, 2)
    request = json.loads(first + b"".join(iter(lambda: line.recv(1 << 16), b"")))
    if pid := os.fork():
        line.sendall(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more
            line.sendall(f"{code}\n".encode())
        os._exit(0)
    line.close()
    for descriptor, output in zip((0, 1, 2), (os.open(os.devnull, os.O_RDONLY), *outputs), strict=True):
        os.dup2(output, descriptor)
        os.close(output)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    return request["arguments"]


def _run(words: list[str]) -> int:
    """The exit code."""
    try:
        if words[0] == "-m":
            sys.argv[1:] = words[2:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _exit(code: int) -> None:
    """As Python ends, but for taking thousands of modules apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    import torch

    import launch.stages  # noqa: F401
    from hpc_ddpm.training import loop  # noqa: F401
    from hpc_ddpm.training.engine import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    import torch._inductor.compile_fx  # what DeepSpeed loads when it is first used
    import torch.utils.tensorboard

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"
    gc.freeze()  # the forked share what is loaded
    _exit(_run(_serve(socket.socket(fileno=int(sys.argv[1])))))

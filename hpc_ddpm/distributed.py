"""Who am I among the ranks, and how they agree. Works alone, under torchrun, mpirun and srun.

The facts come from the environment; nothing is guessed: a scheduler that started several tasks never ends
in several separate one-rank runs, and mpi4py is imported only where mpirun started us.
"""

from __future__ import annotations

import gc
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from hpc_ddpm.device import local_device
from hpc_ddpm.errors import ClusterError, HpcDdpmError, LostRankError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
FAILED = 1000
"""Above every signal number."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
LOST = re.compile(r"Connection (closed by peer|reset|refused)|[Tt]imed out|[Tt]imeout|NCCL (error|communicator)")
"""How torch says that another rank is gone."""
TIMEOUT_S = 1800.0
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OPEN_MPI_LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHED = "HPC_DDPM_LAUNCHED"
"""Set where this program starts ranks of its own."""
LAUNCHERS = (LAUNCHED, "TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""What the launchers of RANK and WORLD_SIZE set besides: this program, torchrun, DeepSpeed."""
PORTS = range(20_000, 32_000)
"""Below those that systems give to outgoing connections, from 32768 on: one of these may take a port at any time."""


@dataclass(frozen=True)
class Ranks:
    """This process among all: global and per-node index, and where rank 0 listens."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    started_by: str = "alone"
    master_addr: str = ""
    master_port: int = 0

    @property
    def is_main(self) -> bool:
        """Rank 0 writes what is written once."""
        return self.rank == 0


def detect_ranks(env: Mapping[str, str] | None = None) -> Ranks:
    """Read the rank facts that torchrun, mpirun (Open MPI, MPICH) or srun left in the environment.

    Raises:
        ClusterError: facts that contradict each other or are incomplete.
    """
    env = os.environ if env is None else env
    ranks = _from_scheduler(env)
    if "RANK" in env or "WORLD_SIZE" in env:
        if ranks and not any(name in env for name in LAUNCHERS):
            _check_agreement(ranks, env)
            ranks = _from_torchrun(env) if all(name in env for name in TORCHRUN_VARIABLES) else ranks
        else:
            ranks = _from_torchrun(env)
    if ranks is None:
        return Ranks()
    if not 0 <= ranks.rank < ranks.world_size:
        raise ClusterError(
            f"{ranks.started_by} says rank {ranks.rank} of {ranks.world_size}; restart all ranks together"
        )
    return ranks


def _from_scheduler(env: Mapping[str, str]) -> Ranks | None:
    """What mpirun or srun says of this process."""
    if "OMPI_COMM_WORLD_RANK" in env:
        return _from_mpirun(env, "OMPI_COMM_WORLD_{}", "OMPI_COMM_WORLD_LOCAL_{}")
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _from_srun(env)
    return _from_mpirun(env, "PMI_{}", "MPI_LOCAL{}") if "PMI_RANK" in env else None


def _check_agreement(ranks: Ranks, env: Mapping[str, str]) -> None:
    """Refuse what a shell exports beside what the scheduler says: every task would take itself for rank 0."""
    facts = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size}
    wrong = [f"{name}={env[name]}" for name, fact in facts.items() if name in env and env[name] != str(fact)]
    if wrong:
        raise ClusterError(
            f"{' and '.join(wrong)} set, but {ranks.started_by} started this as rank {ranks.rank} of "
            f"{ranks.world_size}; `unset {' '.join(RANK_VARIABLES)}` before, or start the ranks with torchrun"
        )


def _from_torchrun(env: Mapping[str, str]) -> Ranks:
    missing = [name for name in TORCHRUN_VARIABLES if name not in env]
    if missing:
        raise ClusterError(
            f"RANK or WORLD_SIZE is set but not {', '.join(missing)}; use torchrun, mpirun or srun, or unset them"
        )
    return Ranks(
        rank=_integer(env, "RANK"),
        world_size=_integer(env, "WORLD_SIZE"),
        local_rank=_integer(env, "LOCAL_RANK"),
        local_world_size=_integer(env, "LOCAL_WORLD_SIZE", default=1),
        started_by="torchrun",
        master_addr=env["MASTER_ADDR"],
        master_port=_integer(env, "MASTER_PORT"),
    )


def _from_mpirun(env: Mapping[str, str], pattern: str, local_pattern: str) -> Ranks:
    rank_key, size_key = pattern.format("RANK"), pattern.format("SIZE")
    local_rank_key = local_pattern.format("RANK" if "OMPI" in pattern else "RANKID")
    local_size_key = local_pattern.format("SIZE" if "OMPI" in pattern else "NRANKS")
    world_size = _integer(env, size_key)
    return Ranks(
        rank=_integer(env, rank_key),
        world_size=world_size,
        local_rank=_integer(env, local_rank_key, default=0),
        local_world_size=_integer(env, local_size_key, default=world_size),
        started_by="mpirun",
    )


def _from_srun(env: Mapping[str, str]) -> Ranks:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    world_size = _integer(env, "SLURM_STEP_NUM_TASKS", default=_integer(env, "SLURM_NTASKS", default=1))
    tasks_here = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    address = env.get("MASTER_ADDR", "")
    is_loopback = address == "localhost" or address.startswith("127.")
    if is_loopback and env.get("SLURM_STEP_NUM_NODES", "1") != "1" and not _is_one_of_several_here(env):
        raise ClusterError(
            f"MASTER_ADDR={address} set, but srun started ranks on {env['SLURM_STEP_NUM_NODES']} nodes; "
            "`unset MASTER_ADDR MASTER_PORT` before"
        )
    return Ranks(
        rank=_integer(env, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(env, "SLURM_LOCALID", default=0),
        local_world_size=int(tasks_here.group()) if tasks_here else 1,
        started_by="srun",
        master_addr=address or first_host(nodes),
        master_port=_integer(env, "MASTER_PORT", default=_srun_port(env)),
    )


def _is_one_of_several_here(env: Mapping[str, str]) -> bool:
    """Whether this node of SLURM is not called as its machine is: a development cluster runs several on one machine."""
    host = socket.gethostname().partition(".")[0]
    return env.get("SLURMD_NODENAME", host) != host


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: `gpu[07-12,20],n1` -> `gpu07`, `rack[2-3]-node[01-04]` -> `rack2-node01`.

    Raises:
        ClusterError: an empty list.
    """
    first = re.match(r"(?:[^\[\],]|\[[^\]]*\])+", nodelist)
    if not first:
        raise ClusterError("srun gave no node list (SLURM_STEP_NODELIST); set MASTER_ADDR to the first node's name")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def _srun_port(env: Mapping[str, str]) -> int:
    """One of PORTS that differs between jobs, steps and requeues on one node."""
    job, step = _integer(env, "SLURM_JOB_ID", default=0), _integer(env, "SLURM_STEP_ID", default=0)
    restart = _integer(env, "SLURM_RESTART_COUNT", default=0)
    return PORTS[(job * 131 + step * 17 + restart * 7) % len(PORTS)]


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name)
    if value is None:
        if default is None:
            raise ClusterError(f"{name} is not set; start all ranks with torchrun, mpirun or srun")
        return default
    try:
        return int(value)
    except ValueError:
        raise ClusterError(f"{name}={value!r} is not a number; start all ranks with torchrun, mpirun or srun") from None


# ------------------------------------------------------------------------------------------ process group


@contextmanager
def process_group(ranks: Ranks, timeout_s: float = TIMEOUT_S) -> Iterator[torch.device]:
    """Join all ranks (nccl on GPUs, gloo on CPU) and yield this rank's device; leaves the group at the end.

    Raises:
        ClusterError: fewer GPUs than ranks on this node, or MASTER_ADDR is not the node of rank 0.
        LostRankError: the ranks did not meet (a node is late, a port is taken: another start may pass), another rank
            left, or did not come to a collective within `timeout_s`.
    """
    import torch
    import torch.distributed as dist

    device = local_device(ranks)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    environment = dict(os.environ)
    try:
        if ranks.world_size == 1:
            _export(ranks, device, "127.0.0.1", 0)
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            address, port = _meeting_point(ranks)
            _export(ranks, device, address, port)
            dist.init_process_group(
                backend,
                init_method=f"tcp://{address}:{port}" if ranks.started_by != "torchrun" else "env://",
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timeout,
            )
    except (RuntimeError, ValueError) as error:
        passes = ranks.world_size > 1 and isinstance(error, RuntimeError)
        raise (LostRankError if passes else ClusterError)(
            f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield device
        dist.barrier()  # nobody leaves while another still talks to it
    except RuntimeError as error:
        found = LOST.search(str(error))
        if found is None or ranks.world_size == 1:
            raise
        raise LostRankError(
            f"another rank died or hangs ({found.group()}); the same command goes on from what is saved"
        ) from error
    finally:
        gc.collect()  # engines in reference cycles hold communication threads
        if dist.is_initialized():
            deepspeed = sys.modules.get("deepspeed.comm.comm")  # forgets the groups that it keeps
            (deepspeed if deepspeed and deepspeed.cdb else dist).destroy_process_group()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for name in (*RANK_VARIABLES, OPEN_MPI_LOCAL_RANK):  # what this process starts later is no rank of this group
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]


def _meeting_point(ranks: Ranks) -> tuple[str, int]:
    if ranks.started_by != "mpirun":
        if ranks.is_main and ranks.started_by == "srun" and not _is_here(ranks.master_addr):
            raise ClusterError(
                f"MASTER_ADDR={ranks.master_addr} is not {socket.gethostname()}, where rank 0 runs; "
                "`unset MASTER_ADDR MASTER_PORT` before"
            )
        return ranks.master_addr, ranks.master_port
    from mpi4py import MPI

    here = (socket.gethostname() if ranks.local_world_size < ranks.world_size else "127.0.0.1", free_port())
    address: tuple[str, int] = MPI.COMM_WORLD.bcast(here if ranks.is_main else None, root=0)
    return address


def _is_here(name: str) -> bool:
    """Whether a host name leads to this machine, as far as that can be told."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return True
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def free_port() -> int:
    """One of PORTS that nobody listens at on this machine now.

    Raises:
        ClusterError: there is none.
    """
    first = secrets.randbelow(len(PORTS))  # two who look at once find two
    for port in (*PORTS[first:], *PORTS[:first]):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise ClusterError(f"no port between {PORTS[0]} and {PORTS[-1]} is free on {socket.gethostname()}")


def _export(ranks: Ranks, device: torch.device, address: str, port: int) -> None:
    """What torch and DeepSpeed look up; with all of it set, DeepSpeed does not try MPI by itself.

    To DeepSpeed the local rank is the GPU's index, which is 0 on every rank where a task sees its own GPU only.
    """
    local_rank = ranks.local_rank if device.index is None else device.index
    facts = (ranks.rank, ranks.world_size, local_rank, ranks.local_world_size, address, port)
    os.environ.update({name: str(value) for name, value in zip(RANK_VARIABLES, facts, strict=True)})
    if OPEN_MPI_LOCAL_RANK in os.environ:  # DeepSpeed asks for the same
        os.environ[OPEN_MPI_LOCAL_RANK] = str(local_rank)


def all_reduce_mean(values: list[float], device: torch.device) -> list[float]:
    """Mean over ranks of each number, in float64 on CPU groups and GPUs alike; every rank gets it."""
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    result: list[float] = (tensor / dist.get_world_size()).tolist()
    return result


def end_mpi_ranks(code: int) -> None:
    """End all ranks if mpirun started us: a rank that just exits waits in MPI_Finalize until the others come there."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.COMM_WORLD.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(code)


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value: T) -> list[T]:
    """Every rank's value on every rank, in the order of the ranks."""
    import torch.distributed as dist

    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_or_none(action: Callable[[], T]) -> T:
    """This rank's result of the action, or on all ranks the first error that the user can mend; a collective."""
    error = None
    try:
        result = action()
    except HpcDdpmError as caught:
        error = caught
    for found in all_gather(error):
        if found is not None:
            found.is_on_all_ranks = True
            raise found
    return result


# --------------------------------------------------------------------------------------------- stop flag


class StopFlag:
    """Signals only set a flag; the training loop looks at it at step boundaries. A second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.failure: HpcDdpmError | None = None
        """What keeps this rank from going on; `agreed` raises it on all ranks."""
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopFlag:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What goes wrong on this rank alone, and the user can mend, is kept for `agreed`."""
        try:
            yield
        except HpcDdpmError as error:
            self.failure = error

    def agreed(self, device: torch.device) -> int:
        """The largest signal number that any rank has seen, 0 for none; a collective.

        Raises:
            HpcDdpmError: the first rank's `failure`, on every rank.
        """
        import torch
        import torch.distributed as dist

        mine = FAILED if self.failure else self.signal or 0
        flag = torch.tensor(mine, dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if int(flag) == FAILED:
            all_or_none(self._fail)
        return int(flag)

    def _fail(self) -> None:
        if self.failure:
            raise self.failure

"""The processes of a job: who this one is, and what they exchange."""
import contextlib
import logging
from typing import Any, Iterator, List, NamedTuple

import torch
import torch.distributed as dist
from timm.utils import random_seed, world_info_from_env
from timm.utils.distributed import init_distributed_device_so

from .errors import checking

__all__ = [
    'Process', 'all_gather_objects', 'block_indices', 'broadcast_object', 'end_process', 'gather_rows', 'init_process',
    'is_distributed', 'rank_zero_first', 'world_size']


class Process(NamedTuple):
    """This process among those of the job."""
    device: torch.device = torch.device('cpu')
    rank: int = 0
    world_size: int = 1

    @property
    def distributed(self) -> bool:
        """Whether there is a process group."""
        return is_distributed()

    @property
    def primary(self) -> bool:
        return self.rank == 0


def init_process(device: str = 'cpu', seed: int = 42) -> Process:
    """Join the process group of torchrun or SLURM where there is one; seed all generators alike in all processes.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ...; in several processes each takes the accelerator of its local rank
        seed: of the random generators

    Raises:
        InputError: no such device
    """
    with checking('device', device, AssertionError, RuntimeError, ValueError):
        found = init_distributed_device_so(device)
        # also a device that torch names but does not have, and `meta`, which holds no values
        torch.zeros(1, device=found['device']).item()
    random_seed(seed)
    process = Process(torch.device(found['device']), found['global_rank'], found['world_size'])
    if not process.primary:
        for name in ('train', 'eval'):
            logging.getLogger(name).setLevel(logging.WARNING)
    return process


def end_process(process: Process) -> None:
    """Leave the process group once every process has arrived here.

    What rank 0 does alone for long comes after it: the group's time-out, ten minutes on GPUs, would end a job whose
    other processes wait here for longer.
    """
    if process.distributed:
        dist.barrier()
        dist.destroy_process_group()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank. Collective: every rank must call."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_objects(value: Any) -> List[Any]:
    """The values of all ranks, by rank. Collective: every rank must call."""
    if not is_distributed():
        return [value]
    values: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def block_indices(count: int, size: int, rank: int, world_size: int) -> torch.Tensor:
    """This rank's rows: every `world_size`-th block of `size`. The blocks do not depend on the number of processes."""
    blocks = torch.arange(count).split(size)[rank::world_size]
    return torch.cat(blocks) if blocks else torch.arange(0)


def gather_rows(rows: torch.Tensor, indices: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """Gather the rows of all ranks, in order. Collective: every rank must call.

    Args:
        rows: (n, ...) of this rank, on the CPU
        indices: (n,) their places among those of all ranks
        count: rows of all ranks
        device: that the process group communicates with

    Returns:
        (count, ...) on the CPU of every rank
    """
    if not is_distributed():
        return rows
    out = rows.new_zeros((count, *rows.shape[1:]))
    out[indices] = rows
    for part in out.split(max(1, 2 ** 26 // max(1, out[:1].nbytes))):  # 64 MB at a time on the device
        shared = part.to(device)
        dist.all_reduce(shared)  # the sum of a row and zeros
        part.copy_(shared)
    return out


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the block first, then one process of each other node, which may have its own disk, then the rest.

    Collective: every rank must enter.
    """
    if not is_distributed():
        yield
        return
    turn = 0 if dist.get_rank() == 0 else 1 if world_info_from_env()[0] == 0 else 2
    for _ in range(turn):
        dist.barrier()
    yield
    for _ in range(turn, 2):
        dist.barrier()

"""Who downloads, where several processes ask for one data set."""
import contextlib
from typing import Iterator

import torch.distributed as dist
from timm.utils import world_info_from_env

__all__ = ['downloading_in_turn']


@contextlib.contextmanager
def downloading_in_turn() -> Iterator[None]:
    """Rank 0 goes first, then one process of each other node, which may have a disk of its own, then all the rest."""
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    first_of_node = world_info_from_env()[0] == 0
    turn = 0 if dist.get_rank() == 0 else 1 if first_of_node else 2
    for _ in range(turn):
        dist.barrier()
    yield
    for _ in range(turn, 2):
        dist.barrier()

"""Rows divided among the processes in blocks, and gathered again."""
import torch
import torch.distributed as dist

from timm_cgh.distributed import is_distributed

__all__ = ['block_indices', 'gather_rows']


def block_indices(count: int, size: int, rank: int, world_size: int) -> torch.Tensor:
    """This rank's rows: every `world_size`-th block of `size`. The blocks do not depend on the number of processes."""
    blocks = torch.arange(count).split(size)[rank::world_size]
    return torch.cat(blocks) if blocks else torch.arange(0)


def gather_rows(
        rows: torch.Tensor,
        indices: torch.Tensor,
        count: int,
        device: torch.device,
        chunk_bytes: int = 2 ** 26,
) -> torch.Tensor:
    """Gather the rows of all ranks, in order. Collective: every rank must call.

    Args:
        rows: (n, ...) of this rank, on the CPU
        indices: (n,) their places among those of all ranks
        count: rows of all ranks
        device: that the process group communicates with
        chunk_bytes: exchanged at a time, which bounds the memory on the device

    Returns:
        (count, ...) on the CPU of every rank
    """
    if not is_distributed():
        return rows
    out = rows.new_zeros((count, *rows.shape[1:]))
    out[indices] = rows
    for part in out.split(max(1, chunk_bytes // max(1, out[:1].nbytes))):
        shared = part.to(device)
        dist.all_reduce(shared)  # the sum of a row and zeros
        part.copy_(shared)
    return out

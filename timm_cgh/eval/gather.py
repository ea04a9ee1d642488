"""Rows divided among the processes in blocks, and gathered again."""
import torch
import torch.distributed as dist

from timm_cgh.distributed import world_size as get_world_size

__all__ = ['block_indices', 'gather_rows']


def block_indices(count: int, size: int, rank: int, world_size: int) -> torch.Tensor:
    """This rank's rows: every `world_size`-th block of `size`. The blocks do not depend on the number of processes."""
    blocks = torch.arange(count).split(size)[rank::world_size]
    return torch.cat(blocks) if blocks else torch.arange(0)


def gather_rows(
        rows: torch.Tensor,
        count: int,
        size: int,
        device: torch.device,
        chunk_bytes: int = 2 ** 26,
) -> torch.Tensor:
    """Gather the rows of all ranks, in order. Collective: every rank must call.

    Args:
        rows: (n, ...) rows that `block_indices` gives this rank, on the CPU
        count: rows of all ranks
        size: of a block
        device: that the process group communicates with
        chunk_bytes: that a rank sends at a time, which bounds the memory on the device

    Returns:
        (count, ...) on the CPU of every rank
    """
    world_size = get_world_size()
    if world_size == 1:
        return rows
    indices = [block_indices(count, size, rank, world_size) for rank in range(world_size)]
    out = rows.new_empty((count, *rows.shape[1:]))
    step = max(1, chunk_bytes // max(1, rows[0:1].nbytes or out[0:1].nbytes))
    for start in range(0, max(map(len, indices)), step):
        stop = min(start + step, max(map(len, indices)))
        mine = rows.new_zeros((stop - start, *rows.shape[1:]))  # padded where this rank has fewer; not read below
        part = rows[start:stop]
        mine[:len(part)] = part
        all_rows = torch.empty((world_size * len(mine), *mine.shape[1:]), dtype=mine.dtype, device=device)
        dist.all_gather_into_tensor(all_rows, mine.to(device))
        for index, theirs in zip(indices, all_rows.cpu().split(len(mine))):
            index = index[start:stop]
            out[index] = theirs[:len(index)]
    return out

"""FIFO memory bank of the teacher's embeddings (Sec. 3.2)."""
import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['MemoryBank']


class MemoryBank(nn.Module):
    """FIFO queue of unit vectors, full from the start with random directions (Sec. 3.2).

    `embeddings` is the (size, dim) float32 buffer, in no particular order; the oldest rows are overwritten first. Any
    batch size goes with any bank size. The write position is a Python int (a device tensor would cost a
    synchronisation a step) that travels in the state dict.

    Args:
        size: number M of embeddings kept
        dim: width D of an embedding

    Raises:
        ValueError: size or dim below 1
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f'MemoryBank needs a size and a width of at least 1, got ({size}, {dim})')
        self.size = size
        self.dim = dim
        self.position = 0
        self.register_buffer('embeddings', F.normalize(torch.randn(size, dim), dim=1))

    @torch.no_grad()
    def enqueue(self, embeddings: torch.Tensor) -> None:
        """Write a batch over the oldest rows, as if row by row.

        Args:
            embeddings: (B, dim) unit rows, oldest first; of more than `size` rows only the last `size` stay

        Raises:
            ValueError: rows of another width
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(f'MemoryBank holds rows of width {self.dim}, got {tuple(embeddings.shape)}')
        count = len(embeddings)
        kept = embeddings[-self.size:].to(self.embeddings.dtype)
        start = (self.position + count - len(kept)) % self.size
        head = min(len(kept), self.size - start)
        self.embeddings[start:start + head] = kept[:head]
        self.embeddings[:len(kept) - head] = kept[head:]
        self.position = (self.position + count) % self.size

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.position)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.position = int(state)

    def extra_repr(self) -> str:
        return f'size={self.size}, dim={self.dim}'

"""FIFO memory bank of the teacher's embeddings (Sec. 3.2)."""
import reprlib
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['MemoryBank']


class MemoryBank(nn.Module):
    """FIFO queue of unit vectors, initialised with random directions (Sec. 3.2).

    `embeddings` is the (size, dim) float32 buffer, in no particular order; the oldest rows are overwritten first. The
    batch size need not divide the bank size. The write position is a Python int (a device tensor would cost a
    synchronisation per step), stored in the state dict.

    With `labels` the bank also stores the class of each row: the (size,) int64 buffer `labels`, -1 for rows not yet
    filled or of unknown class. A state dict without labels loads as unknown ones; superfluous labels are ignored.

    Args:
        size: number M of embeddings kept
        dim: width D of an embedding
        labels: store labels (Sec. 4.6)

    Raises:
        ValueError: size or dim below 1
    """

    def __init__(self, size: int, dim: int, labels: bool = False):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f'MemoryBank needs a size and a width of at least 1, got ({size}, {dim})')
        self.size = size
        self.dim = dim
        self.position = 0
        self.register_buffer('embeddings', F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer('labels', torch.full((size,), -1) if labels else None)

    @torch.no_grad()
    def enqueue(self, embeddings: torch.Tensor, labels: Optional[torch.Tensor] = None) -> None:
        """Write a batch over the oldest rows, as if row by row.

        Args:
            embeddings: (B, dim) unit rows, oldest first; of more than `size` rows the last `size` are kept
            labels: (B,) integers, -1 unknown (all of them where None); for a bank that stores them

        Raises:
            ValueError: rows of another width, another number of labels
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(f'MemoryBank holds rows of width {self.dim}, got {tuple(embeddings.shape)}')
        count = len(embeddings)
        if labels is not None and labels.shape != (count,):
            raise ValueError(f'{count} embeddings, but labels {tuple(labels.shape)}')
        kept = embeddings[-self.size:].to(self.embeddings.dtype)
        start = (self.position + count - len(kept)) % self.size
        head = min(len(kept), self.size - start)
        self.embeddings[start:start + head] = kept[:head]
        self.embeddings[:len(kept) - head] = kept[head:]
        if self.labels is not None:
            known = self.labels.new_full((len(kept),), -1) if labels is None else labels[-self.size:].to(self.labels)
            self.labels[start:start + head] = known[:head]
            self.labels[:len(kept) - head] = known[head:]
        self.position = (self.position + count) % self.size

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        key = f'{prefix}labels'
        if self.labels is None:
            state_dict.pop(key, None)
        else:
            state_dict.setdefault(key, torch.full_like(self.labels, -1))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.position)

    def set_extra_state(self, state: torch.Tensor) -> None:
        if not isinstance(state, torch.Tensor) or state.numel() != 1 or state.item() not in range(self.size):
            raise ValueError(f'the position in a bank of {self.size} embeddings is {reprlib.repr(state)}')
        self.position = int(state)

    def extra_repr(self) -> str:
        return f'size={self.size}, dim={self.dim}'

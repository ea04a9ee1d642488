"""Batch normalisation over parts of a batch, as if each were on a device of its own."""
import functools

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ['split_batch_norm']


class _Split:

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalise = super().forward
        return torch.cat([normalise(part) for part in x.tensor_split(self.splits)]) if self.training else normalise(x)


@functools.lru_cache(maxsize=None)
def _split_class(cls: type) -> type:
    return type(f'Split{cls.__name__}', (_Split, cls), {})


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Have every batch norm in a module take batch statistics over parts of the batch; in place, names stay.

    In one process this keeps batch statistics from telling which images went together, as several devices do (MoCo's
    ShuffleBN; the authors' code has 8 parts). Running statistics move as far with a batch as they would with one part.

    Args:
        module: with `nn.BatchNorm1d`, `nn.BatchNorm2d` and what derives from them
        splits: parts, of which none may be of one value per channel

    Raises:
        ValueError: fewer than one part, or batch norm that is split or synchronised already
    """
    if splits < 1:
        raise ValueError(f'splits must be at least 1, got {splits}')
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    if any(isinstance(m, (_Split, nn.SyncBatchNorm)) for m in norms):
        raise ValueError('batch norm that is split or synchronised already')
    for norm in norms:
        norm.__class__ = _split_class(type(norm))
        norm.splits = splits
        if norm.momentum is not None:
            norm.momentum = 1 - (1 - norm.momentum) ** (1 / splits)

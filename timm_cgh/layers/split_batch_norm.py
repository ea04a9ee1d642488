"""Batch normalisation over parts of a batch, as on several devices."""
import functools
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ['split_batch_norm']


class _Split(nn.Module):
    """In front of a batch norm class."""
    splits: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalize = super().forward
        return torch.cat([normalize(part) for part in x.tensor_split(self.splits)]) if self.training else normalize(x)


@functools.cache
def _split_class(cls: Any) -> type:
    return type(f'Split{cls.__name__}', (_Split, cls), {})


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Make every batch norm of a module use statistics over parts of the batch; in place, state dict keys stay.

    In a single process this has the effect of several devices: together with a shuffle, batch statistics do not reveal
    which images share a batch (MoCo's ShuffleBN; the authors' code uses 8 parts). The momentum of the running
    statistics is adjusted so that they move as far per batch as with one part.

    Args:
        module: with `nn.BatchNorm1d`, `nn.BatchNorm2d` and what derives from them
        splits: number of parts; each must have more than one value per channel

    Raises:
        ValueError: fewer than one part, or batch norm that is already split or synchronised
    """
    if splits < 1:
        raise ValueError(f'splits must be at least 1, got {splits}')
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    if any(isinstance(m, (_Split, nn.SyncBatchNorm)) for m in norms):
        raise ValueError('batch norm is already split or synchronised')
    for norm in norms:
        cls: Any = type(norm)
        norm.__class__ = _split_class(cls)
        norm.splits = splits
        if norm.momentum is not None:
            norm.momentum = 1 - (1 - norm.momentum) ** (1 / splits)

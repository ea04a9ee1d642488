"""Hypercolumn context: feature maps of several stages -> one vector (Sec. 3.2 and 3.4)."""
from typing import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['Hypercolumn']


class Hypercolumn(nn.Module):
    """Feature maps of several stages -> one hypercolumn context h^h (Sec. 3.2, 3.4).

    Every map is resized to the size of the last one (bilinear), the stack is mixed by a 1x1 convolution without bias,
    then normalised, rectified and averaged over space.

    Args:
        in_chs: channels C_l of each map, in the order in which the maps come
        dim: width d of the context
        norm_layer: maps `dim` to the normalisation module; `nn.Identity` gives a batch-independent hypercolumn

    Raises:
        ValueError: no map, or a width below 1
    """

    def __init__(self, in_chs: Sequence[int], dim: int, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        if not in_chs or min(in_chs) < 1 or dim < 1:
            raise ValueError(f'Hypercolumn needs at least one map and positive widths, got {list(in_chs)} -> {dim}')
        self.in_chs = tuple(in_chs)
        self.dim = dim
        self.conv = nn.Conv2d(sum(in_chs), dim, kernel_size=1, bias=False)
        self.norm = norm_layer(dim)
        self.act = nn.ReLU(inplace=True)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """
        Args:
            maps: one (B, C_l, H_l, W_l) tensor per stage; the last one sets the size

        Returns:
            (B, dim) hypercolumn contexts
        """
        size = maps[-1].shape[-2:]
        stack = torch.cat([
            m if m.shape[-2:] == size else F.interpolate(m, size=size, mode='bilinear', align_corners=False)
            for m in maps
        ], dim=1)  # (B, sum C_l, H, W)
        return self.act(self.norm(self.conv(stack))).mean(dim=(2, 3))

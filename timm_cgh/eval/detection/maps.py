"""The feature maps of a timm backbone with their strides, and its last stage, which C4 runs on each RoI."""
from functools import partial
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
from timm.layers import LayerNorm2d
from torchvision.ops import Conv2dNormActivation
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from timm_cgh.errors import InputError

__all__ = ['BackboneMaps', 'Map', 'MapLayout', 'SimplePyramid', 'last_stage', 'measure_maps']

_MULTIPLES = (32, 28, 64, 56, 128, 112, 256, 224)  # px that sides may have to be multiples of, cheap ones first
_PROBE_SIDE = 128  # px, at least: networks without padding (Inception) have no map left of less


class Map(NamedTuple):
    """One of the maps of `forward_intermediates`: which, its channels, and its stride in px."""
    place: int
    channels: int
    stride: float


class MapLayout(NamedTuple):
    """All maps of a backbone, and the images that it takes."""
    maps: List[Map]
    multiple: int  # of the images' sides, px
    side: int  # of small square images, px
    fixed: bool  # images must have that very size


def _side(multiple: int) -> int:
    return -(-_PROBE_SIDE // multiple) * multiple


def _forward_maps(backbone: nn.Module, shape: Sequence[int], indices: Optional[List[int]] = None) -> List[torch.Tensor]:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(backbone.parameters()).device)
    return backbone.forward_intermediates(images, indices=indices, intermediates_only=True, output_fmt='NCHW')


def _strides(backbone: nn.Module, chans: int, multiple: int) -> Optional[List[Map]]:
    """The maps of a backbone that takes images of this multiple, from how they grow with the image; else None."""
    side = _side(multiple)
    try:
        small = _forward_maps(backbone, (1, chans, side, 2 * side))
        large = _forward_maps(backbone, (1, chans, 2 * side, 3 * side))
        grown = [(b.shape[2] - a.shape[2], b.shape[3] - a.shape[3]) for a, b in zip(small, large)]
        if any(side % rows or rows != columns for rows, columns in grown):
            return None
    except Exception:  # timm's modules raise nearly everything about images of a size that they cannot take
        return None
    return [Map(place, m.shape[1], side // rows) for place, (m, (rows, _)) in enumerate(zip(small, grown))]


@torch.no_grad()
def measure_maps(backbone: nn.Module, input_size: Sequence[int]) -> MapLayout:
    """Run a backbone (in eval mode, built for (C, H, W) images) on several sizes to find its maps, their true strides,
    and the sizes that it takes.

    Raises:
        InputError: it takes no size at all, or gives no maps
    """
    chans, side = input_size[0], max(input_size[1:])
    for multiple in _MULTIPLES:
        if maps := _strides(backbone, chans, multiple):
            return MapLayout(maps, multiple, _side(multiple), fixed=False)
    try:
        found = _forward_maps(backbone, (1, chans, side, side))
        maps = [Map(place, m.shape[1], side / m.shape[2]) for place, m in enumerate(found)]
    except Exception as error:  # see _strides
        raise InputError(f'model: {type(backbone).__name__} gives no maps of {side} x {side} px ({error})') from error
    return MapLayout(maps, side, side, fixed=True)


@torch.no_grad()
def last_stage(backbone: nn.Module, layout: MapLayout, in_chans: int) -> nn.Module:
    """The last stage of a backbone (in eval mode), once it is known to make the last map of the one before (C4).

    Raises:
        InputError: the model has no such stage
    """
    try:
        before, last = _forward_maps(backbone, (2, in_chans, layout.side, layout.side), indices=[-2, -1])
        stage = backbone.get_submodule(backbone.feature_info[-1]['module'])
        splits = torch.equal(stage(before.clone()), last) and last.shape[2:] != before.shape[2:]
        stage(before.new_zeros(1, before.shape[1], 14, 14))  # an RoI's size
    except Exception:  # see _strides; stages that want more than a map, names that are no module, ...
        splits = False
    if not splits:
        raise InputError(
            f'head=c4: the last stage of {type(backbone).__name__} does not run by itself on the map before; take fpn')
    return stage


class SimplePyramid(nn.Module):
    """Maps of 1/4, 1/2, 1 and 2 times the stride of a single map (ViTDet, Sec. 3)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        half, quarter = channels // 2, channels // 4

        double = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        conv = partial(Conv2dNormActivation, norm_layer=LayerNorm2d, activation_layer=None)

        def smooth(inputs: int) -> List[nn.Module]:
            return [conv(inputs, out_channels, 1), conv(out_channels, out_channels, 3)]

        self.levels = nn.ModuleList([
            nn.Sequential(
                double(channels, half), LayerNorm2d(half), nn.GELU(), double(half, quarter), *smooth(quarter)),
            nn.Sequential(double(channels, half), *smooth(half)),
            nn.Sequential(*smooth(channels)),
            nn.Sequential(nn.MaxPool2d(2), *smooth(channels)),
        ])
        self.coarsest = LastLevelMaxPool()

    def forward(self, maps: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """One (B, channels, H, W) map -> five of `out_channels` channels, the last one for the RPN alone."""
        (x,) = maps.values()
        levels = [level(x) for level in self.levels]
        levels, names = self.coarsest(levels, [], [str(i) for i in range(len(levels))])
        return dict(zip(names, levels))


class BackboneMaps(nn.Module):
    """The backbone of torchvision's `GeneralizedRCNN`: maps of a plain timm model, whole under its own names as `body`,
    and a neck that takes and gives named maps.
    """

    def __init__(self, body: nn.Module, indices: Sequence[int], neck: Optional[nn.Module] = None):
        super().__init__()
        self.body = body
        self.indices = list(indices)
        self.neck = neck or nn.Identity()

    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        """(B, C, H, W) normalised images -> maps, the finest first."""
        maps = self.body.forward_intermediates(
            images, indices=self.indices, intermediates_only=True, output_fmt='NCHW', stop_early=True)
        return self.neck({str(place): m for place, m in enumerate(maps)})

"""Photometric augmentation of whole batches on any device, as defined by torchvision.

The parameters have been drawn already (`timm_cgh.data.views.Photometric.draw`), one row per image. Which images an
operation changes is worked out from them on the CPU, so that no step waits for the device.
"""
import functools
import math
from typing import Callable, List, Optional, Tuple

import torch

from .views import BLUR_SIGMA, BRIGHTNESS, CONTRAST, GRAYSCALE, HUE, JITTER_ORDER, JITTER_ORDERS, SATURATION

__all__ = ['adjust_hue', 'gaussian_blur', 'photometric', 'to_gray']

_ORDERS = torch.tensor(JITTER_ORDERS)
# Values per thread that go through all operations together on a CPU. They fit in its cache, so that a pass over them
# takes half as long as over a whole batch. One image of 224 px has 150,528.
_CACHED = 2 ** 18
_BAND = 56  # pixels of a line blurred by one product on a CPU: the matrix of a whole line is mostly zeros


def to_gray(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W) luma, ITU-R 601-2; images of other channels are returned unchanged."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Shift the hue of (B, 3, H, W) colours, of any range, by `shift` (B,) turns of the colour circle.

    HSV without its case distinctions, which are slow: measured from red, in sextants, the hue is
    (green + blue - red - least) / chroma + 1 with the sign of green - blue, and each channel is a clipped linear
    function of the distance between that hue and the channel's.
    """
    red, green, blue = images.unbind(1)
    chroma = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma.sub_(least)
    hue = (green + blue).sub_(red).sub_(least).div_(chroma.clamp_min(torch.finfo(chroma.dtype).tiny)).add_(1)
    hue.copysign_(green - blue)  # in [-3, 3]
    turn = 6 * shift.unsqueeze(1) - 2 * torch.arange(3, device=images.device)  # red, green, blue: 0, 2, 4 sextants
    turn = turn - 6 * torch.round(turn / 6)
    near = (hue.unsqueeze(1) + turn.view(-1, 3, 1, 1)).abs_().sub_(3).abs_()  # 3 minus the distance on the circle
    return torch.addcmul(least.sub_(chroma).unsqueeze(1), chroma.unsqueeze(1), near.clamp_(1, 2))


def _blend(images: torch.Tensor, weights: torch.Tensor, uses_mean: bool, uses_luma: bool) -> torch.Tensor:
    """Clipped sum of images in [0, 255], their mean luma and their luma, weighted by (B, 3); in place.

    Brightness, contrast, saturation and grayscale all have this form, so one pass serves a batch in which each image
    needs a different one. `uses_mean` and `uses_luma` tell whether any weight of that kind is not zero.
    """
    ratio, to_mean, to_luma = weights.view(-1, 3, 1, 1, 1).unbind(1)
    if not uses_mean and not uses_luma:
        return images.mul_(ratio).clamp_(0, 255)
    luma = to_gray(images)
    other = luma.mean(dim=(1, 2, 3), keepdim=True) * to_mean
    if uses_luma:
        other = luma * to_luma + other
    return images.mul_(ratio).add_(other).clamp_(0, 255)


@functools.lru_cache(maxsize=64)
def _mirrored(size: int, reach: int, device: torch.device) -> torch.Tensor:
    """(1, size, 2 reach + 1): entry (i, d) is the pixel of a mirrored line at distance d - reach from pixel i."""
    source = torch.arange(size).unsqueeze(1) + torch.arange(-reach, reach + 1)
    period = max(1, 2 * (size - 1))
    source = source.remainder(period)
    return torch.minimum(source, period - source).unsqueeze(0).to(device)  # `reach` may exceed the image


def _blur_matrix(sigma: torch.Tensor, size: int, reach: int) -> torch.Tensor:
    """(B,) sigmas -> (B, size, size) matrices that blur a line of `size` pixels, mirrored at its ends."""
    offsets = torch.arange(-reach, reach + 1, device=sigma.device)
    sigma = sigma.unsqueeze(1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    # each kernel ends at three times its own sigma, so that an image does not depend on the rest of its batch
    weights = weights * (offsets.abs() <= torch.ceil(3 * sigma))
    weights = weights / weights.sum(dim=1, keepdim=True)  # (B, 2 reach + 1)
    source = _mirrored(size, reach, sigma.device).expand(len(weights), -1, -1)
    return weights.new_zeros(len(weights), size, size).scatter_add_(2, source, weights.unsqueeze(1).expand_as(source))


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, reach: int) -> torch.Tensor:
    """Blur each image with its own sigma, by products with banded matrices that include the mirrored border.

    Equal to torchvision's `gaussian_blur` with kernel size 2 * ceil(3 sigma) + 1, for images of any size.

    Args:
        images: (B, C, H, W)
        sigma: (B,) px, positive
        reach: px, at least three times the largest sigma
    """
    batch, chans, height, width = images.shape

    def bands(size: int) -> List[Tuple[slice, slice]]:
        step = _BAND if images.device.type == 'cpu' else size
        return [(slice(i, i + step), slice(max(0, i - reach), i + step + reach)) for i in range(0, size, step)]

    columns = _blur_matrix(sigma, width, reach).transpose(1, 2)
    rows = columns.transpose(1, 2) if height == width else _blur_matrix(sigma, height, reach)
    x = images.reshape(batch, chans * height, width)
    x = torch.cat([torch.bmm(x[..., near], columns[:, near, band]) for band, near in bands(width)], dim=2)
    x = x.view(batch, chans, height, width).transpose(1, 2).reshape(batch, height, chans * width)
    x = torch.cat([torch.bmm(rows[:, band, near], x[:, near]) for band, near in bands(height)], dim=1)
    return x.view(batch, height, chans, width).transpose(1, 2)


def _on_subset(images: torch.Tensor, mask: torch.Tensor, function: Callable, column: torch.Tensor) -> torch.Tensor:
    """Apply `function` to the images of a (B,) mask, each with its entry of `column` (B,), both on the CPU."""
    index = mask.nonzero().squeeze(1)
    if not len(index):
        return images
    column = column[index].to(images.device, non_blocking=True)
    if len(index) == len(images):
        return function(images, column)
    index = index.to(images.device, non_blocking=True)
    return images.index_copy_(0, index, function(images.index_select(0, index), column))


def _plan(params: torch.Tensor, chans: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Parameters (B, 7) -> operation in each turn, (B, 4), -1 for none; weights of `_blend`, (B, turns, 3)."""
    order = params[:, JITTER_ORDER].long()
    operation = torch.where(order.unsqueeze(1) >= 0, _ORDERS[order.clamp(min=0)], -1)
    factor = params.gather(1, operation.clamp(min=0))
    blended = (operation == BRIGHTNESS) | (operation == CONTRAST)
    if chans == 3:
        blended |= operation == SATURATION
    ratio = torch.where(blended, factor, 1)
    other = 1 - ratio
    weights = torch.stack([ratio, other * (operation == CONTRAST), other * (operation == SATURATION)], dim=2)
    if chans == 3:
        gray = (params[:, GRAYSCALE] > 0).float()
        weights = torch.cat([weights, torch.stack([1 - gray, torch.zeros_like(gray), gray], dim=1).unsqueeze(1)], dim=1)
    return operation, weights


def _augment(x: torch.Tensor, params: torch.Tensor, operation: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Augment (B, C, H, W) images in [0, 255], possibly in place; the other arguments are on the CPU."""
    turns = (weights != torch.tensor([1.0, 0.0, 0.0])).any(dim=0).tolist()  # which weights of a turn change an image
    hue_shifted = (operation == HUE) & (params[:, HUE:HUE + 1] != 0) & (x.shape[1] == 3)
    weights = (weights.pin_memory() if x.is_cuda else weights).to(x.device, non_blocking=True)
    for turn, (blends, *uses) in enumerate(turns):
        if blends:
            x = _blend(x, weights[:, turn], *uses)
        if turn < 4:
            x = _on_subset(x, hue_shifted[:, turn], adjust_hue, params[:, HUE])
    sigma = params[:, BLUR_SIGMA]
    reach = math.ceil(3 * float(sigma.max()))
    return _on_subset(x, sigma > 0, lambda images, column: gaussian_blur(images, column, reach), sigma)


def photometric(
        images: torch.Tensor,
        params: Optional[torch.Tensor],
        mean: Optional[torch.Tensor] = None,
        std: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Colour jitter in each image's own order, grayscale, blur (the contrastive view, Sec. 3.2), normalisation.

    Args:
        images: (B, C, H, W) uint8, on any device; saturation, hue and grayscale change nothing but colours (C 3)
        params: (B, 7) float32 rows of `Photometric.draw`, on the CPU; None for no augmentation
        mean, std: (1, C, 1, 1) on the images' device, of pixels in [0, 1]; None for no normalisation

    Returns:
        (B, C, H, W) float32, also under autocast; in [0, 1] without normalisation
    """
    chans, on_cpu = images.shape[1], images.device.type == 'cpu'
    step = max(1, torch.get_num_threads() * _CACHED // math.prod(images.shape[1:]) if on_cpu else len(images))
    plan = () if params is None else (params, *_plan(params, chans))
    zero, unit = (0, 255) if mean is None or std is None else (255 * mean, 255 * std)
    out = torch.empty(images.shape, device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            x = images[part].contiguous().float()
            if params is not None:
                x = _augment(x, *(rows[part] for rows in plan))
            torch.sub(x, zero, out=out[part]).div_(unit)
    return out

"""Photometric augmentation of whole batches, on whatever device they are (torchvision's definitions).

Parameters come drawn (`timm_cgh.data.views.Photometric.draw`), one row per image. Which images an operation touches is
worked out from the parameters on the CPU, before they travel: no step waits for the device.
"""
import functools
import math
from typing import Callable, Optional

import torch

from .views import BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, SATURATION

__all__ = ['adjust_hue', 'gaussian_blur', 'photometric', 'to_gray']

_ORDERS = torch.tensor(JITTER_ORDERS)


def to_gray(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W) luma, ITU-R 601-2; grey images stay as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue of (B, 3, H, W) colours in [0, 1] by `shift` (B,), in turns of the colour circle."""
    least, value = images.aminmax(dim=1)
    chroma = value - least
    red, green, blue = images.unbind(1)
    # sextant of the hue, counted from the largest channel; on ties red before green before blue
    rise = torch.where(value == red, green - blue, torch.where(value == green, blue - red, red - green))
    base = torch.where(value == red, 0.0, torch.where(value == green, 2.0, 4.0))
    hue = rise.div_(torch.where(chroma == 0, 1.0, chroma)).add_(base).add_(6 * shift.view(-1, 1, 1))
    out = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):  # a channel falls from value by chroma * (nearness of the hue)
        k = (hue + offset).remainder_(6)
        fall = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(value, chroma, fall, value=-1, out=out[:, channel])
    return out


def _blend(images: torch.Tensor, ratio: torch.Tensor, to_mean: torch.Tensor, to_luma: torch.Tensor) -> torch.Tensor:
    """In place: ratio * images + to_mean * mean luma + to_luma * luma, clipped; weights (B,).

    Brightness, contrast, saturation and grayscale are all of this form, so that a batch in which every image is due for
    another of them needs one pass.
    """
    luma = to_gray(images)
    other = luma * to_luma.view(-1, 1, 1, 1)
    other.addcmul_(luma.mean(dim=(1, 2, 3), keepdim=True), to_mean.view(-1, 1, 1, 1))
    return images.mul_(ratio.view(-1, 1, 1, 1)).add_(other).clamp_(0, 1)


@functools.lru_cache(maxsize=8)
def _mirrored(size: int, reach: int, device: torch.device) -> torch.Tensor:
    """(2 reach + 1, size * size): entry [d, i, j] is 1 where pixel i + d - reach of a mirrored line is pixel j."""
    source = torch.arange(size).unsqueeze(1) + torch.arange(-reach, reach + 1)  # (size, 2 reach + 1)
    period = max(1, 2 * (size - 1))
    source = source.remainder(period)
    source = torch.minimum(source, period - source)  # also where the reach exceeds the image
    one_hot = torch.nn.functional.one_hot(source, size).permute(1, 0, 2)
    return one_hot.reshape(2 * reach + 1, size * size).float().to(device)


def _blur_matrix(sigma: torch.Tensor, size: int, reach: int) -> torch.Tensor:
    """(B,) sigmas -> (B, size, size) matrices that blur a line of `size` pixels, mirrored at its ends."""
    offsets = torch.arange(-reach, reach + 1, device=sigma.device)
    sigma = sigma.unsqueeze(1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    # each kernel ends at its own three sigmas: what is blurred does not depend on the rest of the batch
    weights = weights * (offsets.abs() <= torch.ceil(3 * sigma))
    weights = weights / weights.sum(dim=1, keepdim=True)  # (B, 2 reach + 1)
    return (weights @ _mirrored(size, reach, sigma.device)).view(-1, size, size)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, reach: int) -> torch.Tensor:
    """Blur each image by its own sigma: two products with banded matrices that hold the mirrored border.

    Equal to torchvision's `gaussian_blur` with kernel size 2 * ceil(3 sigma) + 1, for images of any size.

    Args:
        images: (B, C, H, W)
        sigma: (B,) px, positive
        reach: px, at least three times the largest sigma
    """
    batch, chans, height, width = images.shape
    columns = _blur_matrix(sigma, width, reach).transpose(1, 2)
    rows = columns.transpose(1, 2) if height == width else _blur_matrix(sigma, height, reach)
    x = torch.bmm(images.reshape(batch, chans * height, width), columns).view(batch, chans, height, width)
    x = torch.bmm(rows, x.transpose(1, 2).reshape(batch, height, chans * width))  # (B, H, C * W)
    return x.view(batch, height, chans, width).transpose(1, 2)


def _on_subset(images: torch.Tensor, touched: torch.Tensor, function: Callable, column: torch.Tensor) -> torch.Tensor:
    """Apply `function` in place to the images of a (B,) CPU mask, each with its entry of `column` (B,) (CPU)."""
    index = touched.nonzero().squeeze(1)
    if not len(index):
        return images
    column = column[index].to(images.device, non_blocking=True)
    index = index.to(images.device, non_blocking=True)
    return images.index_copy_(0, index, function(images.index_select(0, index), column))


def photometric(images: torch.Tensor, params: Optional[torch.Tensor]) -> torch.Tensor:
    """Colour jitter in each image's own order, grayscale, blur (the contrastive view, Sec. 3.2).

    Args:
        images: (B, C, H, W) uint8, C 1 or 3, on any device; of grey images saturation, hue and grayscale do nothing
        params: (B, 7) float32 rows of `Photometric.draw`, on the CPU; None leaves the images as they are

    Returns:
        (B, C, H, W) float32 in [0, 1], whatever autocast says

    Raises:
        ValueError: neither 1 nor 3 channels
    """
    chans = images.shape[1]
    if chans not in (1, 3):
        raise ValueError(f'images have 1 or 3 channels, got {tuple(images.shape)}')
    with torch.autocast(images.device.type, enabled=False):
        x = images.float().div_(255)
        if params is None:
            return x
        order = params[:, 4].long()
        operation = torch.where(order.unsqueeze(1) >= 0, _ORDERS[order.clamp(min=0)], -1)  # (B, 4): first, second, ...
        factor = params.gather(1, operation.clamp(min=0))  # (B, 4)
        blended = (operation == BRIGHTNESS) | (operation == CONTRAST)
        if chans == 3:
            blended |= operation == SATURATION
        ratio = torch.where(blended, factor, 1)
        plan = torch.stack([ratio, (1 - ratio) * (operation == CONTRAST), (1 - ratio) * (operation == SATURATION)])
        if chans == 3:
            gray = (params[:, 5] > 0).float()
            plan = torch.cat([plan, torch.stack([1 - gray, torch.zeros_like(gray), gray]).unsqueeze(2)], dim=2)
        idle = (plan[0] == 1).all(dim=0).tolist()  # turns in which nothing is blended
        if images.is_cuda:
            plan = plan.pin_memory()
        weights = plan.to(images.device, non_blocking=True)  # (3, B, turns)
        for turn, skip in enumerate(idle):
            if not skip:
                x = _blend(x, *weights[:, :, turn])
            if chans == 3 and turn < 4:
                x = _on_subset(x, (operation[:, turn] == HUE) & (params[:, HUE] != 0), adjust_hue, params[:, HUE])
        sigma = params[:, 6]
        reach = math.ceil(3 * float(sigma.max()))
        return _on_subset(x, sigma > 0, lambda v, s: gaussian_blur(v, s, reach), sigma)

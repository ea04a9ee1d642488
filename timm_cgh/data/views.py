"""Random crops and flips of an image, and the drawing of its photometric augmentation (Sec. 3.2).

Everything random about a view is a function of (seed, epoch, image, view), so that neither the number of workers and
processes nor a resume changes it. Crops and flips are applied here, to the decoded image. The photometric augmentation
is only *drawn* here, as a row of numbers; `timm_cgh.data.augment` applies it to whole batches on the training device.
"""
import itertools
import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from timm_cgh.errors import InputError

from .decode import Decoding, decode_pixels, upright_size

__all__ = ['Photometric', 'ViewSpec', 'check_range', 'cut_views', 'draw_crop', 'multi_crop', 'two_views', 'view_rng']

# Columns of a photometric row: factors of the colour jitter, its order (-1: no jitter), whether to convert to
# grayscale (0 or 1), sigma of the blur in px (0: no blur).
BRIGHTNESS, CONTRAST, SATURATION, HUE, JITTER_ORDER, GRAYSCALE, BLUR_SIGMA = range(7)
NUM_PHOTOMETRIC = 7
# torchvision's ColorJitter applies its four operations in a random order.
JITTER_ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))


class Photometric(NamedTuple):
    """Strengths and probabilities of the contrastive augmentation (those of MoCo-v2, as in the paper).

    The fields are explained at `two_views`.
    """
    color_jitter: Tuple[float, ...] = (0.4, 0.4, 0.4, 0.1)
    color_jitter_prob: float = 0.8
    grayscale_prob: float = 0.2
    gaussian_blur_prob: float = 0.5
    gaussian_blur_sigma: Tuple[float, ...] = (0.1, 2.0)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw one photometric row, (7,) float32."""
        row = np.zeros(NUM_PHOTOMETRIC, dtype=np.float32)
        *strengths, hue = self.color_jitter
        for column, strength in zip((BRIGHTNESS, CONTRAST, SATURATION), strengths):
            row[column] = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        row[HUE] = rng.uniform(-hue, hue)
        row[JITTER_ORDER] = rng.integers(len(JITTER_ORDERS)) if rng.random() < self.color_jitter_prob else -1
        row[GRAYSCALE] = rng.random() < self.grayscale_prob
        low, high = self.gaussian_blur_sigma
        row[BLUR_SIGMA] = rng.uniform(low, high) if rng.random() < self.gaussian_blur_prob else 0
        return row


class ViewSpec(NamedTuple):
    """One view of an image: random resized crop, horizontal flip and, for a contrastive view, photometric changes."""
    size: Union[int, Tuple[int, int]]
    scale: Tuple[float, ...] = (0.2, 1.0)
    ratio: Tuple[float, ...] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: str = 'bilinear'
    photometric: Optional[Photometric] = None

    @property
    def shape(self) -> Tuple[int, int]:
        """Height and width, px."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


def check_range(name: str, bounds: Sequence[float], top: float = 1) -> None:
    """Raise `InputError` unless 0 < min <= max <= top for a parameter's two bounds."""
    low, high = bounds
    if not 0 < low <= high <= top:
        limit = '' if top == math.inf else f' <= {top:g}'
        raise InputError(f'{name}={low:g} {high:g}: must be 0 < min <= max{limit}')


def two_views(
        img_size: Union[int, Tuple[int, int]],
        scale: Sequence[float] = (0.2, 1.0),
        weak_scale: Optional[Sequence[float]] = None,
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        color_jitter_prob: float = 0.8,
        grayscale_prob: float = 0.2,
        gaussian_blur_prob: float = 0.5,
        gaussian_blur_sigma: Sequence[float] = (0.1, 2.0),
        train_interpolation: str = 'bilinear',
) -> List[ViewSpec]:
    """The teacher's weak view and the student's contrastive view (Sec. 3.2, 4.1.1).

    Args:
        img_size: side of both views, px, or (H, W)
        scale: range of the crop's share of the image area
        weak_scale: the same for the weak view; default `scale`
        ratio: range of the crop's width / height, in units of the view's
        hflip: probability of a horizontal flip
        color_jitter: strengths of brightness, contrast, saturation and hue (hue at most 0.5)
        color_jitter_prob, grayscale_prob, gaussian_blur_prob: probabilities
        gaussian_blur_sigma: range of the blur's sigma, px
        train_interpolation: `bilinear` or `bicubic`

    Raises:
        InputError: a range, a probability or a strength out of bounds
    """
    check_range('scale', scale)
    check_range('weak_scale', weak_scale or scale)
    check_range('ratio', ratio, math.inf)
    check_range('gaussian_blur_sigma', gaussian_blur_sigma, 100)
    probabilities = dict(
        hflip=hflip, color_jitter_prob=color_jitter_prob, grayscale_prob=grayscale_prob,
        gaussian_blur_prob=gaussian_blur_prob)
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise InputError(f'{name}={value:g}: must be a probability from 0 to 1')
    if len(color_jitter) != 4 or min(color_jitter) < 0 or color_jitter[3] > 0.5:
        raise InputError(
            f"color_jitter={' '.join(f'{v:g}' for v in color_jitter)}: must be four strengths, none negative, hue at "
            f'most 0.5')
    geometry: Dict[str, Any] = dict(ratio=tuple(ratio), hflip=hflip, interpolation=train_interpolation)
    photometric = Photometric(
        tuple(color_jitter), color_jitter_prob, grayscale_prob, gaussian_blur_prob, tuple(gaussian_blur_sigma))
    return [
        ViewSpec(img_size, tuple(weak_scale or scale), **geometry),
        ViewSpec(img_size, tuple(scale), photometric=photometric, **geometry),
    ]


def multi_crop(
        views: Sequence[ViewSpec],
        sizes: Sequence[int] = (),
        scales: Optional[Sequence[float]] = None,
) -> List[ViewSpec]:
    """The teacher's view and several contrastive crops for the student, the full-size one first.

    Args:
        views: those of `two_views`
        sizes: sides of the crops in px, the full size first; default 1, 6/7, 5/7, 4/7 and 3/7 of the full size, which
            are the paper's 224, 192, 160, 128 and 96 px
        scales: MIN MAX of each crop's share of the image area, one pair after another; default the full-size view's
            times the crop's side / the full side, within 0.003 of the authors' code at 224 px

    Raises:
        InputError: `multi_crop` (sizes) does not start with the full size or exceeds it, `multi_crop_scale` (scales)
            has the wrong number of values or values out of bounds
    """
    teacher, full = views
    if not isinstance(full.size, int):
        raise InputError(f'multi_crop: needs square images, `img_size` is {full.size}')
    sizes = list(sizes) or [round(full.size * sevenths / 7) for sevenths in (7, 6, 5, 4, 3)]
    if sizes[0] != full.size or max(sizes) > full.size:
        raise InputError(f"multi_crop={' '.join(map(str, sizes))}: must start with the full size, {full.size}, and not "
                         f'exceed it')
    if scales is None:
        pairs = [tuple(bound * size / full.size for bound in full.scale) for size in sizes]
    else:
        pairs = list(zip(scales[::2], scales[1::2]))
        if len(scales) != 2 * len(sizes) or not all(0 < low <= high <= 1 for low, high in pairs):
            raise InputError(
                f"multi_crop_scale={' '.join(f'{v:g}' for v in scales)}: must be MIN MAX for each of {len(sizes)} "
                f'crops, 0 < MIN <= MAX <= 1')
    return [teacher, *(full._replace(size=size, scale=pair) for size, pair in zip(sizes, pairs))]


def view_rng(seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """Random generator of one view of one image in one epoch."""
    return np.random.default_rng((seed, epoch, index, view))


def draw_crop(
        rng: np.random.Generator,
        width: int,
        height: int,
        scale: Sequence[float],
        ratio: Sequence[float],
) -> Tuple[int, int, int, int]:
    """Draw (left, top, right, bottom) of a random resized crop, by torchvision's algorithm."""
    area = width * height
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # no crop fits an image this narrow or flat: take its centre, at the nearest ratio allowed
    aspect = width / height
    w = width if aspect <= ratio[1] else max(1, round(height * ratio[1]))
    h = height if aspect >= ratio[0] else max(1, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _reduction(boxes: Sequence[Tuple[int, int, int, int]], specs: Sequence[ViewSpec]) -> int:
    """Largest of 1, 2, 4, 8 by which the image may be reduced and no crop have fewer pixels than its view."""
    least = min(
        min((bottom - top) / spec.shape[0], (right - left) / spec.shape[1])
        for (left, top, right, bottom), spec in zip(boxes, specs))
    return next((reduction for reduction in (8, 4, 2) if least >= reduction), 1)


def _resized_crop(pixels: np.ndarray, box: Sequence[int], size: Any, interpolation: str) -> torch.Tensor:
    """Crop (H, W, C) pixels and resize to (C, H, W), antialiased like Pillow in a third of its time."""
    left, top, right, bottom = box
    crop = torch.from_numpy(pixels[None, top:bottom, left:right].copy()).permute(0, 3, 1, 2)
    return F.interpolate(crop, size, mode=interpolation, antialias=True).squeeze(0)


def cut_views(
        image: Union[Image.Image, np.ndarray],
        specs: Sequence[ViewSpec],
        seed: int,
        epoch: int,
        index: int,
        decoding: Decoding = Decoding(),
) -> Tuple[List[torch.Tensor], List[Optional[torch.Tensor]]]:
    """Cut all views out of one image, which is decoded once, and no larger than the views need.

    Crops are drawn from the size in the image's header. Where all of them are at least 2, 4 or 8 times as wide and high
    as their views, a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size. The edges of the crops then move to whole
    pixels of that size, by less than a pixel of the view.

    Args:
        image: as opened by Pillow, decoded or not, or (H, W, C) uint8 pixels
        specs: the views
        seed, epoch, index: see `view_rng`
        decoding: how to decode it

    Returns:
        per view (C, H, W) uint8, channels last in memory; per view its photometric row, (7,) float32, or None
    """
    boxes, flips, rows = [], [], []
    width, height = upright_size(image, decoding)
    for number, spec in enumerate(specs):
        rng = view_rng(seed, epoch, index, number)
        aspect = spec.shape[1] / spec.shape[0]
        boxes.append(draw_crop(rng, width, height, spec.scale, [bound * aspect for bound in spec.ratio]))
        flips.append(rng.random() < spec.hflip)
        rows.append(torch.from_numpy(spec.photometric.draw(rng)) if spec.photometric is not None else None)
    pixels, reduction = decode_pixels(image, decoding, _reduction(boxes, specs))
    views = []
    for spec, (left, top, right, bottom), flip in zip(specs, boxes, flips):
        width, height = (right - left) // reduction, (bottom - top) // reduction
        x, y = round((left + right) / (2 * reduction) - width / 2), round((top + bottom) / (2 * reduction) - height / 2)
        view = _resized_crop(pixels, (x, y, x + width, y + height), spec.size, spec.interpolation)
        views.append(view.flip(2) if flip else view)
    return views, rows

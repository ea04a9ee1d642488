"""Which views an image gives, and every random choice about them (Sec. 3.2).

All that is random about a view is a function of (seed, epoch, image, view): neither workers nor processes nor a resume
change it. What is geometric (crop, flip) is done here on the decoded image; what is photometric is only *drawn* here,
a row of numbers that `timm_cgh.data.augment` applies to whole batches on the training device.
"""
import itertools
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from timm_cgh.errors import InputError

from .decode import decode_pixels

__all__ = ['JITTER_ORDERS', 'NUM_PHOTOMETRIC', 'Photometric', 'ViewSpec', 'cut_views', 'multi_crop', 'two_views',
           'view_rng']

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# torchvision's ColorJitter applies the four in a random order
JITTER_ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
# columns of a photometric row: four jitter factors, order (-1: no jitter), grayscale flag, blur sigma, px (0: no blur)
NUM_PHOTOMETRIC = 7


class Photometric(NamedTuple):
    """Strengths and probabilities of the contrastive augmentation (MoCo-v2's, as in the paper)."""
    jitter: Tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    blur_sigma: Tuple[float, float] = (0.1, 2.0)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One photometric row, (7,) float32."""
        row = np.zeros(NUM_PHOTOMETRIC, dtype=np.float32)
        brightness, contrast, saturation, hue = self.jitter
        for i, strength in enumerate((brightness, contrast, saturation)):
            row[i] = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        row[3] = rng.uniform(-hue, hue)
        row[4] = rng.integers(len(JITTER_ORDERS)) if rng.random() < self.jitter_prob else -1
        row[5] = rng.random() < self.gray_prob
        row[6] = rng.uniform(*self.blur_sigma) if rng.random() < self.blur_prob else 0
        return row


class ViewSpec(NamedTuple):
    """One view of an image: a random resized crop, a flip and, for a contrastive view, photometric changes."""
    size: int
    scale: Tuple[float, float] = (0.2, 1.0)
    ratio: Tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: str = 'bilinear'
    photometric: Optional[Photometric] = None


def two_views(
        size: int,
        scale: Sequence[float] = (0.2, 1.0),
        weak_scale: Optional[Sequence[float]] = None,
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        jitter_prob: float = 0.8,
        gray_prob: float = 0.2,
        blur_prob: float = 0.5,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        interpolation: str = 'bilinear',
) -> List[ViewSpec]:
    """The teacher's weak view and the student's contrastive view (Sec. 3.2, 4.1.1).

    Args:
        size: side, px
        scale: range of the crop's share of the image area; `weak_scale` the weak view's where it differs
        ratio: range of the crop's width : height
        hflip: probability of a horizontal flip
        color_jitter: strengths of brightness, contrast, saturation, hue (hue at most 0.5)
        jitter_prob, gray_prob, blur_prob: probabilities
        blur_sigma: range of the blur, px
        interpolation: `bilinear` or `bicubic`

    Raises:
        InputError: a range or a probability that no view can have; names the flag
    """
    for flag, (low, high), top in (
            ('--scale', scale, 1),
            ('--weak-scale', weak_scale or scale, 1),
            ('--ratio', ratio, math.inf),
            ('--gaussian-blur-sigma', blur_sigma, math.inf),
    ):
        if not 0 < low <= high <= top:
            raise InputError(f'{flag} {low:g} {high:g}: must be 0 < first <= second' + ' <= 1' * (top == 1))
    for flag, value in (
            ('--hflip', hflip),
            ('--color-jitter-prob', jitter_prob),
            ('--grayscale-prob', gray_prob),
            ('--gaussian-blur-prob', blur_prob),
    ):
        if not 0 <= value <= 1:
            raise InputError(f'{flag} {value:g}: must be a probability from 0 to 1')
    if len(color_jitter) != 4 or min(color_jitter) < 0 or color_jitter[3] > 0.5:
        raise InputError(
            f"--color-jitter {' '.join(f'{v:g}' for v in color_jitter)}: must be four strengths, none negative, hue at "
            f'most 0.5')
    geometry = dict(ratio=tuple(ratio), hflip=hflip, interpolation=interpolation)
    photometric = Photometric(tuple(color_jitter), jitter_prob, gray_prob, blur_prob, tuple(blur_sigma))
    return [
        ViewSpec(size, tuple(weak_scale or scale), **geometry),
        ViewSpec(size, tuple(scale), photometric=photometric, **geometry),
    ]


def multi_crop(
        views: Sequence[ViewSpec],
        sizes: Sequence[int] = (),
        scales: Optional[Sequence[float]] = None,
) -> List[ViewSpec]:
    """The teacher's view and several contrastive crops for the student, the full-size one first.

    Args:
        views: of `two_views`
        sizes: sides of the crops, px, the full size first; none: 1, 6/7, 5/7, 4/7 and 3/7 of the full size, the paper's
            224, 192, 160, 128 and 96 px of 224
        scales: MIN MAX of each crop's share of the image area, one pair after another; none: the full-size view's, in
            proportion to the crop's side, which at 224 px are those of the authors' code within 0.003

    Raises:
        InputError: sizes that do not start with the full size or exceed it, scales that no crop can have or of another
            number; names the flag
    """
    teacher, full = views
    sizes = list(sizes) or [round(full.size * sevenths / 7) for sevenths in (7, 6, 5, 4, 3)]
    if sizes[0] != full.size or max(sizes) > full.size:
        raise InputError(f"--multi-crop {' '.join(map(str, sizes))}: must start with the full size, {full.size}, and "
                         f'not exceed it')
    if scales is None:
        pairs = [tuple(bound * size / full.size for bound in full.scale) for size in sizes]
    else:
        pairs = list(zip(scales[::2], scales[1::2]))
        if len(scales) != 2 * len(sizes) or not all(0 < low <= high <= 1 for low, high in pairs):
            raise InputError(
                f"--multi-crop-scale {' '.join(f'{v:g}' for v in scales)}: must be MIN MAX for each of {len(sizes)} "
                f'crops, 0 < MIN <= MAX <= 1')
    return [teacher, *(full._replace(size=size, scale=pair) for size, pair in zip(sizes, pairs))]


def view_rng(seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """The random numbers of one view of one image in one epoch."""
    return np.random.default_rng((seed, epoch, index, view))


def draw_crop(
        rng: np.random.Generator,
        width: int,
        height: int,
        scale: Tuple[float, float],
        ratio: Tuple[float, float],
) -> Tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random resized crop, by torchvision's algorithm."""
    area = width * height
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # an image too narrow or too flat: its central part, of the nearest ratio allowed
    aspect = width / height
    w = width if aspect <= ratio[1] else max(1, round(height * ratio[1]))
    h = height if aspect >= ratio[0] else max(1, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _reduction(boxes: Sequence[Tuple[int, int, int, int]], specs: Sequence[ViewSpec]) -> int:
    """By how much an image may be reduced, at most 8, before one of the crops has fewer pixels than its view."""
    least = min(
        min(right - left, bottom - top) / spec.size for (left, top, right, bottom), spec in zip(boxes, specs))
    return next((reduction for reduction in (8, 4, 2) if least >= reduction), 1)


def _resized_crop(pixels: np.ndarray, box: Sequence[int], size: int, interpolation: str) -> torch.Tensor:
    """Crop (H, W, C) pixels, resize to (C, size, size); antialiased as Pillow does it, in a third of the time."""
    left, top, right, bottom = box
    crop = torch.from_numpy(pixels[None, top:bottom, left:right].copy()).permute(0, 3, 1, 2)
    return F.interpolate(crop, (size, size), mode=interpolation, antialias=True).squeeze(0)


def cut_views(
        image: Image.Image,
        specs: Sequence[ViewSpec],
        seed: int,
        epoch: int,
        index: int,
        mode: str = 'RGB',
) -> Tuple[List[torch.Tensor], List[Optional[torch.Tensor]]]:
    """All views of one image, which is decoded once, and no larger than they need it.

    Crops are drawn from the size in the image's header. Where all are at least twice (four, eight times) as wide and
    high as their views, a JPEG file is decoded at a half (quarter, eighth) of its size; their edges then move to whole
    pixels of that size, by less than a pixel of the view.

    Args:
        image: as opened by Pillow, decoded or not
        specs: the views
        seed, epoch, index: see `view_rng`
        mode: `L` or `RGB`

    Returns:
        uint8 views (C, size, size), in memory channels last, and, per view, its photometric row (7,) float32 or None
    """
    boxes, flips, rows = [], [], []
    for number, spec in enumerate(specs):
        rng = view_rng(seed, epoch, index, number)
        boxes.append(draw_crop(rng, *image.size, spec.scale, spec.ratio))
        flips.append(rng.random() < spec.hflip)
        rows.append(torch.from_numpy(spec.photometric.draw(rng)) if spec.photometric is not None else None)
    pixels, reduction = decode_pixels(image, mode, _reduction(boxes, specs))
    views = []
    for spec, (left, top, right, bottom), flip in zip(specs, boxes, flips):
        width, height = (right - left) // reduction, (bottom - top) // reduction
        x, y = round((left + right) / (2 * reduction) - width / 2), round((top + bottom) / (2 * reduction) - height / 2)
        view = _resized_crop(pixels, (x, y, x + width, y + height), spec.size, spec.interpolation)
        views.append(view.flip(2) if flip else view)
    return views, rows

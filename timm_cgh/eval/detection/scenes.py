"""Scenes composed of UCI's handwritten digits: detection data that needs no download."""
from functools import partial
from typing import Any, Dict, List, Tuple

import numpy as np
from PIL import Image

from timm_cgh.data import Digits
from timm_cgh.errors import InputError

from .annotations import Annotations, annotate_mask, make_content

__all__ = ['digit_scenes']

_SCENES = dict(train=1000, validation=100)


def _compose(digits: Digits, split: str, number: int) -> Tuple[Image.Image, List[Tuple[int, np.ndarray]]]:
    """A scene of 1 to 4 digits on a noisy ground; their labels and masks, which do not overlap."""
    rng = np.random.default_rng((list(_SCENES).index(split), number))
    width, height = (int(side) for side in rng.integers(96, 129, size=2))
    pixels = rng.normal(rng.uniform(40, 90), 12, size=(height, width))
    objects: List[Tuple[int, np.ndarray]] = []
    for _ in range(rng.integers(1, 5)):
        side = int(rng.integers(24, 49))
        image, label = digits[int(rng.integers(len(digits)))]
        stroke = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).astype(float)
        x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        mask = np.zeros((height, width), dtype=bool)
        mask[y:y + side, x:x + side] = stroke > 80
        if any((mask & other).any() for _, other in objects):
            continue
        pixels[y:y + side, x:x + side] += stroke / 255 * rng.uniform(80, 160)
        objects.append((label, mask))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), objects


def _read_scene(digits: Digits, split: str, entry: Dict[str, Any]) -> Image.Image:
    return _compose(digits, split, entry['id'])[0]


def digit_scenes(split: str, split_parameter: str) -> Annotations:
    """Scenes of `train` (1000) or `validation` (100, of other digits), each a function of its number.

    Raises:
        InputError: another split
    """
    if split not in _SCENES:
        raise InputError(f'{split_parameter}={split}: of digits there are {" and ".join(_SCENES)}')
    digits = Digits(split, 'L')
    entries, annotations = [], []
    for number in range(1, _SCENES[split] + 1):
        image, objects = _compose(digits, split, number)
        entries.append(dict(id=number, file_name=f'{split}_{number}.png', width=image.width, height=image.height))
        annotations += [annotate_mask(number, label + 1, mask) for label, mask in objects]
    content = make_content(entries, annotations, Digits.classes)
    return Annotations(content, partial(_read_scene, digits, split))

"""Read one image of a data set in the wanted mode, or a substitute where it cannot be read."""
import math
import struct
import tarfile
import zlib
from contextlib import suppress
from typing import Any, Callable, List, Tuple

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import Dataset, Subset

from timm_cgh.errors import InputError, reason

from .labels import to_label

try:
    import simplejpeg
except ImportError:  # Pillow gives the same pixels, a quarter slower
    simplejpeg = None

__all__ = ['UNREADABLE', 'decode_pixels', 'image_name', 'read_image', 'read_or_substitute', 'to_mode']

_GOLDEN = (math.sqrt(5) - 1) / 2
_MAX_TRIED = 50  # unreadable images in a row that end the run: most of the data set is broken
# What Pillow and timm's readers raise for broken files, missing files and empty cells of a table; RuntimeError: AVIF.
UNREADABLE = (
    AssertionError, EOFError, Image.DecompressionBombError, MemoryError, OSError, OverflowError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, tarfile.TarError, zlib.error)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image and convert it to `L` or `RGB`; transparency is dropped, as timm does.

    Pillow clips grey levels of more than 8 bits instead of scaling them. Here integers count as 16 bits wide, and
    floating point values as [0, 1] where none exceeds 1.
    """
    image.load()
    if image.mode.startswith('I') or image.mode == 'F':
        values = np.asarray(image).astype(np.float32)
        scale = 1 / 257 if image.mode != 'F' else 255.0 if values.max(initial=0) <= 1 else 1.0
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')  # Pillow warns without this detour
    return image if image.mode == mode else image.convert(mode)


def decode_pixels(image: Image.Image, mode: str, reduction: int = 1) -> Tuple[np.ndarray, int]:
    """Pixels of an image, which is decoded here unless it has been.

    A JPEG file is decoded to 1/reduction of its size at less cost, from fewer coefficients of its 8 x 8 blocks. Images
    of other formats, and decoded ones, keep their size.

    Args:
        image: as opened by Pillow
        mode: `L` or `RGB`
        reduction: 1, 2, 4 or 8

    Returns:
        (H, W, C) uint8; the reduction applied
    """
    if isinstance(image, JpegImageFile) and image.tile:  # not decoded yet
        width, height = image.size
        if simplejpeg is not None and image.fp and image.mode in ('L', 'RGB'):
            image.fp.seek(0)
            with suppress(ValueError):  # Pillow reads more files, and has better messages about the rest
                pixels = simplejpeg.decode_jpeg(
                    image.fp.read(),
                    'GRAY' if mode == 'L' else 'RGB',
                    min_width=math.ceil(width / reduction),
                    min_height=math.ceil(height / reduction),
                    min_factor=reduction,
                )
                return pixels, reduction
        image.draft(mode, (width // reduction, height // reduction))
    else:
        reduction = 1
    pixels = np.asarray(to_mode(image, mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None], reduction


def read_image(dataset: Dataset, index: int, mode: str, convert: Callable = to_mode) -> Tuple[Any, int]:
    """Read an image and its label; the data set's own transform is not applied.

    Args:
        dataset: map-style, of (PIL image, target) items, or a `Subset` of one
        index: of the item
        mode: `L` or `RGB`
        convert: called with the image, opened but perhaps not yet decoded, and the mode

    Returns:
        result of `convert`, by default the image in that mode; label, -1 where unknown

    Raises:
        Exception: whatever the reader or the decoder raises
    """
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    if hasattr(dataset, 'reader'):  # timm's own item access silently replaces what it cannot read
        file, target, *_ = dataset.reader[index]
        with file:
            return convert(Image.open(file), mode), to_label(target)
    image, target = dataset[index][:2]
    return convert(image, mode), to_label(target)


def image_name(dataset: Dataset, index: int) -> str:
    """File name of an item, or its index where the source has no names."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    try:
        name = dataset.filename(index, absolute=True)
    except Exception:  # readers without names raise various things
        name = None
    return str(name) if name else f'image {index}'


def read_or_substitute(
        dataset: Dataset,
        index: int,
        mode: str,
        convert: Callable = to_mode,
) -> Tuple[Any, int, List[str]]:
    """Read an image, or a substitute where it cannot be read.

    Unreadable files are often neighbours (an interrupted copy), so the candidates are spread over the whole data set:
    they lie at multiples of the golden ratio from the image, and are the same ones each time.

    Args:
        dataset, index, mode, convert: see `read_image`

    Returns:
        result of `convert`, by default the image; label; names of the unreadable images

    Raises:
        InputError: none of fifty candidates can be read
        IndexError: no such item
    """
    if not 0 <= index < len(dataset):
        raise IndexError(f'image {index} of {len(dataset)}')
    unreadable: List[str] = []
    count = len(dataset)
    for place in dict.fromkeys((index + int(step * _GOLDEN * count)) % count for step in range(_MAX_TRIED)):
        try:
            return *read_image(dataset, place, mode, convert), unreadable
        except UNREADABLE as error:
            why = reason(error, 200)
            unreadable.append(image_name(dataset, place))
    raise InputError(
        f'data_dir: most images cannot be read: none of {len(unreadable)} that were tried, '
        f'{unreadable[0]} among them ({why})')

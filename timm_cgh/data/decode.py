"""One image out of a data set, decoded and in the wanted mode; what cannot be read is passed over and named."""
import contextlib
import math
import struct
import tarfile
import zlib
from typing import Any, Callable, Iterator, List, Tuple

import numpy as np
from PIL import Image
from timm.data import get_img_extensions, set_img_extensions
from torch.utils.data import Dataset, Subset

from timm_cgh.errors import InputError

try:
    import simplejpeg
except ImportError:  # the same pixels from Pillow, a quarter slower
    simplejpeg = None

__all__ = ['decode_pixels', 'image_name', 'more_extensions', 'read_image', 'read_or_another', 'to_label', 'to_mode']

_GOLDEN = (math.sqrt(5) - 1) / 2
_MAX_TRIED = 50  # in place of an unreadable image, before a data set is given up: most of it is broken
# what Pillow and timm's readers raise on broken files, missing files and empty cells
_UNREADABLE = (
    AssertionError,
    EOFError,
    Image.DecompressionBombError,
    OSError,
    OverflowError,
    RuntimeError,  # AVIF
    struct.error,
    SyntaxError,
    tarfile.TarError,
    TypeError,
    ValueError,
    zlib.error,
)


@contextlib.contextmanager
def more_extensions() -> Iterator[None]:
    """Have timm's folder and tar readers find more than PNG and JPEG files."""
    before = get_img_extensions()
    set_img_extensions(sorted({*before, '.webp', '.bmp', '.tif', '.tiff', '.avif'}))
    try:
        yield
    finally:
        set_img_extensions(before)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image and convert it to `L` or `RGB`; transparency is dropped, as timm does.

    Pillow clips grey levels of more than 8 bits where it should scale them: integers are taken as 16 bits wide,
    floating point as [0, 1] where nothing exceeds 1.
    """
    image.load()
    if image.mode.startswith('I') or image.mode == 'F':
        values = np.asarray(image).astype(np.float32)
        scale = 1 / 257 if image.mode != 'F' else 255.0 if values.max(initial=0) <= 1 else 1.0
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')  # the detour that Pillow asks for
    return image if image.mode == mode else image.convert(mode)


def decode_pixels(image: Image.Image, mode: str, reduction: int = 1) -> Tuple[np.ndarray, int]:
    """Pixels of an image, decoded now if it is not yet.

    A JPEG file that is still to be decoded can come in 1/reduction of its size at less cost, from fewer coefficients of
    its 8 x 8 blocks. Other images come in their own size.

    Args:
        image: as opened by Pillow
        mode: `L` or `RGB`
        reduction: 1, 2, 4 or 8

    Returns:
        (H, W, C) uint8; the reduction that was possible
    """
    encoded = image.format in ('JPEG', 'MPO') and bool(image.tile)
    reduction = reduction if encoded else 1
    width, height = image.size
    if encoded and simplejpeg is not None and image.mode in ('L', 'RGB'):
        image.fp.seek(0)
        try:
            pixels = simplejpeg.decode_jpeg(
                image.fp.read(),
                'GRAY' if mode == 'L' else 'RGB',
                min_width=math.ceil(width / reduction),
                min_height=math.ceil(height / reduction),
                min_factor=reduction,
            )
            return pixels, reduction
        except ValueError:
            pass  # Pillow forgives more, and says what is wrong with the rest
    if encoded:
        image.draft(mode, (width // reduction, height // reduction))
    pixels = np.asarray(to_mode(image, mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None], reduction


def to_label(target: Any) -> int:
    """The class of an item, -1 where it has none or several."""
    try:
        return int(target)
    except (TypeError, ValueError):
        return -1


def read_image(dataset: Dataset, index: int, mode: str, take: Callable = to_mode) -> Tuple[Any, int]:
    """Image and label of an item, without the data set's own transform; raises what the decoder raises.

    Args:
        dataset: map-style, gives (PIL image, target) items; a `Subset` is looked through
        index: of the item
        mode: `L` or `RGB`
        take: what to make of the image, opened but perhaps not yet decoded, and the mode

    Returns:
        what `take` gives, the image of that mode by default; label
    """
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    if hasattr(dataset, 'reader'):  # past timm's own item access, which replaces what it cannot read without a name
        file, target, *_ = dataset.reader[index]
        with file:
            return take(Image.open(file), mode), to_label(target)
    image, target = dataset[index][:2]
    return take(image, mode), to_label(target)


def image_name(dataset: Dataset, index: int) -> str:
    """File name of an item, or its number where the source knows no names."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    try:
        name = dataset.filename(index, absolute=True)
    except Exception:  # not every reader has names, and they fail in their own ways
        name = None
    return str(name) if name else f'image {index}'


def read_or_another(
        dataset: Dataset,
        index: int,
        mode: str,
        take: Callable = to_mode,
) -> Tuple[Any, int, List[str]]:
    """Read an image, or another one in its place.

    Unreadable files come in clusters of neighbours (a copy that was interrupted), so the images tried in its place lie
    all over the data set: at the multiples of the golden ratio from it, the same ones whenever it is asked for.

    Args:
        dataset, index, mode, take: see `read_image`

    Returns:
        what `take` gives, the image by default; label; names of the images that were passed over

    Raises:
        InputError: none of fifty can be read
        IndexError: no such item
    """
    if not 0 <= index < len(dataset):
        raise IndexError(f'image {index} of {len(dataset)}')
    unreadable: List[str] = []
    count = len(dataset)
    for place in dict.fromkeys((index + int(step * _GOLDEN * count)) % count for step in range(_MAX_TRIED)):
        try:
            return *read_image(dataset, place, mode, take), unreadable
        except _UNREADABLE as error:
            reason = ' '.join(str(error).split()) or type(error).__name__
            unreadable.append(image_name(dataset, place))
    raise InputError(
        f'--data-dir: most images cannot be read: none of {len(unreadable)} that were tried, '
        f'{unreadable[0]} among them ({reason[:200]})')

"""Read one image of a data set in the wanted mode and the right way up, or a substitute where it cannot be read."""
import math
import struct
import tarfile
import zlib
from contextlib import suppress
from typing import Any, BinaryIO, Callable, Dict, List, NamedTuple, Optional, Tuple, TypeGuard, Union

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import Dataset, Subset

from timm_cgh.errors import InputError, reason

from .labels import to_label, whole

try:
    import simplejpeg
except ImportError:  # Pillow gives the same pixels, a quarter slower
    simplejpeg = None
try:
    import pillow_heif
    pillow_heif.register_heif_opener()  # photographs of telephones
except ImportError:
    pass

__all__ = [
    'MAX_PIXELS', 'UNREADABLE', 'Decoding', 'ImageSubset', 'dataset_decoding', 'decode_image', 'decode_pixels',
    'image_name', 'open_image', 'read_image', 'read_or_substitute', 'read_thumbnail', 'to_mode', 'to_uint8',
    'upright_size']

MAX_PIXELS = 2 * 89478485  # what Pillow decodes at most
_GOLDEN = (math.sqrt(5) - 1) / 2
_MAX_TRIED = 50  # unreadable images in a row that end the run: most of the data set is broken
# EXIF orientation -> whether to swap rows and columns, then to flip vertically, horizontally
_TURNS = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}
_NUMPY_MAGIC, _TIFF_MAGIC = b'\x93NUMPY', (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
# What Pillow and timm's readers raise for broken files, missing files and empty cells of a table; RuntimeError: AVIF.
UNREADABLE = (
    AssertionError, EOFError, Image.DecompressionBombError, MemoryError, OSError, OverflowError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, tarfile.TarError, zlib.error)


class Decoding(NamedTuple):
    """How the images of a data set are decoded; the fields are explained at `open_dataset`.

    `mode` is `L`, `RGB`, or the number of channels where there are neither one nor three.
    """
    mode: str = 'RGB'
    pixel_range: Optional[Tuple[float, float]] = None
    max_pixels: int = MAX_PIXELS
    exif_orientation: bool = True


def to_uint8(values: np.ndarray, pixel_range: Optional[Tuple[float, float]] = None) -> np.ndarray:
    """Scale pixels of more than 8 bits to 0 ... 255, those out of range clipped; NaN is black.

    Args:
        values: pixels of any type; 8 bits stay as they are
        pixel_range: what becomes 0 and 255; default 0 and 65535 of integers, 0 and 1 of floating point values. It
            depends on no image, so that equal pixels of a data set stay equal
    """
    if values.dtype == np.uint8:
        return values
    low, high = pixel_range or ((0, 1) if values.dtype.kind in 'fb' else (0, 65535))
    with np.errstate(over='ignore', invalid='ignore'):
        levels = (values.astype(np.float32) - low) * (255 / (high - low))
        return np.nan_to_num(np.rint(levels), posinf=255, neginf=0).clip(0, 255).astype(np.uint8)


def to_mode(image: Image.Image, mode: str, pixel_range: Optional[Tuple[float, float]] = None) -> Image.Image:
    """Decode an image and convert it to `L` or `RGB`; transparency is dropped, as timm does.

    Pillow clips grey levels of more than 8 bits; here they are scaled (`to_uint8`).
    """
    image.load()
    if image.mode.startswith('I') or image.mode == 'F':
        image = Image.fromarray(to_uint8(np.asarray(image), pixel_range))
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')  # Pillow warns without this detour
    return image if image.mode == mode else image.convert(mode)


def _is_coded_jpeg(image: Image.Image) -> TypeGuard[JpegImageFile]:
    return isinstance(image, JpegImageFile) and bool(image.tile)


def _orientation(image: Image.Image, decoding: Decoding) -> int:
    """EXIF orientation that is still to be applied, 1 for none; decodes the image unless it is a JPEG file."""
    if not _is_coded_jpeg(image):
        image.load()  # a PNG may have the tag behind its pixels; a TIFF is turned by Pillow, which removes the tag
    if decoding.exif_orientation:
        with suppress(*UNREADABLE):
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _turn(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    swap, vertical, horizontal = _TURNS[orientation] if orientation in range(2, 9) else (0, 0, 0)
    if swap:
        pixels = pixels.swapaxes(0, 1)
    return pixels[::-1 if vertical else 1, ::-1 if horizontal else 1]


def upright_size(image: Union[Image.Image, np.ndarray], decoding: Decoding) -> Tuple[int, int]:
    """Width and height of what `decode_pixels` gives without a reduction."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    swapped = _orientation(image, decoding) in range(5, 9)
    return (image.height, image.width) if swapped else image.size


def decode_pixels(
        image: Union[Image.Image, np.ndarray],
        decoding: Decoding = Decoding(),
        reduction: int = 1,
) -> Tuple[np.ndarray, int]:
    """Pixels of an image, upright; it is decoded here unless it has been.

    A JPEG file is decoded to 1/reduction of its size at less cost, from fewer coefficients of its 8 x 8 blocks. Images
    of other formats, and decoded ones, keep their size.

    Args:
        image: as opened by Pillow, or pixels
        decoding: how to decode
        reduction: 1, 2, 4 or 8

    Returns:
        (H, W, C) uint8; the reduction applied
    """
    if isinstance(image, np.ndarray):
        return image, 1
    orientation, mode = _orientation(image, decoding), decoding.mode
    if _is_coded_jpeg(image):
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
                return _turn(pixels, orientation), reduction
        image.draft(mode, (width // reduction, height // reduction))
    else:
        reduction = 1
    pixels = np.asarray(to_mode(image, mode, decoding.pixel_range))
    return _turn(pixels if pixels.ndim == 3 else pixels[:, :, None], orientation), reduction


def decode_image(
        image: Union[Image.Image, np.ndarray], decoding: Decoding = Decoding()) -> Union[Image.Image, np.ndarray]:
    """Whole image, upright: of mode `L` or `RGB`, or its (H, W, C) uint8 pixels where it has other channels."""
    pixels, _ = decode_pixels(image, decoding)
    if decoding.mode.isdigit():
        return pixels
    return Image.fromarray(pixels[:, :, 0] if decoding.mode == 'L' else pixels)


def _check_size(width: int, height: int, decoding: Decoding) -> None:
    if width * height > decoding.max_pixels:
        raise ValueError(f'{width} x {height} px, `max_pixels` is {decoding.max_pixels}')


def _open_pillow(file: BinaryIO, decoding: Decoding) -> Image.Image:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # its message would not say how to raise the limit
    try:
        image = Image.open(file)
    except UnidentifiedImageError:  # its message may hold an address, another one each time
        raise ValueError('not an image that Pillow knows') from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    _check_size(*image.size, decoding)
    return image


def _read_tiff(file: BinaryIO, decoding: Decoding) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError('its bands need tifffile (pip install tifffile)') from error
    try:
        with tifffile.TiffFile(file) as tiff:
            page = tiff.pages[0]
            _check_size(page.imagewidth, page.imagelength, decoding)
            return tiff.series[0].asarray()
    except Exception as error:  # for broken files, anything
        raise ValueError(reason(error)) from error


def _read_bands(file: BinaryIO, magic: bytes, decoding: Decoding) -> np.ndarray:
    """(H, W, C) uint8 pixels of a NumPy file, or of any image with as many bands as wanted."""
    if magic == _NUMPY_MAGIC:
        values = np.load(file, allow_pickle=False)
    elif magic.startswith(_TIFF_MAGIC):
        values = _read_tiff(file, decoding)
    else:
        values = np.asarray(_open_pillow(file, decoding))
    chans = {'L': 1, 'RGB': 3}.get(decoding.mode) or int(decoding.mode)
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim == 3 and values.shape[2] != chans and values.shape[0] == chans:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] != chans:
        raise ValueError(f'its shape is {values.shape}, `in_chans` is {chans}')
    _check_size(values.shape[1], values.shape[0], decoding)
    return to_uint8(values, decoding.pixel_range)


def open_image(file: BinaryIO, decoding: Decoding) -> Union[Image.Image, np.ndarray]:
    """Open an image file: with Pillow, which need not decode it yet, or its (H, W, C) uint8 pixels at once.

    Raises:
        ValueError: more pixels than allowed, or another number of channels than wanted
    """
    magic = file.read(6)
    file.seek(0)
    if decoding.mode.isdigit() or magic == _NUMPY_MAGIC:
        return _read_bands(file, magic, decoding)
    image = _open_pillow(file, decoding)
    bands = getattr(image, 'tag_v2', {}).get(277, 1)  # SamplesPerPixel
    if bands > 4:  # Pillow gives the first three
        raise ValueError(f'a TIFF of {bands} bands, which `in_chans` {bands} reads')
    if decoding.pixel_range and image.mode.startswith('RGB') and ';16' in str(getattr(image, 'tile', '')):
        if bands == 3:
            file.seek(0)
            return _read_bands(file, magic, decoding)
        raise ValueError('Pillow gives 8 of the 16 bits of its colours: `pixel_range` needs TIFF files of three bands')
    return image


def _locate(dataset: Dataset, index: int) -> Tuple[Any, int]:
    """The data set behind any `Subset`, and the index of the item there."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    return dataset, index


def dataset_decoding(dataset: Dataset, mode: Optional[str] = None) -> Decoding:
    """How `open_dataset` was told to decode the images of a data set; `mode` replaces that of the images."""
    decoding = getattr(whole(dataset), 'decoding', Decoding())
    return decoding._replace(mode=mode) if mode else decoding


def read_image(
        dataset: Dataset,
        index: int,
        mode: Optional[str] = None,
        convert: Callable[[Any, Decoding], Any] = decode_image,
) -> Tuple[Any, int]:
    """Read an image and its label; the data set's own transform is not applied.

    Args:
        dataset: map-style, of (PIL image, target) items, or a `Subset` of one
        index: of the item
        mode: see `image_mode`; default that of the data set
        convert: called with what `open_image` returns

    Returns:
        result of `convert`, by default the image in that mode, upright; label, -1 where unknown

    Raises:
        UNREADABLE: whatever the reader or the decoder raises for a broken image
    """
    decoding = dataset_decoding(dataset, mode)
    dataset, index = _locate(dataset, index)
    if hasattr(dataset, 'reader'):  # timm's own item access silently replaces what it cannot read
        file, target, *_ = dataset.reader[index]
        with file:
            return convert(open_image(file, decoding), decoding), to_label(target)
    image, target = dataset[index][:2]
    return convert(image, decoding), to_label(target)


class ImageSubset(Subset):
    """Chosen images of a map-style data set, as (PIL image, label) items, decoded as the data set says.

    An unreadable image raises one of `UNREADABLE`, where timm would give another image.
    """

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        return read_image(self, index)

    def __getitems__(self, indices: List[int]) -> List[Tuple[Image.Image, int]]:
        return [self[index] for index in indices]


def read_thumbnail(dataset: Dataset, index: int) -> Tuple[Image.Image, int]:
    """Read an image to look at, at most 160 px on a side, and its label; its first channel if it has not one or three.

    Raises:
        UNREADABLE: see `read_image`
    """
    image, label = read_image(dataset, index)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[:, :, 0])
    image.thumbnail((160, 160))
    return image, label


def image_name(dataset: Dataset, index: int) -> str:
    """File name of an item, or its index where the source has no names."""
    dataset, index = _locate(dataset, index)
    try:
        name = dataset.filename(index, absolute=True)
    except Exception:  # readers without names raise various things
        name = None
    return str(name) if name else f'image {index}'


def read_or_substitute(
        dataset: Dataset,
        index: int,
        convert: Callable[[Any, Decoding], Any] = decode_image,
) -> Tuple[Any, int, List[str]]:
    """Read an image, or a substitute where it cannot be read. For training only.

    Unreadable files are often neighbours (an interrupted copy), so the candidates are spread over the whole data set:
    they lie at multiples of the golden ratio from the image, and are the same ones each time.

    Args:
        dataset, index, convert: see `read_image`

    Returns:
        result of `convert`, by default the image; label; names of the unreadable images, with the reason

    Raises:
        InputError: none of fifty candidates can be read
        IndexError: no such item
    """
    if not 0 <= index < len(dataset):
        raise IndexError(f'image {index} of {len(dataset)}')
    unreadable: Dict[int, str] = {}
    count = len(dataset)
    for step in range(_MAX_TRIED):
        place = (index + int(step * _GOLDEN * count)) % count
        if place in unreadable:
            continue
        try:
            return *read_image(dataset, place, None, convert), list(unreadable.values())
        except UNREADABLE as error:
            unreadable[place] = f'{image_name(dataset, place)} ({reason(error, 200)})'
    raise InputError(
        f'data_dir: most images cannot be read: none of {len(unreadable)} that were tried, {unreadable[index]} among '
        f'them')

"""All images of a source, with their names and without labels."""
import os
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset

from timm_cgh.data import open_dataset
from timm_cgh.data.labels import file_names
from timm_cgh.data.sources import create_decoding, source_prefix
from timm_cgh.errors import InputError, checking
from timm_cgh.eval.features import why_unreadable
from timm_cgh.files import atomic_write

__all__ = ['NamedImages', 'find_unreadable', 'open_images', 'unique_names', 'write_unreadable']


class NamedImages(NamedTuple):
    """dataset: map-style, of (PIL image, target) items; names: of the images, all different."""
    dataset: Dataset
    names: List[str]


class _ListReader(Reader):
    """Files, whether they exist or not, as one of timm's readers; names are relative to `root`."""

    def __init__(self, root: str, names: List[str]):
        super().__init__()
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tuple[BinaryIO, int]:
        return open(os.path.join(self.root, self.names[index]), 'rb'), -1

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.names[index]
        return os.path.basename(name) if basename else os.path.join(self.root, name) if absolute else name


def _read_list(image_list: str) -> List[str]:
    with checking('image_list', image_list, OSError), \
            open(image_list, encoding='utf-8', errors='surrogateescape') as file:
        names = [line.rstrip('\r\n') for line in file if line.strip() and not line.startswith('#')]
    if not names:
        raise InputError(f'image_list={image_list}: names no image')
    return names


def _printable(name: str) -> str:
    """A name for one line of UTF-8: other bytes, and line breaks, as escape sequences."""
    text = os.fsencode(name).decode('utf-8', 'backslashreplace')
    return text.replace('\n', r'\n').replace('\r', r'\r')


def unique_names(names: List[str]) -> List[str]:
    """The names, with `#2`, `#3`, ... behind repeated ones (tables may hold files of several folders)."""
    if len(set(names)) == len(names):
        return names
    seen: Counter = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(f'{name}#{seen[name]}' if seen[name] > 1 else name)
    return unique


def open_images(
        data_config: Mapping[str, Any],
        dataset: str = '',
        data_dir: Optional[str] = None,
        split: Optional[str] = None,
        image_list: Optional[str] = None,
        **source: Any,
) -> NamedImages:
    """Open all images of a source, whatever their labels.

    Args:
        data_config: of the network; its `input_size` says whether it takes colour or grey images
        dataset, data_dir: see `timm_cgh.data.open_dataset`; `data_dir` may be a single image as well
        split: default all of `data_dir`, the training images of other data sets
        image_list: text file of paths below `data_dir` (default: the current folder), one per line; blank lines and
            `#` comments are skipped
        source: see `timm_cgh.data.open_dataset`

    Raises:
        InputError: nothing there, or a stream
    """
    files = None
    if source_prefix(dataset) in ('hfids', 'tfds', 'wds'):
        raise InputError(f'dataset={dataset}: a stream, which has no file names; use a folder, a tar, torch/ or hfds/')
    if image_list:
        if dataset or split:
            raise InputError(f"image_list={image_list}: does not go with `{'dataset' if dataset else 'split'}`")
        files = data_dir or '', _read_list(image_list)
    elif not dataset and not data_dir:
        raise InputError('data_dir: say which images, by it, `image_list` or `dataset`')
    elif not dataset and os.path.isfile(str(data_dir)) and not str(data_dir).endswith('.tar'):
        files = os.path.dirname(str(data_dir)), [os.path.basename(str(data_dir))]
    source['in_chans'] = data_config['input_size'][0]
    if files:
        images: Any = ImageDataset(files[0], reader=_ListReader(*files))
        keys = ('in_chans', 'pixel_range', 'max_pixels', 'exif_orientation')
        images.decoding = create_decoding(**{key: source[key] for key in keys if key in source})
    else:
        images = open_dataset(
            dataset, data_dir, split, search_split=split is not None, split_parameter='split', **source)
    names = file_names(images) or [f'image {index}' for index in range(len(images))]
    return NamedImages(images, unique_names([_printable(name) for name in names]))


def find_unreadable(
        images: NamedImages,
        readable: Iterable[int],
        tried: Optional[Iterable[int]] = None,
) -> List[Tuple[str, str]]:
    """Names of the images that cannot be read, each with the reason.

    Args:
        images: the images
        readable: indices of those that could be read
        tried: indices of those that should have been; default all
    """
    unreadable = sorted({*(range(len(images.names)) if tried is None else tried)} - {*readable})
    return [(images.names[index], why_unreadable(images.dataset, index)) for index in unreadable]


def write_unreadable(output: str, unreadable: Sequence[Tuple[str, str]]) -> str:
    """Write names and reasons to `<output>.unreadable.txt`, or delete that file where there are none.

    Returns:
        text for the log, empty where there are none
    """
    listed = Path(f'{output}.unreadable.txt')
    if not unreadable:
        listed.unlink(missing_ok=True)
        return ''
    with atomic_write(listed) as file:
        file.writelines(f'{name}\t{why}\n' for name, why in unreadable)
    return f', {len(unreadable)} unreadable, listed in {listed}'

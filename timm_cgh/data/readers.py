"""Readers of image folders, tars and webdataset shards, in timm's interface."""
import io
import logging
import os
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from PIL import Image
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError
from timm.utils.misc import natural_key

from timm_cgh.errors import reason, redact

from .decode import Decoding, decode_image, open_image

try:
    import webdataset as wds
except ImportError:  # the constructor of timm's reader raises
    wds = None

__all__ = ['FileReader', 'ShardReader', 'image_endings', 'list_tars']

_logger = logging.getLogger('data')
_FORMATS = {  # still images; Pillow reads videos, fonts and documents as well
    'AVIF', 'BMP', 'DIB', 'GIF', 'HEIF', 'JPEG', 'JPEG2000', 'MPO', 'PCX', 'PNG', 'PPM', 'QOI', 'SGI', 'TGA', 'TIFF',
    'WEBP'}
# what operating systems and file servers leave beside images; names with a leading dot are hidden everywhere
_SYSTEM = {'__macosx', '@eadir', '#recycle', '#snapshot', '@recycle', '$recycle.bin', 'system volume information',
           'lost+found'}
_MAX_WARNINGS = 5

Folders = Tuple[str, ...]  # below the root


class _File(NamedTuple):
    """An image file in a folder or a tar."""
    name: str  # path of the file, or within the tar that holds it
    target: int = -1
    tar: str = ''
    offset: int = 0
    size: int = 0


def image_endings() -> Set[str]:
    """Endings of image files, in lower case and with the dot."""
    return {ending for ending, name in Image.registered_extensions().items() if name in _FORMATS}


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name.lower() in _SYSTEM


def _walk(root: str, ignored: Counter) -> Iterator[Tuple[Folders, _File]]:
    """Files below a folder. Each real folder is visited once, links only once all else has been."""
    visited = set()
    folders: List[Tuple[Folders, str]] = [((), root)]
    links: List[Tuple[Folders, str]] = []
    while folders or links:
        if not folders:
            folders, links = sorted(links), []
        parts, folder = folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(folder))
        except OSError as error:
            ignored['unreadable folders'] += 1
            if ignored['unreadable folders'] <= _MAX_WARNINGS:
                _logger.warning(f'Folder skipped: {reason(error)}')
            continue
        for entry in entries:
            if _is_hidden(entry.name):
                ignored['hidden'] += 1
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(((*parts, entry.name), entry.path))
            elif entry.is_file() or entry.is_symlink():  # a broken link is an unreadable image
                yield parts, _File(entry.path)


def _walk_tar(
        path: str,
        ignored: Counter,
        file: BinaryIO,
        inner: Folders = (),
        start: int = 0,
) -> Iterator[Tuple[Folders, _File]]:
    """Files of a tar and of the tars in it, each of which is a folder."""
    with tarfile.open(fileobj=file, mode='r:') as tar:
        for member in tar:
            *folders, name = [part for part in member.name.split('/') if part not in ('', '.')] or ['']
            stem, ending = os.path.splitext(name)
            offset = start + member.offset_data
            if member.isfile() and any(map(_is_hidden, (*folders, name))):
                ignored['hidden'] += 1
            elif member.isfile() and ending.lower() == '.tar':
                inside = tar.extractfile(member)
                yield from _walk_tar(path, ignored, inside, (*inner, stem), offset)  # type: ignore[arg-type]
            elif member.isfile():
                yield (*inner, *folders), _File(member.name, -1, path, offset, member.size)


def _walk_tars(root: str, ignored: Counter) -> Iterator[Tuple[Folders, _File]]:
    """Files of a tar, or of the tars in a folder, each of which is a folder."""
    for path in [root] if os.path.isfile(root) else list_tars(root):
        with open(path, 'rb') as file:
            yield from _walk_tar(path, ignored, file, () if path == root else (Path(path).stem,))


def list_tars(folder: str) -> List[str]:
    """Paths of the tars in a folder: one per class, as ImageNet comes."""
    return sorted(
        entry.path for entry in os.scandir(folder)
        if entry.name.lower().endswith('.tar') and entry.is_file() and not _is_hidden(entry.name))


def _list_images(walk: Callable, root: str, endings: Set[str]) -> Tuple[List[Tuple[Folders, _File]], Counter]:
    """Files with one of these endings, and how many others there are of each kind."""
    found, ignored = [], Counter[str]()
    for folders, file in walk(root, ignored):
        ending = os.path.splitext(file.name)[1].lower()
        if ending in endings:
            found.append((folders, file))
        else:
            ignored[ending or 'without ending'] += 1
    return found, ignored


def _classify(paths: Sequence[Folders], class_to_idx: Optional[Dict[str, int]]) -> Tuple[List[str], Dict[str, int]]:
    """Class name of each image, empty where it has none, and numbers of the classes.

    The class is the folder that holds the image, as in timm; where folders of one name lie in several places
    (`cat/images`, `dog/images`), the first folder below the root, as in torchvision. Images in no folder have none.
    """
    if class_to_idx is not None:
        return [next((name for name in (*p[-1:], *p[:1]) if name in class_to_idx), '') for p in paths], class_to_idx
    twice = sorted(name for name, n in Counter(path[-1] for path in {*paths} if len(path) > 1).items() if n > 1)
    if twice:
        _logger.info(f'Folders {twice[0]} in several places: the classes are the first folders below the root')
    names = [path[0 if twice else -1] if path else '' for path in paths]
    return names, {name: number for number, name in enumerate(sorted({*names} - {''}, key=natural_key))}


class FileReader(Reader):
    """Reader of the images in a folder or an uncompressed tar, of class folders or none, in the natural order of names.

    A folder without images may hold such tars, one per class. An image in a tar is read at its offset, because opening
    the tar anew takes a fifth of the time that decoding takes. No index is cached beside the tar, as timm does above
    10 GB: it would outlive changes of the tar.

    Args:
        root: folder or tar
        class_map: class name -> number, or a file of them; images of other classes are left out
        input_key: endings of the images, separated by `;`; default those of still images that Pillow reads
        bands: whether images have other than 1 or 3 channels: NumPy files are images too

    Raises:
        RuntimeError: no image
    """

    def __init__(self, root: str, class_map: Any = '', input_key: Optional[str] = None, bands: bool = False):
        super().__init__()
        self.root = root
        endings = {*input_key.lower().split(';')} if input_key else {*image_endings(), *(('.npy',) if bands else ())}
        found, ignored = _list_images(_walk_tars if os.path.isfile(root) else _walk, root, endings)
        if not found and os.path.isdir(root) and list_tars(root):
            found, ignored = _list_images(_walk_tars, root, endings)
        names, self.class_to_idx = _classify(
            [folders for folders, _ in found], load_class_map(class_map, root) if class_map else None)
        self.samples = sorted(
            (file._replace(target=self.class_to_idx.get(name, -1))
             for name, (_, file) in zip(names, found) if name or not class_map),
            key=lambda file: (natural_key(file.name), file.tar))
        other = [folders for name, (folders, _) in zip(names, found) if class_map and not name]
        ignored['of other classes'] += len(other)
        self.other_classes = sorted({folders[-1] for folders in other if folders}, key=natural_key)
        self.targets = [file.target for file in self.samples]
        self._report(+ignored)

    def _report(self, ignored: Counter) -> None:
        if ignored:
            kinds = ', '.join(f'{count} {kind}' for kind, count in ignored.most_common(10))
            heif = ' (pip install pillow-heif reads .heic)' if '.heic' in ignored else ''
            _logger.info(f'{self.root}: {len(self)} images; ignored: {kinds}{heif}')
        if not self.samples:
            of_them = ' of the classes given' if ignored['of other classes'] else ''
            raise RuntimeError(f'Found 0 images{of_them} in {self.root}')

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[BinaryIO, int]:
        name, target, tar, offset, size = self.samples[index]
        if not tar:
            return open(name, 'rb'), target
        # No tar stays open: forked workers would share the position in it, and spawned ones cannot receive it.
        with open(tar, 'rb') as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        file = self.samples[index]
        if basename:
            return os.path.basename(file.name)
        path = os.path.join(file.tar, file.name)
        return path if absolute else os.path.relpath(path, self.root)


_PIXEL = b'P5 1 1 255\n\0'  # timm decodes an image with each label


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg = redact(str(record.msg))
    return True


logging.getLogger(ReaderWds.__module__).addFilter(_redact_record)  # it logs addresses


class ShardReader(ReaderWds):
    """timm's reader of webdataset shards, where samples may lack a label (`.cls`); their target is -1.

    timm silently skips samples without a label and broken images. Here the names of broken images are collected in
    `unreadable`, which the caller empties.

    Args:
        input_key: extensions of the images, separated by `;`; default those of `FileReader`
        decoding: of the images
        args, kwargs: those of timm's `ReaderWds`
    """

    def __init__(
            self, *args: Any, input_key: Optional[str] = None, decoding: Decoding = Decoding(), **kwargs: Any):
        endings = [*sorted(image_endings()), *(('.npy',) if decoding.mode.isdigit() else ())]
        # timm renames every decoded image to jpg
        super().__init__(*args, input_key=f"{input_key or ';'.join(endings).replace('.', '')};jpg", **kwargs)
        self.decoding = decoding
        self.unreadable: List[str] = []

    def _lazy_init(self) -> None:
        super()._lazy_init()
        *_, decode, _ = self.ds.pipeline  # ..., decode, rename
        self.ds.pipeline[-2] = wds.map(partial(self._decode_or_note, decode.args[0], set(self.input_key.split(';'))))

    def _decode_or_note(
            self, timm_decode: Callable, keys: Set[str], sample: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        try:
            labels = {key: value for key, value in sample.items() if key not in keys}
            decoded = timm_decode({'cls': b'-1', **labels, 'jpg': _PIXEL})
            if not decoded:
                return decoded
            file = io.BytesIO(wds.filters.getfirst(sample, self.input_key))
            return {**decoded, 'jpg': decode_image(open_image(file, self.decoding), self.decoding)}
        except (TypeError, WdsTargetKeyError):
            raise  # not the image is at fault but the settings
        except Exception as error:
            name = f"{sample['__url__']}/{sample['__key__']}"
            self.unreadable.append(redact(f'{name} ({reason(error, 100)})'))
            return None

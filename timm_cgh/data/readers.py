"""timm's readers of image folders, tars and webdataset shards, adapted to training on unlabelled images."""
import contextlib
import io
import os
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Tuple

from timm.data import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError

from timm_cgh.errors import reason

try:
    import webdataset as wds
except ImportError:  # the constructor of timm's reader raises
    wds = None

__all__ = ['ShardReader', 'TarReader', 'more_extensions']


@contextlib.contextmanager
def more_extensions() -> Iterator[None]:
    """Let timm's folder and tar readers find more than PNG and JPEG files, within the block."""
    before = get_img_extensions()
    set_img_extensions(sorted({*before, '.webp', '.bmp', '.tif', '.tiff', '.avif'}))
    try:
        yield
    finally:
        set_img_extensions(before)


class TarReader(ReaderImageInTar):
    """timm's reader of uncompressed tars, which keeps no file open between reads.

    Forked workers would share the position in an open tar, and spawned workers cannot receive one. An image is read at
    its offset, because opening the tar anew takes a fifth of the time that decoding takes. No index is cached beside
    the tar either: timm does that above 10 GB, and still trusts the index after the tar has changed.

    Args:
        args, kwargs: those of timm's `ReaderImageInTar`
    """

    def __init__(self, *args: Any, **kwargs: Any):
        with more_extensions():
            super().__init__(*args, cache_tarinfo=False, **kwargs)

    def __getitem__(self, index: int) -> Tuple[BinaryIO, Any]:
        image, parent, child = self.samples[index]
        start = image.offset_data + (child.offset_data if child is not None else 0)  # child: a tar in the tar
        with open(os.path.join(self.root, parent) if parent else self.root, 'rb') as file:
            file.seek(start)
            return io.BytesIO(file.read(image.size)), self.targets[index]


_INPUT_KEYS = 'jpg;jpeg;png;webp;bmp;tif;tiff'  # timm's default misses .jpeg files


class ShardReader(ReaderWds):
    """timm's reader of webdataset shards, where samples may lack a label (`.cls`); their target is -1.

    timm silently skips samples without a label and broken images. Here the names of broken images are collected in
    `unreadable`, which the caller empties.

    Args:
        input_key: extensions of the images, separated by `;`
        args, kwargs: those of timm's `ReaderWds`
    """

    def __init__(self, *args: Any, input_key: Optional[str] = None, **kwargs: Any):
        # timm renames every decoded image to jpg
        super().__init__(*args, input_key=f'{input_key};jpg' if input_key else _INPUT_KEYS, **kwargs)
        self.unreadable: List[str] = []

    def _lazy_init(self) -> None:
        super()._lazy_init()
        *_, decode, _ = self.ds.pipeline  # ..., decode, rename
        timm_decode = decode.args[0]

        def decode_or_note(sample: Dict[str, Any]) -> Optional[Dict[str, Any]]:
            try:
                return timm_decode({'cls': b'-1', **sample})
            except (TypeError, WdsTargetKeyError):
                raise  # not the image is at fault but the settings
            except Exception as error:
                name = f"{sample['__url__']}/{sample['__key__']}"
                self.unreadable.append(f'{name} ({reason(error, 100)})')
                return None

        self.ds.pipeline[-2] = wds.map(decode_or_note)

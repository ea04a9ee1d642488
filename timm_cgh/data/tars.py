"""Images in a tar, read from where they lie in it."""
import io
import os
from typing import Any, BinaryIO, Tuple

from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from .decode import more_extensions

__all__ = ['TarReader']


class TarReader(ReaderImageInTar):
    """timm's reader of uncompressed tars, which keeps no file open and opens none as a tar.

    A tar kept open would be shared by forked workers, which then move each other's place in it, and cannot be sent to
    spawned ones; to open it as a tar takes as long as a fifth of the decoding of an image.

    Nor is an index written beside the tar, which timm does above 10 GB and then trusts whatever becomes of the tar.

    Args:
        all: see timm's `ReaderImageInTar`
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

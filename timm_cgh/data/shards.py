"""webdataset shards, labelled or not; what cannot be read is named."""
from typing import Any, Dict, List, Optional

from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError

try:
    import webdataset as wds
except ImportError:  # the reader's constructor says so
    wds = None

__all__ = ['ShardReader']

_INPUT_KEYS = 'jpg;jpeg;png;webp;bmp;tif;tiff'  # timm's own list would find nothing in shards of .jpeg files


class ShardReader(ReaderWds):
    """timm's reader of webdataset shards, which needs no `.cls` files (the target is -1 then).

    timm's own passes over samples without a label and over broken images alike, and names neither. Here `unreadable`
    gathers the names of broken images, and is the caller's to empty.

    Args:
        input_key: extensions of the images, separated by `;`
        others: see timm's `ReaderWds`
    """

    def __init__(self, *args: Any, input_key: Optional[str] = None, **kwargs: Any):
        # timm hands a decoded image on as jpg, whatever it was
        super().__init__(*args, input_key=f'{input_key};jpg' if input_key else _INPUT_KEYS, **kwargs)
        self.unreadable: List[str] = []

    def _lazy_init(self) -> None:
        super()._lazy_init()
        *_, decode, _ = self.ds.pipeline  # ..., decode, rename
        timm_decode = decode.args[0]

        def decode_or_name(sample: Dict[str, Any]) -> Optional[Dict[str, Any]]:
            try:
                return timm_decode({'cls': b'-1', **sample})
            except (TypeError, WdsTargetKeyError):
                raise  # the settings are wrong, not the image
            except Exception as error:
                name = f"{sample['__url__']}/{sample['__key__']}"
                self.unreadable.append(f"{name} ({' '.join(str(error).split())[:100]})")
                return None

        self.ds.pipeline[-2] = wds.map(decode_or_name)

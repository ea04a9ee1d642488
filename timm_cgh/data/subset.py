"""Chosen images of a data set."""
from typing import List, Tuple

from PIL import Image
from torch.utils.data import Subset

from .decode import read_image

__all__ = ['ImageSubset']


class ImageSubset(Subset):
    """Chosen images of a map-style data set, as (PIL image, label) items, decoded as the data set says.

    An unreadable image raises one of `timm_cgh.data.decode.UNREADABLE`, where timm would give another image.
    """

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        return read_image(self, index)

    def __getitems__(self, indices: List[int]) -> List[Tuple[Image.Image, int]]:
        return [self[index] for index in indices]

"""Chosen images of a data set."""
from typing import List, Sequence, Tuple

from PIL import Image
from torch.utils.data import Dataset, Subset

from .decode import read_image

__all__ = ['ImageSubset']


class ImageSubset(Subset):
    """Chosen images of a data set, as (PIL image, label) items of one mode.

    An unreadable image raises one of `timm_cgh.data.decode.UNREADABLE`, where timm would give another image.

    Args:
        dataset: map-style
        indices: of the images
        mode: of the images, see `image_mode`
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], mode: str = 'RGB'):
        super().__init__(dataset, [int(i) for i in indices])
        self.mode = mode

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        return read_image(self, index, self.mode)

    def __getitems__(self, indices: List[int]) -> List[Tuple[Image.Image, int]]:
        return [self[index] for index in indices]

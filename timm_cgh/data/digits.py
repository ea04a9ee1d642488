"""UCI's handwritten digits, a small data set that comes with the package."""
from pathlib import Path
from typing import ClassVar, List, Tuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .decode import Decoding

__all__ = ['Digits']

_FILE = Path(__file__).with_name('digits.npz')
_SPLIT_SEED = 0
_TEST_SHARE = 5  # every fifth image of a class, in a shuffled order


class Digits(Dataset):
    """1,797 real handwritten digits, 8 x 8 px, 17 grey levels, 10 classes.

    Items are (PIL image, label). A fixed fifth of each class is the validation split.

    The images are the test set of Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, 1998, UCI
    Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), in the order of scikit-learn's
    `load_digits`.

    Args:
        split: `train` or `validation`
        mode: PIL mode of the images, `L` or `RGB`

    Raises:
        ValueError: another split
    """

    classes: ClassVar[List[str]] = [str(i) for i in range(10)]

    def __init__(self, split: str = 'train', mode: str = 'L'):
        if split not in ('train', 'validation'):
            raise ValueError(f'digits has the splits train and validation, not {split}')
        with np.load(_FILE) as data:
            images, labels = data['images'], data['labels']  # (1797, 8, 8) of 0 to 16, (1797,)
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
        validation = np.concatenate([order[labels[order] == digit][::_TEST_SHARE] for digit in range(10)])
        chosen = np.isin(np.arange(len(labels)), validation) == (split == 'validation')
        self.decoding = Decoding(mode)
        self.images = np.round(images[chosen].astype(float) * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        self.targets = labels[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert(self.decoding.mode), self.targets[index]

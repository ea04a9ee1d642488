"""scikit-learn's handwritten digits, a small data set that needs no download."""
from typing import ClassVar, List, Tuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from timm_cgh.errors import InputError

from .decode import Decoding

__all__ = ['Digits']

_SPLIT_SEED = 0
_TEST_SHARE = 5  # every fifth image of a class, in a shuffled order


class Digits(Dataset):
    """1,797 real handwritten digits, 8 x 8 px, 17 grey levels, 10 classes (UCI, through scikit-learn).

    Items are (PIL image, label). A fixed fifth of each class is the validation split.

    Args:
        split: `train` or `validation`
        mode: PIL mode of the images, `L` or `RGB`

    Raises:
        ValueError: another split
        InputError: scikit-learn is not installed
    """

    classes: ClassVar[List[str]] = [str(i) for i in range(10)]

    def __init__(self, split: str = 'train', mode: str = 'L'):
        if split not in ('train', 'validation'):
            raise ValueError(f'digits has the splits train and validation, not {split}')
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError('dataset=digits: needs scikit-learn (pip install scikit-learn)') from error
        data = load_digits()
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(data.target))
        chosen: List[int] = []
        for digit in range(10):
            members = order[data.target[order] == digit]
            test = np.arange(len(members)) % _TEST_SHARE == 0
            chosen.extend(members[test if split == 'validation' else ~test].tolist())
        chosen.sort()
        self.decoding = Decoding(mode)
        self.images = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        self.targets = data.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert(self.decoding.mode), self.targets[index]

"""Fine-tuning with few labels: which images are labelled, and the two learning rates (Sec. 4.3)."""
import os
from collections import defaultdict
from itertools import zip_longest
from typing import Any, DefaultDict, Dict, List, Sequence

import numpy as np
import torch.nn as nn
from torch.utils.data import Dataset

from timm_cgh.data.labels import file_names
from timm_cgh.errors import InputError, checking

from .classifier import classifier_layers

__all__ = ['balanced_subset', 'listed_subset', 'param_groups']


def balanced_subset(labels: Sequence[int], share: float, seed: int = 42) -> np.ndarray:
    """A share of the images with equally many of every class, as far as there are so many.

    The choice is a function of labels, share and seed, and a smaller share is part of a larger one.

    Args:
        labels: (M,) classes, below 0 where unknown
        share: of the labelled images, 0 to 1
        seed: of the choice

    Returns:
        (n,) int64 indices, ascending; n is share * M rounded, at least one of each class

    Raises:
        ValueError: share outside (0, 1], no labelled image
    """
    values = np.asarray(labels)
    classes = np.unique(values[values >= 0])
    if not 0 < share <= 1:
        raise ValueError(f'share must be above 0 and at most 1, got {share}')
    if not len(classes):
        raise ValueError('no labelled image')
    members = [
        np.random.default_rng((seed, 11, int(c))).permutation(np.flatnonzero(values == c)) for c in classes]
    # deal out the images in rounds, one of each class in a random order of the classes, while it has any
    turns = [members[c] for c in np.random.default_rng((seed, 11)).permutation(len(classes))]
    dealt = [image for dealing in zip_longest(*turns) for image in dealing if image is not None]
    return np.sort(dealt[:max(round(share * len(dealt)), len(classes))])


def listed_subset(dataset: Dataset, label_list: str) -> np.ndarray:
    """The images that a list names, one file name per line (the format of SimCLR's `1percent.txt`).

    A line is the name of the file, with or without folders before it; blank lines and `#` comments are skipped.

    Args:
        dataset: map-style, whose images are files
        label_list: text file

    Returns:
        (n,) int64 indices, ascending, each once

    Raises:
        InputError: the list cannot be read or is empty, names missing images or a name that several images have; or the
            data set's images have no names
    """
    at_fault = f'label_list={label_list}'
    with checking('label_list', label_list, OSError, UnicodeDecodeError), open(label_list, encoding='utf-8') as file:
        lines = [line.strip() for line in file]
    listed = [line.replace(os.sep, '/') for line in lines if line and not line.startswith('#')]
    if not listed:
        raise InputError(f'{at_fault}: names no image')
    names = file_names(dataset)
    if names is None:
        raise InputError(f'{at_fault}: the images of this data set have no file names; use `percent`')
    indices: DefaultDict[str, List[int]] = defaultdict(list)
    for index, name in enumerate(names):
        indices[os.path.basename(name)].append(index)
    found = {
        line: [i for i in indices[os.path.basename(line)] if f'/{names[i]}'.endswith(f'/{line}')] for line in listed}
    missing = [line for line in listed if not found[line]]
    if missing:
        raise InputError(
            f'{at_fault}: {len(missing)} of {len(listed)} names are not among the training images, first: {missing[0]}')
    several = next((line for line in listed if len(found[line]) > 1), None)
    if several:
        raise InputError(f'{at_fault}: {several} is the name of {len(found[several])} images; write CLASS/{several}')
    return np.unique([found[line][0] for line in listed])


def param_groups(model: nn.Module, lr: float, lr_head: float) -> List[Dict[str, Any]]:
    """Parameter groups of a timm classifier: the backbone's with the rate `lr`, the classifier's with `lr_head`."""
    head = {id(p): p for layer in classifier_layers(model) for p in layer.parameters()}
    body = [p for p in model.parameters() if id(p) not in head]
    return [dict(params=body, lr=lr), dict(params=list(head.values()), lr=lr_head)]

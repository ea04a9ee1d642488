"""Fine-tuning with few labels: which images are labelled, and the two learning rates (Sec. 4.3)."""
import os
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import Dataset, Subset

from timm_cgh.errors import InputError

__all__ = ['Logits', 'balanced_subset', 'listed_subset', 'param_groups']


def balanced_subset(labels: Sequence[int], share: float, seed: int = 42) -> np.ndarray:
    """A fixed share of the images with equally many of every class, as far as its images go.

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
    labels = np.asarray(labels)
    classes = np.unique(labels[labels >= 0])
    if not 0 < share <= 1:
        raise ValueError(f'share must be above 0 and at most 1, got {share}')
    if not len(classes):
        raise ValueError('no labelled image')
    members = [
        np.random.default_rng((seed, 11, int(c))).permutation(np.flatnonzero(labels == c)) for c in classes]
    sizes = np.array([len(m) for m in members])
    left = max(round(share * int(sizes.sum())), len(classes))
    counts = np.zeros(len(classes), dtype=np.int64)
    turn = np.random.default_rng((seed, 11)).permutation(len(classes))  # who gets one more where they cannot be equal
    while left:
        open_classes = turn[(counts < sizes)[turn]]  # small classes are exhausted first
        each = left // len(open_classes)
        if not each:
            counts[open_classes[:left]] += 1
            break
        given = np.minimum(each, (sizes - counts)[open_classes])
        counts[open_classes] += given
        left -= int(given.sum())
    return np.sort(np.concatenate([m[:n] for m, n in zip(members, counts)]))


def _file_names(dataset: Dataset) -> List[str]:
    """Paths of the images below the data set's root; raises where the source knows no names."""
    if isinstance(dataset, Subset):
        names = _file_names(dataset.dataset)
        return [names[i] for i in dataset.indices]
    if hasattr(dataset, 'filenames'):  # timm's readers
        return [str(name).replace(os.sep, '/') for name in dataset.filenames()]
    return [os.path.relpath(path, dataset.root).replace(os.sep, '/') for path, _ in dataset.samples]  # torchvision's


def listed_subset(dataset: Dataset, path: str) -> np.ndarray:
    """The images that a list names, one file name per line (the format of SimCLR's `1percent.txt`).

    A line is the name of the file, with or without folders before it; blank lines and `#` comments are passed over.

    Args:
        dataset: map-style, whose images are files
        path: of the list

    Returns:
        (n,) int64 indices, ascending, each once

    Raises:
        InputError: the list cannot be read or is empty, names images that are not there or that are several; or the
            data set's images have no names
    """
    try:
        with open(path, encoding='utf-8') as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise InputError(f'--label-list {path}: {reason}') from error
    wanted = [line.replace(os.sep, '/') for line in lines if line and not line.startswith('#')]
    if not wanted:
        raise InputError(f'--label-list {path}: names no image')
    try:
        names = _file_names(dataset)
    except Exception as error:  # readers without names fail in their own ways
        raise InputError(
            f'--label-list {path}: the images of this data set have no file names; use --percent') from error
    depths = {line.count('/') for line in wanted}
    places: Dict[str, List[int]] = {}
    for index, name in enumerate(names):
        parts = name.split('/')
        for depth in depths:
            if depth < len(parts):
                places.setdefault('/'.join(parts[len(parts) - 1 - depth:]), []).append(index)
    missing = [line for line in wanted if line not in places]
    if missing:
        raise InputError(
            f'--label-list {path}: {len(missing)} of {len(wanted)} names are not among the training images, first: '
            f'{missing[0]}')
    several = next((line for line in wanted if len(places[line]) > 1), None)
    if several:
        raise InputError(
            f'--label-list {path}: {several} is the name of {len(places[several])} images; write CLASS/{several}')
    return np.unique([places[line][0] for line in wanted])


def param_groups(model: nn.Module, lr: float, lr_head: float) -> List[Dict[str, Any]]:
    """Backbone and classifier of a timm model, each at its own rate.

    Args:
        model: timm model with a classifier
        lr, lr_head: of the backbone and of the classifier
    """
    layers = model.get_classifier()
    layers = layers if isinstance(layers, (tuple, list, nn.ModuleList)) else [layers]
    head = {id(p): p for layer in layers for p in layer.parameters()}
    body = [p for p in model.parameters() if id(p) not in head]
    return [dict(params=body, lr=lr), dict(params=list(head.values()), lr=lr_head)]


class Logits(nn.Module):
    """A classifier as something that features can be taken from: its logits.

    Args:
        model: timm model with a classifier
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)

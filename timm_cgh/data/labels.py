"""What is known of the images of a data set without reading them: labels, classes, file names."""
import hashlib
import os
from typing import Any, Dict, Iterable, List, Optional

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import INaturalist

from timm_cgh.errors import InputError

__all__ = ['check_class_numbers', 'class_to_idx', 'file_names', 'fingerprint', 'read_labels', 'to_label', 'whole']


def to_label(target: Any) -> int:
    """Class of an item; -1 where it has none or several."""
    try:
        return int(target)
    except (TypeError, ValueError):
        return -1


def read_labels(dataset: Dataset) -> Optional[np.ndarray]:
    """Read the (N,) int64 labels of a map-style data set, -1 where unknown, without decoding images.

    Returns:
        None for a data set without labels
    """
    if isinstance(dataset, Subset):
        all_labels = read_labels(dataset.dataset)
        return None if all_labels is None else all_labels[np.asarray(dataset.indices, dtype=np.int64)]
    source: Any = getattr(dataset, 'reader', dataset)
    labels: Any = getattr(source, 'targets', getattr(source, 'labels', None))  # folder, tar, torchvision, digits
    if isinstance(dataset, INaturalist):
        labels = [target for target, _ in dataset.index]
    elif hasattr(source, 'iter_targets'):  # hfds
        targets = source.iter_targets()
        if not source.remap_class and not source.target_keys and source.label_key in source.dataset.column_names:
            # a hundred times faster than row by row
            column = source.dataset.select_columns([source.label_key]).with_format('arrow')[:]
            targets = column.column(0).to_pylist()
        labels = [to_label(label) for label in targets]
    if labels is None:
        return None
    labels = np.asarray(labels, dtype=np.int64)
    return labels if labels.ndim == 1 else labels[:, 0]  # QMNIST: the class comes first


def whole(dataset: Dataset) -> Dataset:
    """The data set behind any `Subset`."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def class_to_idx(dataset: Dataset) -> Dict[str, int]:
    """Class name -> label; empty where the data set has no class names."""
    dataset = whole(dataset)
    reader = getattr(dataset, 'reader', dataset)
    mapping = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    return mapping if isinstance(mapping, dict) else {}


def check_class_numbers(train: Dataset, val: Dataset) -> None:
    """Raise an `InputError` where a class of the validation images has another number among the training images."""
    numbers = class_to_idx(train)
    moved = [name for name, number in class_to_idx(val).items() if numbers.get(name, number) != number]
    if moved:
        raise InputError(f'val_split: class {moved[0]} has another number there than in training, give `class_map`')


def file_names(dataset: Dataset) -> Optional[List[str]]:
    """Paths of the images below the data set's root, with `/`; None where the source has no names."""
    if isinstance(dataset, Subset):
        names = file_names(dataset.dataset)
        return names and [names[i] for i in dataset.indices]
    reader: Any = getattr(dataset, 'reader', None)
    try:
        if hasattr(reader, 'image_key') and getattr(reader.dataset, '_indices', None) is None:
            # hfds: row by row, timm would read every image as well
            chunks = reader.dataset.data.column(reader.image_key).chunks
            found = [name for chunk in chunks for name in chunk.field('path').to_pylist()]
        elif hasattr(dataset, 'samples'):  # torchvision's
            found = [os.path.relpath(path, dataset.root) for path, _ in dataset.samples]
        else:
            found = dataset.filenames()
    except (AssertionError, AttributeError, KeyError, TypeError):  # digits, Hub data sets without paths, ...
        return None
    return None if None in found else [str(name).replace(os.sep, '/') for name in found]


def _digest(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f'{item}\n'.encode())
    return digest.hexdigest()[:16]


def fingerprint(dataset: Dataset) -> str:
    """Digest of the file names and their order; where a data set has none, of its labels and their number.

    No image is read. Of a `Subset`, the whole data set and the indices count. Streams have no order: ''.
    """
    if isinstance(dataset, IterableDataset):
        return ''
    if isinstance(dataset, Subset):
        return _digest((fingerprint(dataset.dataset), *dataset.indices))
    source: Any = getattr(dataset, 'reader', dataset)
    samples = getattr(source, 'samples', None)
    if samples is not None:  # ours and torchvision's: the path comes first
        return _digest(str(sample[0]).removeprefix(str(source.root)) for sample in samples)
    labels = read_labels(dataset)
    return _digest((len(dataset), *(() if labels is None else labels)))

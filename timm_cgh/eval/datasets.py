"""Labelled training and validation images of an evaluation."""
from contextlib import suppress
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
from torch.utils.data import Dataset

from timm_cgh.data import ImageSubset, class_to_idx, is_stream, open_dataset, read_labels
from timm_cgh.data.labels import check_class_numbers, whole
from timm_cgh.data.sources import check_disjoint, find_split_folder, splits_overlap
from timm_cgh.errors import InputError

__all__ = [
    'LabelledDatasets', 'check_classes', 'class_names', 'hold_out', 'open_labelled', 'open_labelled_datasets']


class LabelledDatasets(NamedTuple):
    """Map-style data sets of labelled (PIL image, label) items; `val_split` says where those of `val` are from."""
    train: Dataset
    val: Dataset
    num_classes: int
    class_names: Optional[List[str]]
    val_split: str


def class_names(dataset: Dataset, num_classes: int) -> Optional[List[str]]:
    """Names of the classes in the order of their labels, where the data set knows them all."""
    numbers, dataset = class_to_idx(dataset), whole(dataset)
    names = sorted(numbers, key=numbers.__getitem__) or getattr(getattr(dataset, 'reader', dataset), 'classes', None)
    return [str(name) for name in names] if names and len(names) == num_classes else None


def open_labelled(
        dataset: str,
        data_dir: Optional[str],
        split: str,
        *,
        split_parameter: str = 'train_split',
        **source: Any,
) -> Dataset:
    """A split of a data set, its labelled images only: (PIL image, label) items. Parameters: see `open_dataset`.

    Raises:
        InputError: no such split, a stream, no labels
    """
    if not dataset and data_dir and find_split_folder(data_dir, split) is None \
            and any(find_split_folder(data_dir, name) for name in ('train', 'validation', 'test')):
        # open_dataset would take all of data_dir for the training images
        raise InputError(f'{split_parameter}={split}: no such folder in {data_dir}')
    images = open_dataset(dataset, data_dir, split, split_parameter=split_parameter, **source)
    if is_stream(images):
        raise InputError(
            f'dataset={dataset}: a stream, whose images cannot be counted; use a folder, torch/ or hfds/')
    labels = read_labels(images)
    if labels is None or not (labels >= 0).any():
        raise InputError(
            f"{split_parameter}={split}: has no labels{'' if dataset else ', put the images in class folders'}")
    if (labels >= 0).all():
        return images
    return ImageSubset(images, np.flatnonzero(labels >= 0).tolist())


def check_classes(train: Dataset, val: Dataset, ignore_others: bool = False) -> int:
    """Check that all validation images are of classes of the training images, and count those classes.

    Args:
        train, val: labelled images
        ignore_others: allow that `val` was opened without the images of other classes

    Raises:
        InputError: fewer than two classes, validation images of other classes, or class numbers that differ
    """
    train_labels, val_labels = (np.asarray(read_labels(images)) for images in (train, val))
    classes = np.unique(train_labels)
    if len(classes) < 2:
        raise InputError('data_dir: the training images are all of one class, put them in class folders')
    train_names = class_to_idx(train)
    unknown = sorted(str(name) for name in set(class_to_idx(val)) - set(train_names)) if train_names else []
    unknown = unknown or [str(label) for label in np.setdiff1d(val_labels, classes)]
    if not ignore_others:
        unknown = unknown or getattr(getattr(whole(val), 'reader', None), 'other_classes', [])
    if unknown:
        raise InputError(
            f"val_split: {len(unknown)} classes without training images ({', '.join(unknown[:5])})")
    check_class_numbers(train, val)
    return int(classes[-1]) + 1


def hold_out(labels: np.ndarray, seed: int = 42) -> np.ndarray:
    """(n,) ascending indices of a fifth of the images of each class, at least one of each class of two."""
    parts = []
    for label in np.unique(labels):
        members = np.random.default_rng((seed, 13, int(label))).permutation(np.flatnonzero(labels == label))
        parts.append(members[:max(len(members) // 5, len(members) > 1)])
    return np.sort(np.concatenate(parts))


def _open_validation(
        train: Dataset,
        train_split: str,
        val_split: Optional[str],
        seed: int,
        source: Dict[str, Any],
) -> Tuple[Dataset, Dataset, str]:
    """Training and validation images and the name of the latter: a split's, or held out from the training images."""
    where = source['dataset'], source['data_dir']
    if val_split:
        check_disjoint(train, train_split, val_split, *where)
    free = not splits_overlap(train, train_split, 'validation', *where)
    if val_split or (free and not source['dataset'] and find_split_folder(source['data_dir'], 'validation')):
        split = val_split or 'validation'
        return train, open_labelled(split=split, split_parameter='val_split', **source), split
    if source['dataset'] and free:
        with suppress(InputError):
            return train, open_labelled(split='validation', split_parameter='val_split', **source), 'validation'
    labels = np.asarray(read_labels(train))
    held_out = hold_out(labels, seed)
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    return ImageSubset(train, kept.tolist()), ImageSubset(train, held_out.tolist()), 'a fifth of the training images'


def open_labelled_datasets(
        data_config: Mapping[str, Any],
        train_split: str = 'train',
        val_split: Optional[str] = 'validation',
        *,
        dataset: str = '',
        data_dir: Optional[str] = None,
        class_map: str = '',
        seed: int = 42,
        **source: Any,
) -> LabelledDatasets:
    """Open the training and the validation images and check that their classes are the same.

    Args:
        data_config: of the backbone; its `input_size` says whether it takes colour or grey images
        train_split, val_split: names of the splits; `val_split` None for `validation`, or where there is none a fifth
            of the training images, which is held out
        seed: of the choice of that fifth
        dataset, data_dir, class_map, source: see `timm_cgh.data.open_dataset`

    Raises:
        InputError: see `open_labelled` and `check_classes`
    """
    source.update(dataset=dataset, data_dir=data_dir, class_map=class_map, in_chans=data_config['input_size'][0])
    train = open_labelled(split=train_split, **source)
    if not dataset and not class_map:  # a class may lack validation images, and must have its number all the same
        source['class_map'] = class_to_idx(train)
    train, val, val_split = _open_validation(train, train_split, val_split, seed, source)
    num_classes = check_classes(train, val, ignore_others=bool(class_map))
    return LabelledDatasets(train, val, num_classes, class_names(train, num_classes), val_split)

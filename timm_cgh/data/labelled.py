"""Which labelled images kNN compares while training goes on."""
import os
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import INaturalist

from timm_cgh.errors import InputError

from .decode import read_or_another, to_label
from .sources import find_split_folder, image_mode, open_dataset, prefix_of

__all__ = ['ImageSubset', 'class_numbers', 'labels_of', 'open_eval_datasets']

_EVAL_SPLITS = ('validation', 'val', 'test')
_STREAMS = ('hfids', 'wds', 'tfds')


def labels_of(dataset: Dataset) -> Optional[np.ndarray]:
    """(N,) int64 labels of a map-style data set, -1 unknown, without decoding an image; None where there are none."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    reader = getattr(dataset, 'reader', None)
    if isinstance(dataset, INaturalist):
        return np.array([target for target, _ in dataset.index], dtype=np.int64)
    if reader is None:  # torchvision, digits
        labels = next((v for v in (getattr(dataset, k, None) for k in ('targets', 'labels')) if v is not None), None)
        if labels is None:
            return None
        labels = np.asarray(labels)
        return (labels if labels.ndim == 1 else labels[:, 0]).astype(np.int64)  # QMNIST: the class comes first
    if hasattr(reader, 'targets'):  # tar
        return np.asarray(reader.targets, dtype=np.int64)
    if hasattr(reader, 'samples'):  # folder
        return np.array([target for _, target in reader.samples], dtype=np.int64)
    if not hasattr(reader, 'iter_targets'):
        return None
    if not reader.remap_class and not reader.target_keys and reader.label_key in reader.dataset.column_names:
        # 100 times faster than by rows
        column = reader.dataset.select_columns([reader.label_key]).with_format('arrow')[:]
        return np.array([to_label(label) for label in column.column(0).to_pylist()], dtype=np.int64)
    return np.array([to_label(label) for label in reader.iter_targets()], dtype=np.int64)


def class_numbers(dataset: Dataset) -> Dict[str, int]:
    """Name -> label, where a data set knows its classes by name."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    reader = getattr(dataset, 'reader', dataset)
    numbers = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    return numbers if isinstance(numbers, dict) else {}


class ImageSubset(Subset):
    """Chosen images of a data set, as (PIL image, label) items of one mode; an unreadable one is replaced by another.

    Args:
        dataset: map-style
        indices: the images
        mode: `L` or `RGB`
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], mode: str = 'RGB'):
        super().__init__(dataset, [int(i) for i in indices])
        self.mode = mode

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        image, label, _ = read_or_another(self, index, self.mode)
        return image, label

    def __getitems__(self, indices: List[int]) -> List[Tuple[Image.Image, int]]:
        return [self[index] for index in indices]


class _First(IterableDataset):
    """The first images of a stream."""

    def __init__(self, stream: IterableDataset, count: int):
        self.stream = stream
        self.count = count

    def set_loader_cfg(self, **kwargs: Any) -> None:
        if hasattr(self.stream, 'set_loader_cfg'):
            self.stream.set_loader_cfg(**kwargs)

    def __iter__(self) -> Iterator[Tuple[Image.Image, int]]:
        info = torch.utils.data.get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        for _, (image, target, *_) in zip(range(self.count // workers + (worker < self.count % workers)), self.stream):
            yield image, to_label(target)


def _within(path: str, folder: str) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath((path, folder)) == folder


def _has_split(name: str, root: Optional[str], train: Dataset, train_split: str, split: str) -> bool:
    """Whether a source has a split of that name with other images than those trained on."""
    prefix = prefix_of(name)
    if name == 'digits':
        return (train_split, split) == ('train', 'validation')
    if prefix == 'hfds':
        trained = {part.partition('[')[0].strip() for part in train_split.split('+')}
        return split in (train.reader.dataset.info.splits or {}) and split not in trained
    if hasattr(train, 'reader') or name.lower() in ('torch/image_folder', 'torch/folder'):
        folder = find_split_folder(root, split) if os.path.isdir(root) else None
        used = train.reader.root if hasattr(train, 'reader') else train.root
        return folder is not None and not _within(folder, used) and not _within(used, folder)
    return split == 'validation' and not any(part in train_split for part in ('val', 'eval', 'test'))


def open_eval_datasets(
        name: Optional[str],
        root: Optional[str],
        train_split: Optional[str],
        val_split: Optional[str],
        *,
        max_images: Optional[int],
        seed: int,
        train: Optional[Dataset] = None,
        **source: Any,
) -> Tuple[Optional[Tuple[Dataset, Dataset]], str]:
    """Labelled images to search and to classify by kNN.

    The split that the user names; else `validation`, `val` or `test`, where the source has it apart from the images
    trained on; else a fixed fifth of the labelled training images against the rest.

    Args:
        name, root, source: see `open_dataset`
        train_split, val_split: names, `val_split` None where the user named none
        max_images: at most so many on either side, chosen by `seed`; of streams the first ones
        seed: of the choice
        train: the training split where it is open already (map-style), so that a large folder is searched once

    Returns:
        (reference, query) of (PIL image, label) items, or None where there are no labels; a line saying what was done

    Raises:
        InputError: the split that the user named cannot be used
    """
    name, train_split = name or '', train_split or 'train'
    if val_split == train_split:
        raise InputError(f'--val-split {val_split}: is the training split, where each image would find itself')
    if prefix_of(name) in _STREAMS:
        if not val_split:
            return None, 'none: a stream, whose labels are not known (--val-split names a labelled split)'
        if max_images is not None and not source.get('num_samples'):
            source['num_samples'] = max_images  # some readers insist on a number
        sets = tuple(
            open_dataset(name, root, split, seed=seed, split_flag=flag, **source)
            for split, flag in ((train_split, '--train-split'), (val_split, '--val-split')))
        if max_images is not None:
            sets = tuple(_First(stream, max_images) for stream in sets)
        return sets, f'images of {val_split} against those of {train_split}, the first of either'

    if train is None:
        train = open_dataset(name, root, train_split, seed=seed, **source)
    mode = image_mode(source.get('in_chans', 3))

    def choose(dataset: Dataset, indices: np.ndarray) -> ImageSubset:
        order = np.random.default_rng(seed).permutation(len(indices))[:max_images]
        return ImageSubset(dataset, np.sort(indices[order]), mode)

    labels = labels_of(train)
    classes, counts = np.unique([] if labels is None else labels[labels >= 0], return_counts=True)
    if (counts > 1).sum() < 2:
        why = 'are of one class, if any' if len(classes) < 2 else 'hardly share a class'
        return None, f'none: the training images {why}'
    labelled = np.flatnonzero(labels >= 0)
    if not name:  # the same class must have the same number in both folders
        source['class_map'] = class_numbers(train)
    for split in (val_split,) if val_split else _EVAL_SPLITS:
        apart = _has_split(name, root, train, train_split, split)
        if not val_split:
            if not apart:
                continue
            source['download'] = False
        elif not apart and not name and os.path.isdir(root) and find_split_folder(root, split):
            raise InputError(
                f'--val-split {split}: lies among the training images; give them a folder of their own, train')
        try:
            query = open_dataset(name, root, split, seed=seed, split_flag='--val-split', **source)
        except InputError:
            if val_split:
                raise
            continue
        numbers = class_numbers(train)
        moved = [str(name) for name, number in class_numbers(query).items() if numbers.get(name, number) != number]
        if moved and val_split:
            raise InputError(f'--val-split {val_split}: {moved[0]} is another number there than in training')
        if moved:
            continue
        query_labels = labels_of(query)
        known = np.flatnonzero(np.isin([] if query_labels is None else query_labels, classes))
        if len(known):
            sets = choose(train, labelled), choose(query, known)
            return sets, f'{len(sets[1])} images of {split} against {len(sets[0])} of {train_split}'
        if val_split:
            raise InputError(f'--val-split {split}: has no image of a class that the training images have')
    order = np.random.default_rng((seed, 5)).permutation(labelled)
    fifth = max(1, len(order) // 5)
    sets = choose(train, order[fifth:]), choose(train, order[:fifth])
    return sets, (
        f'{len(sets[1])} of the training images against {len(sets[0])} others, for want of a labelled split '
        f'(all of them are trained on, without labels)')

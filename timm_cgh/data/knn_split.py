"""Which labelled images the kNN check during training compares."""
from contextlib import suppress
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from timm_cgh.errors import InputError

from .decode import ImageSubset, dataset_decoding
from .labels import check_class_numbers, class_to_idx, read_labels, to_label
from .sources import check_disjoint, find_split_folder, open_dataset, source_prefix, splits_overlap

__all__ = ['open_knn_datasets']

_EVAL_SPLITS = ('validation', 'val', 'test')
_STREAMS = ('hfids', 'wds', 'tfds')


class _FirstImages(IterableDataset):
    """The first images of a stream, as (PIL image, label) items."""

    def __init__(self, stream: IterableDataset, count: int):
        self.stream = stream
        self.count = count
        self.decoding = dataset_decoding(stream)

    def set_loader_cfg(self, **kwargs: Any) -> None:
        self.stream.set_loader_cfg(**kwargs)

    def __iter__(self) -> Iterator[Tuple[Image.Image, int]]:
        info = torch.utils.data.get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        share = self.count // workers + (worker < self.count % workers)
        for _, (image, target, *_) in zip(range(share), self.stream):
            yield image, to_label(target)


def _open_streams(train_split: str, val_split: str, max_images: Optional[int], source: Dict[str, Any]) -> List[Dataset]:
    if max_images is not None:
        source = {**source, 'num_samples': max_images}  # some readers need a number
    splits = {'train_split': train_split, 'val_split': val_split}
    streams = [open_dataset(split=split, split_parameter=name, **source) for name, split in splits.items()]
    for stream in streams:
        stream.reader.dist_rank, stream.reader.dist_num_replicas = 0, 1  # all of it: one process reads it for all
    return streams if max_images is None else [_FirstImages(stream, max_images) for stream in streams]


def _is_disjoint(split: str, train: Dataset, train_split: str, source: Dict[str, Any]) -> bool:
    """Whether a source has a split of that name without images of the training split."""
    dataset = source['dataset']
    if splits_overlap(train, train_split, split, dataset, source['data_dir']):
        return False
    if dataset == 'digits':
        return (train_split, split) == ('train', 'validation')
    if source_prefix(dataset) == 'hfds':
        return split in (train.reader.dataset.info.splits or {})
    if hasattr(train, 'reader') or dataset.lower() in ('torch/image_folder', 'torch/folder'):
        return find_split_folder(source['data_dir'], split) is not None
    return split == 'validation' and not any(part in train_split for part in ('val', 'eval', 'test'))


def _open_query(split: str, train: Dataset, classes: np.ndarray, source: Dict[str, Any]) -> Tuple[Dataset, np.ndarray]:
    """Open a split, and find the indices of its images of the training classes.

    Raises:
        InputError: the split cannot be opened, numbers the classes differently or has none of them
    """
    queries = open_dataset(split=split, split_parameter='val_split', **source)
    check_class_numbers(train, queries)
    labels = read_labels(queries)
    known = np.flatnonzero(np.isin([] if labels is None else labels, classes))
    if not len(known):
        raise InputError(f'val_split={split}: has no image of the classes in the training images')
    return queries, known


def _find_queries(
        train: Dataset,
        train_split: str,
        val_split: Optional[str],
        classes: np.ndarray,
        source: Dict[str, Any],
) -> Optional[Tuple[str, Dataset, np.ndarray]]:
    """Name, images and indices of `val_split`, or of the first split that is disjoint from the training images."""
    if val_split:
        check_disjoint(train, train_split, val_split, source['dataset'], source['data_dir'])
        return val_split, *_open_query(val_split, train, classes, source)
    source = {**source, 'dataset_download': False}
    for split in _EVAL_SPLITS:
        if _is_disjoint(split, train, train_split, source):
            with suppress(InputError):
                return split, *_open_query(split, train, classes, source)
    return None


def _choose(dataset: Dataset, indices: np.ndarray, max_images: Optional[int], seed: int) -> ImageSubset:
    order = np.random.default_rng(seed).permutation(len(indices))[:max_images]
    return ImageSubset(dataset, np.sort(indices[order]).tolist())


def open_knn_datasets(
        dataset: Optional[str],
        data_dir: Optional[str],
        train_split: Optional[str],
        val_split: Optional[str],
        *,
        max_images: Optional[int],
        seed: int,
        train: Optional[Dataset] = None,
        **source: Any,
) -> Tuple[Optional[Tuple[Dataset, Dataset]], str]:
    """Open labelled images for kNN: those to search, and those to classify.

    The images to classify are those of `val_split`; without it, those of `validation`, `val` or `test`, if the source
    has such a split disjoint from the training images; else a fixed fifth of the labelled training images, compared
    with the other four.

    Args:
        dataset, data_dir, source: see `open_dataset`
        train_split, val_split: names of the splits; `val_split` None to look for one
        max_images: limit for each side; a random choice by `seed`, the first images of streams
        seed: of the choice
        train: the training split, if open already (map-style): a large folder is then listed only once

    Returns:
        (reference, query) of (PIL image, label) items, or None without labels; description for the log

    Raises:
        InputError: `val_split` cannot be used
    """
    dataset, train_split = dataset or '', train_split or 'train'
    source.update(dataset=dataset, data_dir=data_dir or '', seed=seed)
    if source_prefix(dataset) in _STREAMS:
        if not val_split:
            return None, 'none: the labels of a stream are not known, unless a validation split is named'
        check_disjoint(train, train_split, val_split, dataset, data_dir)
        reference, query = _open_streams(train_split, val_split, max_images, source)
        return (reference, query), f'images of {val_split} against those of {train_split}, the first of either'

    if train is None:
        train = open_dataset(split=train_split, **source)
    labels = read_labels(train)
    classes, counts = np.unique([] if labels is None else labels[labels >= 0], return_counts=True)
    if labels is None or (counts > 1).sum() < 2:
        why = 'have fewer than two classes' if len(classes) < 2 else 'hardly share a class'
        if val_split:
            raise InputError(f'val_split={val_split}: is of no use, the training images {why}')
        return None, f'none: the training images {why}'
    if not dataset:  # a class must have the same number in both folders
        source['class_map'] = class_to_idx(train)
    found = _find_queries(train, train_split, val_split, classes, source)
    references = np.flatnonzero(labels >= 0)
    if found is None:
        order = np.random.default_rng((seed, 5)).permutation(references)
        fifth = max(1, len(order) // 5)
        references, found = order[fifth:], ('', train, order[:fifth])
    split, queries, known = found
    names = [name for name, number in class_to_idx(train).items() if number in classes]
    more = ', ...' if len(names) > 5 else ''
    named = f"; {len(names)} classes: {', '.join(names[:5])}{more}" if names else ''
    sets = _choose(train, references, max_images, seed), _choose(queries, known, max_images, seed)
    if split:
        return sets, f'{len(sets[1])} images of {split} against {len(sets[0])} of {train_split}{named}'
    return sets, (
        f'{len(sets[1])} of the training images against {len(sets[0])} others, as there is no labelled split '
        f'(all of them are trained on, without labels){named}')

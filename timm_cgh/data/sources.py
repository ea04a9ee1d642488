"""Where images come from: timm's data sets, torchvision's STL-10, the embedded digits; and what kNN compares."""
import os
from typing import Any, List, Optional, Tuple

import torch
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset, Subset

from timm_cgh.errors import InputError

from .digits import Digits

__all__ = ['image_mode', 'is_stream', 'labels_of', 'open_dataset', 'open_eval_datasets']

_EVAL_SPLITS = ('validation', 'val', 'test')
_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow-datasets'}


def image_mode(in_chans: int) -> str:
    """PIL mode of images with so many channels.

    Raises:
        InputError: neither 1 nor 3
    """
    if in_chans not in (1, 3):
        raise InputError(f'--in-chans {in_chans}: images have 3 channels (colour) or 1 (grey)')
    return 'L' if in_chans == 1 else 'RGB'


def is_stream(dataset: Dataset) -> bool:
    """Whether a data set has no order of its own (wds/, hfids/, tfds/)."""
    return isinstance(dataset, IterableDataset)


def _prefix(name: str) -> str:
    return name.partition('/')[0].lower() if '/' in name else ''


def _reason(error: BaseException) -> str:
    text = ' '.join(str(error).split())
    return (text or type(error).__name__)[:300]


def open_dataset(
        name: Optional[str],
        root: Optional[str],
        split: str,
        *,
        is_training: bool = False,
        batch_size: int = 1,
        seed: int = 42,
        in_chans: int = 3,
        download: bool = False,
        class_map: str = '',
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        num_samples: Optional[int] = None,
        search_split: bool = True,
        trust_remote_code: bool = False,
) -> Dataset:
    """Open a data set of (PIL image, target) items.

    Args:
        name: empty for a folder or a tar at `root`; `digits`; `torch/...` (`torch/stl10` too), `hfds/...`, `hfids/...`,
            `wds/...`, `tfds/...` as timm's `create_dataset` reads them
        root: folder, tar, or where the named data set lies or is cached
        split: name of the split
        is_training: shuffle (streams)
        others: see `timm.data.create_dataset`

    Raises:
        InputError: the data set cannot be opened; names the flag
    """
    name = name or ''
    mode = image_mode(in_chans)
    prefix = _prefix(name)
    if name == 'digits':
        return Digits(split, mode)
    if not name and not root:
        raise InputError('--data-dir: name a folder or a tar of images (or --dataset)')
    if prefix in ('', 'wds') and root and not os.path.exists(root) and '://' not in root:
        raise InputError(f'--data-dir {root}: no such folder or file')
    if name and prefix not in ('', 'torch', *_PACKAGES):
        raise InputError(f'--dataset {name}: starts with torch/, hfds/, hfids/, wds/ or tfds/, or is digits')
    if name and not prefix:
        raise InputError(f'--dataset {name}: no such data set; did you mean torch/{name} or hfds/{name}?')
    if prefix == 'torch' and not root:
        raise InputError(f'--data-dir: say where {name} lies (or is to be downloaded to, with --dataset-download)')
    where = f'--dataset {name}' if name else f'--data-dir {root}'
    try:
        if name.lower() == 'torch/stl10':
            from torchvision.datasets import STL10
            parts = {'train': 'train+unlabeled', 'validation': 'test', 'val': 'test'}
            return STL10(root, split=parts.get(split, split), download=download)
        return create_dataset(
            name,
            root=root,
            split=split,
            search_split=search_split,
            class_map=class_map,
            is_training=is_training,
            download=download,
            batch_size=batch_size,
            num_samples=num_samples,
            seed=seed,
            input_img_mode=mode,
            trust_remote_code=trust_remote_code,
            input_key=input_key,
            target_key=target_key,
        )
    except ImportError as error:
        raise InputError(f'{where}: needs a package (pip install {_PACKAGES.get(prefix, "torchvision")})') from error
    except Exception as error:  # timm's readers raise whatever their libraries do
        reason = _reason(error)
        if 'split' in reason.lower() and 'download' not in reason.lower():
            raise InputError(f'--train-split / --val-split {split}: {reason}') from error
        if prefix == 'torch' and not download and 'download' in reason.lower():
            reason += ' (--dataset-download fetches it)'
        if isinstance(error, AssertionError) and prefix == 'torch':
            reason = f"{reason} (among timm's: cifar10, cifar100, mnist, imagenet, inaturalist, places365, image_folder; stl10)"
        raise InputError(f'{where}: {reason}') from error


def labels_of(dataset: Dataset) -> Optional[List[int]]:
    """The labels of a map-style data set, without decoding an image; None where that cannot be had."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else [labels[i] for i in dataset.indices]
    for name in ('targets', 'labels'):  # torchvision
        labels = getattr(dataset, name, None)
        if labels is not None:
            return [int(label) for label in labels]
    reader = getattr(dataset, 'reader', None)
    if hasattr(reader, 'samples'):  # folder, tar
        return [int(sample[-1]) for sample in reader.samples]
    if hasattr(reader, 'iter_targets'):  # hfds
        try:
            return [-1 if label is None else int(label) for label in reader.iter_targets()]
        except (KeyError, TypeError, ValueError):
            return None
    return None


def _limited(dataset: Dataset, indices: List[int], max_images: int, seed: int) -> Subset:
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))[:max_images]
    return Subset(dataset, sorted(indices[i] for i in order.tolist()))


class _First(IterableDataset):
    """The first images of a stream."""

    def __init__(self, stream: IterableDataset, count: int):
        self.stream = stream
        self.count = count

    def set_loader_cfg(self, **kwargs: Any) -> None:
        if hasattr(self.stream, 'set_loader_cfg'):
            self.stream.set_loader_cfg(**kwargs)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        share = self.count if info is None else -(-self.count // info.num_workers)
        for _, item in zip(range(share), self.stream):
            yield item


def _has_own_split(name: str, root: Optional[str], split: str) -> bool:
    """Whether a folder has a sub-folder of that name: timm silently reads the root itself where it has not."""
    return bool(name) or (root is not None and os.path.isdir(os.path.join(root, split)))


def open_eval_datasets(
        name: Optional[str],
        root: Optional[str],
        train_split: str,
        val_split: Optional[str],
        *,
        max_images: int,
        seed: int,
        **source: Any,
) -> Tuple[Optional[Tuple[Dataset, Dataset]], str]:
    """Labelled images to search and to classify by kNN while training goes on.

    The split that the user names; else `validation`, `val` or `test`, where the source has it; else a fixed fifth of
    the training images against the rest.

    Args:
        name, root, source: see `open_dataset`
        train_split, val_split: names, `val_split` None where the user named none
        max_images: at most so many on either side, chosen by `seed`
        seed: of the choice

    Returns:
        (reference, query) or None where there are no labels, and a line that says what was done

    Raises:
        InputError: the split that the user named cannot be opened
    """
    name = name or ''
    train = open_dataset(name, root, train_split, seed=seed, **source)
    if is_stream(train):
        if not val_split:
            return None, 'none: a stream, whose labels are not known (--val-split names a labelled split)'
        query = open_dataset(name, root, val_split, seed=seed, **source)
        return (_First(train, max_images), _First(query, max_images)), f"{val_split} against {train_split}, first images"

    labels = labels_of(train)
    labelled = [i for i, label in enumerate(labels or []) if label >= 0]
    if len({labels[i] for i in labelled}) < 2:
        return None, 'none: the training images have no labels'
    query = None
    if val_split:
        if not _has_own_split(name, root, val_split):
            raise InputError(f'--val-split {val_split}: no such folder in {root}')
        query = open_dataset(name, root, val_split, seed=seed, **source)
    else:
        for split in _EVAL_SPLITS:
            if split == train_split or not _has_own_split(name, root, split):
                continue
            try:
                query = open_dataset(name, root, split, seed=seed, **{**source, 'download': False})
            except InputError:
                continue
            val_split = split
            break
    if query is not None:
        query_labels = labels_of(query)
        chosen = [i for i, label in enumerate(query_labels or []) if label >= 0]
        classes, train_classes = (getattr(getattr(d, 'reader', None), 'class_to_idx', None) for d in (query, train))
        if chosen and (not classes or not train_classes or classes == train_classes):
            sets = _limited(train, labelled, max_images, seed), _limited(query, chosen, max_images, seed)
            return sets, f'{len(sets[1])} images of {val_split} against {len(sets[0])} of {train_split}'
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed)).tolist()
    fifth = max(1, len(order) // 5)
    held, rest = ([labelled[i] for i in part] for part in (order[:fifth], order[fifth:]))
    sets = _limited(train, rest, max_images, seed), _limited(train, held, max_images, seed)
    return sets, (
        f'{len(sets[1])} of the training images against {len(sets[0])} others, for want of a labelled split '
        f'(all of them are trained on, without labels)')

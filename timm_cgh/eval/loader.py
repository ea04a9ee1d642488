"""Evaluation loader: every readable image once, in order, resized and cropped as in the paper's protocol."""
import copy
from functools import partial
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from timm.data import create_loader
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.transforms import MaybeToTensor, ToNumpy
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from timm_cgh.data import image_mode, is_stream
from timm_cgh.data.decode import UNREADABLE, dataset_decoding, decode_image, read_image
from timm_cgh.data.labels import to_label
from timm_cgh.data.workers import start_worker

__all__ = ['create_eval_loader', 'eval_crop_pct']


def eval_crop_pct(img_size: int) -> float:
    """Share of the resized image's side that the centre crop keeps: 224 of 256 px, all of a smaller image.

    An image is resized to the evaluation's size, whatever its own. The authors resize none below 224 px: evaluate at
    the images' size (STL-10: 96 px, configs/eval_linear_stl10.yaml) to do the same.
    """
    return 0.875 if img_size >= 224 else 1.0


def _transformed(image: Any, transform: Any) -> Any:
    """An image by timm's transform, which takes (H, W, C) uint8 pixels of other channels for no image."""
    if not isinstance(image, np.ndarray):
        return transform(image)
    image = torch.from_numpy(image.copy()).permute(2, 0, 1)
    for step in transform.transforms:
        if isinstance(step, MaybeToTensor):
            image = image / 255
        else:
            image = image.numpy() if isinstance(step, ToNumpy) else step(image)
    return image


class _EvalImages(Dataset):
    """(transformed image, label) items, or (transformed image, (2,) label and index); None for an unreadable image."""

    def __init__(self, dataset: Dataset, mode: str, numbered: bool):
        self.dataset, self.mode, self.numbered = dataset, mode, numbered
        self.transform: Any = None  # timm's create_loader sets it

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Optional[Tuple[torch.Tensor, Any]]:
        try:
            image, label = read_image(self.dataset, index, self.mode)
        except UNREADABLE:
            return None
        return _transformed(image, self.transform), torch.tensor((label, index)) if self.numbered else label


class _EvalStream(IterableDataset):
    """(transformed image, label) items of a stream, whose reader skips what it cannot read."""

    def __init__(self, dataset: IterableDataset, mode: str):
        self.dataset, self.decoding = dataset, dataset_decoding(dataset, mode)
        self.transform: Any = None

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, int]]:
        for image, target, *_ in self.dataset:
            yield _transformed(decode_image(image, self.decoding), self.transform), to_label(target)


def _collate_readable(items: Sequence[Any], collate: Callable, none: Tuple[torch.Tensor, torch.Tensor]) -> Any:
    readable = [item for item in items if item is not None]
    return collate(readable) if readable else none


def _start_worker(info: Any) -> int:
    start_worker(info.id)
    return info.seed


def create_eval_loader(
        dataset: Dataset,
        data_config: Dict[str, Any],
        batch_size: int = 256,
        workers: int = 0,
        device: Union[str, torch.device] = 'cpu',
        numbered: bool = False,
) -> Union[DataLoader, PrefetchLoader]:
    """timm's evaluation loader: resize, centre crop (see `eval_crop_pct`), normalise; every image once, in order.

    Images that cannot be read are left out of their batch, which may be empty then.

    Args:
        dataset: gives (PIL image, target) items, map-style or a stream; not changed
        data_config: timm's: `input_size` (C, H, W), `mean` and `std` per channel, `interpolation`; `crop_pct` and
            `crop_mode` in place of `eval_crop_pct` and a centre crop
        batch_size: images per batch; the last one may be smaller
        workers: worker processes; they end with each pass
        device: of the batches; timm's prefetcher moves them to an accelerator and normalises there
        numbered: give each image's index in the (map-style) data set beside its label

    Returns:
        iterable of ((B, C, H, W) float32, (B,) int64) batches on `device`, (B, 2) labels and indices where `numbered`

    Raises:
        ValueError: mean and std of another number of channels
    """
    device = torch.device(device)
    chans, *img_size = data_config['input_size']
    if not len(data_config['mean']) == len(data_config['std']) == chans:
        raise ValueError(f"{chans} channels, mean {data_config['mean']}, std {data_config['std']}: one per channel")
    mode = image_mode(chans)
    if is_stream(dataset) and hasattr(dataset, 'set_loader_cfg'):
        dataset = copy.copy(dataset)
        dataset.set_loader_cfg(num_workers=workers)  # create_loader tells timm's own class only
    prefetch = device.type != 'cpu'
    none = torch.empty(0, chans, *img_size), torch.empty((0, 2) if numbered else 0, dtype=torch.long)
    return create_loader(
        _EvalStream(dataset, mode) if is_stream(dataset) else _EvalImages(dataset, mode, numbered),
        input_size=(chans, *img_size),
        batch_size=batch_size,
        interpolation=data_config.get('interpolation') or 'bilinear',
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=workers,
        crop_pct=data_config.get('crop_pct') or eval_crop_pct(min(img_size)),
        crop_mode=data_config.get('crop_mode'),
        collate_fn=partial(_collate_readable, collate=fast_collate if prefetch else default_collate, none=none),
        pin_memory=device.type == 'cuda',
        device=device,
        use_prefetcher=prefetch,
        persistent_workers=False,  # evaluations may be minutes apart
        worker_seeding=_start_worker,
    )

"""Evaluation loader: every image once, in order, resized and cropped as in the paper's protocol."""
import copy
from typing import Any, Dict, Iterator, Tuple, Union

import torch
from timm.data import create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_cgh.data.labels import to_label
from timm_cgh.data.workers import start_worker

__all__ = ['create_eval_loader', 'eval_crop_pct']


def eval_crop_pct(img_size: int) -> float:
    """Share of the resized image's side that the centre crop keeps: 224 of 256 px, all of a smaller image.

    A small image of the right size is thus neither resized nor cropped, as in the authors' evaluation.
    """
    return 0.875 if img_size >= 224 else 1.0


class _Transformed:
    """Items of a data set of images, transformed; the data set's own transform stays as it is."""

    def __init__(self, dataset: Dataset, mode: str):
        self.dataset = dataset
        self.mode = mode
        self.transform: Any = None  # timm's create_loader sets it

    def prepare(self, image: Any, target: Any, *_: Any) -> Tuple[torch.Tensor, int]:
        if getattr(image, 'mode', self.mode) != self.mode:  # torchvision's data sets give whatever the file holds
            image = image.convert(self.mode)
        return self.transform(image), to_label(target)


class _EvalImages(_Transformed, Dataset):
    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        return self.prepare(*self.dataset[index])


class _EvalStream(_Transformed, IterableDataset):
    def __iter__(self) -> Iterator[Tuple[torch.Tensor, int]]:
        return (self.prepare(*item) for item in self.dataset)


def _start_worker(info: Any) -> int:
    start_worker(info.id)
    return info.seed


def create_eval_loader(
        dataset: Dataset,
        data_config: Dict[str, Any],
        batch_size: int = 256,
        workers: int = 0,
        device: Union[str, torch.device] = 'cpu',
) -> Union[DataLoader, PrefetchLoader]:
    """timm's evaluation loader: resize, centre crop (see `eval_crop_pct`), normalise; every image once, in order.

    Args:
        dataset: gives (PIL image, target) items, map-style or a stream; not changed
        data_config: timm's: `input_size` (C, H, W) with C 1 or 3, `mean` and `std` per channel, `interpolation`
        batch_size: images per batch; the last one may be smaller
        workers: worker processes; they end with each pass
        device: of the batches; timm's prefetcher moves them to an accelerator and normalises there

    Returns:
        iterable of ((B, C, H, W) float32, (B,) int64) batches on `device`

    Raises:
        ValueError: channels other than 1 and 3, or mean and std of another number of channels
    """
    device = torch.device(device)
    chans, *img_size = data_config['input_size']
    if chans not in (1, 3):
        raise ValueError(f'images have 1 or 3 channels, input_size asks for {chans}')
    if not len(data_config['mean']) == len(data_config['std']) == chans:
        raise ValueError(f"{chans} channels, mean {data_config['mean']}, std {data_config['std']}: one per channel")
    stream = isinstance(dataset, IterableDataset)
    if stream and hasattr(dataset, 'set_loader_cfg'):
        dataset = copy.copy(dataset)
        dataset.set_loader_cfg(num_workers=workers)  # create_loader tells timm's own class only
    return create_loader(
        (_EvalStream if stream else _EvalImages)(dataset, 'L' if chans == 1 else 'RGB'),
        input_size=(chans, *img_size),
        batch_size=batch_size,
        interpolation=data_config.get('interpolation') or 'bilinear',
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=workers,
        crop_pct=eval_crop_pct(min(img_size)),
        pin_memory=device.type == 'cuda',
        device=device,
        use_prefetcher=device.type != 'cpu',
        persistent_workers=False,  # evaluations may be minutes apart
        worker_seeding=_start_worker,
    )

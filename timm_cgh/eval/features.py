"""Images -> feature matrix, for everything that judges a frozen backbone."""
import copy
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import create_loader
from torch.utils.data import Dataset, IterableDataset

from timm_cgh.data.workers import iterate, start_worker

__all__ = ['Pixels', 'create_eval_loader', 'eval_crop_pct', 'extract_features', 'pooled_features']


def eval_crop_pct(img_size: int) -> float:
    """Share of the resized image that the centre crop keeps: 224 of 256 px, everything on small images.

    Below 224 px an image of native size thus passes without resize and crop, as in the authors' evaluation.
    """
    return 0.875 if img_size >= 224 else 1.0


def _read(image: Any, transform: Any, mode: str) -> torch.Tensor:
    if getattr(image, 'mode', mode) != mode:  # torchvision's data sets give whatever the file holds
        image = image.convert(mode)
    return transform(image)


class _EvalImages(Dataset):
    """Items of a map-style data set of images, through an evaluation transform; the data set itself is left alone."""

    def __init__(self, dataset: Dataset, mode: str):
        self.dataset = dataset
        self.mode = mode
        self.transform = None  # timm's create_loader sets it

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        image, target = self.dataset[index][:2]
        return _read(image, self.transform, self.mode), -1 if target is None else int(target)


class _EvalStream(IterableDataset):
    """Items of a stream of images, through an evaluation transform."""

    def __init__(self, dataset: IterableDataset, mode: str):
        self.dataset = dataset
        self.mode = mode
        self.transform = None

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, int]]:
        for image, target, *_ in self.dataset:
            yield _read(image, self.transform, self.mode), -1 if target is None else int(target)


def _start_worker(info: Any) -> int:
    start_worker(info.id)
    return info.seed


def create_eval_loader(
        dataset: Dataset,
        data_config: Dict[str, Any],
        batch_size: int = 256,
        workers: int = 0,
        device: Union[str, torch.device] = 'cpu',
) -> Iterable[Tuple[torch.Tensor, torch.Tensor]]:
    """timm's evaluation loader: resize, centre crop (see `eval_crop_pct`), normalise; every image once, in order.

    Args:
        dataset: gives (PIL image, target) items, map-style or a stream; not changed
        data_config: timm's: `input_size` (C, H, W) with C 1 or 3, `mean` and `std` per channel, `interpolation`
        batch_size: images per batch; the last one may be smaller
        workers: worker processes; they end with each pass
        device: where batches are wanted; on an accelerator timm's prefetcher transfers and normalises

    Returns:
        iterable of ((B, C, H, W) float32, (B,) int64) batches, on `device` where that is an accelerator

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
    prefetch = device.type != 'cpu'
    return create_loader(
        (_EvalStream if stream else _EvalImages)(dataset, 'L' if chans == 1 else 'RGB'),
        input_size=(chans, *img_size),
        batch_size=batch_size,
        is_training=False,
        interpolation=data_config.get('interpolation') or 'bilinear',
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=workers,
        crop_pct=eval_crop_pct(min(img_size)),
        crop_mode='center',
        pin_memory=device.type == 'cuda',
        device=device,
        use_prefetcher=prefetch,
        persistent_workers=False,  # minutes may lie between two evaluations
        worker_seeding=_start_worker,
    )


def pooled_features(model: nn.Module, images: torch.Tensor, amp_dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """(B, D) float32 features of a batch, of a model that pools or of the last map of a `features_only` model.

    Args:
        model: frozen, see `extract_features`
        images: (B, C, H, W) normalised, on the model's device
        amp_dtype: run under autocast to this type; what float16 cannot hold is run again in float32
    """
    with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        output = _pooled(model(images), model)
    if amp_dtype is torch.float16 and not output.isfinite().all():  # beyond 65504 in some layer
        output = _pooled(model(images), model)
    return output.float()


def _pooled(output: Any, model: nn.Module) -> torch.Tensor:
    if isinstance(output, (list, tuple)):
        output = output[-1].mean(dim=(1, 2) if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else (2, 3))
    if output.ndim != 2:
        raise ValueError(f"expected a pooled feature (B, D), got {tuple(output.shape)}: keep the model's pooling")
    return output


def extract_features(
        model: nn.Module,
        loader: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: Union[str, torch.device] = 'cpu',
        amp_dtype: Optional[torch.dtype] = None,
        channels_last: bool = False,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Pooled features of all images, without gradient, from the model in eval mode.

    Model (each module's own training flag included) and the CPU's random state are as before when this returns.

    Args:
        model: timm model without classifier (`num_classes=0`), on `device`; one built with `features_only` gives the
            average of its last map
        loader: batches of normalised images and labels
        device: where the model is
        amp_dtype: run under autocast to this type; a batch that float16 cannot hold is run again in float32
        channels_last: give the images in channels-last layout

    Returns:
        (N, D) float32 features and (N,) int64 labels, on the CPU, in the loader's order

    Raises:
        ValueError: the model has a classifier or does not pool, or the loader is empty
    """
    if getattr(model, 'num_classes', 0):
        raise ValueError(f'features need a model without classifier: num_classes=0, not {model.num_classes}')
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    training = [(module, module.training) for module in model.modules()]
    features, labels = [], []
    try:
        model.eval()  # also makes LeViT and others drop what they cached of older weights
        # a data loader draws from the global generator: an evaluation must not change what training draws next
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for images, target in iterate(loader):
                images = images.to(device, non_blocking=True, memory_format=layout)
                features.append(pooled_features(model, images, amp_dtype).cpu())
                labels.append(target.cpu())
    finally:
        for module, flag in training:  # parents come first: what train() does to their children is put right after
            module.train(flag)
    if not features:
        raise ValueError('no images to take features from')
    return torch.cat(features), torch.cat(labels).long()


class Pixels(nn.Module):
    """Pixel values as features: the yardstick that any backbone should beat. A model without parameters, for
    `extract_features`.

    Args:
        mean, std: per channel, that the images have been normalised with
        max_size: larger images are averaged down to that many px on a side
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], max_size: int = 32):
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.max_size = max_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) normalised images -> (B, C * h * w) values in [0, 1], h and w at most `max_size`."""
        images = (images.float() * self.std + self.mean).clamp(0, 1)
        size = tuple(min(side, self.max_size) for side in images.shape[-2:])
        if size != images.shape[-2:]:
            images = F.interpolate(images, size=size, mode='area')
        return images.flatten(1)

"""Images -> feature matrix of a frozen backbone, the images divided among the processes."""
import contextlib
import logging
import sys
import time
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any, Dict, Iterable, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from timm_cgh.data.decode import UNREADABLE, image_name, read_image
from timm_cgh.data.workers import iterate
from timm_cgh.distributed import Process, all_gather_objects, block_indices, gather_rows
from timm_cgh.errors import InputError, reason

from .loader import create_eval_loader

__all__ = ['FeatureExtractor', 'Features', 'Pixels', 'extract_features', 'pooled_features', 'why_unreadable']

_logger = logging.getLogger('eval')
_MAX_NAMED = 20  # unreadable images


def _pooled(output: Any, model: nn.Module) -> torch.Tensor:
    if isinstance(output, (list, tuple)):
        output = output[-1].mean(dim=(1, 2) if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else (2, 3))
    if output.ndim != 2:
        raise ValueError(f"expected a pooled feature (B, D), got {tuple(output.shape)}: keep the model's pooling")
    return output


def pooled_features(model: nn.Module, images: torch.Tensor, amp_dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """(B, D) float32 features of a batch: the model's output, or the average of a `features_only` model's last map.

    Args:
        model: frozen, see `extract_features`
        images: (B, C, H, W) normalised, on the model's device
        amp_dtype: of autocast; a batch with features beyond the range of float16 is run again in float32
    """
    with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        output = _pooled(model(images), model)
    if amp_dtype is torch.float16 and not output.isfinite().all():  # beyond 65504 in some layer
        output = _pooled(model(images), model)
    return output.float()


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # also makes LeViT and others drop what they cached of older weights
        yield
    finally:
        for module, flag in training:  # parents come first: what train() does to their children is put right after
            module.train(flag)


def _feature_batches(
        model: nn.Module,
        loader: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: Union[str, torch.device],
        amp_dtype: Optional[torch.dtype],
        channels_last: bool,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """(B, D) float32 features, (0, 0) of an empty batch, and (B, ...) labels of each batch, on the CPU."""
    if getattr(model, 'num_classes', 0):
        raise ValueError(f'features need a model without classifier: num_classes=0, not {model.num_classes}')
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with _in_eval_mode(model), torch.no_grad():
        for images, target in iterate(loader):
            features = torch.empty(0, 0)
            if len(images):
                images = images.to(device, non_blocking=True, memory_format=layout)
                features = pooled_features(model, images, amp_dtype).to('cpu', copy=True)
            # copied: each batch of a worker keeps a file descriptor open as long as its memory is in use
            yield features, target.to('cpu', torch.long, copy=True)


def extract_features(
        model: nn.Module,
        loader: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: Union[str, torch.device] = 'cpu',
        amp_dtype: Optional[torch.dtype] = None,
        channels_last: bool = False,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Pooled features of all images of a loader, without gradient, from the model in eval mode.

    The model's training flags and the CPU's random state are left as they were.

    Args:
        model: timm model without classifier (`num_classes=0`) or `features_only` model, on `device`
        loader: batches of normalised images and labels
        device: where the model is
        amp_dtype: see `pooled_features`
        channels_last: give the images in channels-last layout

    Returns:
        (N, D) float32 features and (N,) int64 labels, on the CPU, in the loader's order; (0, 0) and (0,) if all batches
        are empty

    Raises:
        ValueError: the model has a classifier or does not pool, or the loader has no batches
    """
    # a data loader draws from the global generator: an evaluation must not change what training draws next
    with torch.random.fork_rng(devices=[]):
        batches = list(_feature_batches(model, loader, device, amp_dtype, channels_last))
    if not batches:
        raise ValueError('no images to extract features from')
    features, labels = zip(*batches)
    return torch.cat([part for part in features if len(part)] or [torch.empty(0, 0)]), torch.cat(labels)


class Pixels(nn.Module):
    """Raw pixel values as features, the baseline of every backbone: a model without parameters.

    Args:
        mean, std: per channel, that the images have been normalised with
        max_size: larger images are averaged down to this side, px
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


class Features(NamedTuple):
    """Features of a data set, in its order and without its unreadable images, on the CPU.

    features: (N, D) float32; labels: (N,) int64; indices: (N,) int64, of the images in the data set.
    """
    features: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


def why_unreadable(dataset: Dataset, index: int) -> str:
    """The reason why an image cannot be read; '' if it can be now."""
    try:
        read_image(dataset, index)
    except UNREADABLE as error:
        return reason(error, 200)
    return ''


def _log_unreadable(dataset: Dataset, indices: Sequence[int]) -> None:
    for index in indices[:_MAX_NAMED]:
        why = why_unreadable(dataset, index)
        _logger.warning(f'Unreadable image left out: {image_name(dataset, index)}' + (f' ({why})' if why else ''))
    if len(indices) > _MAX_NAMED:
        _logger.warning(f'{len(indices) - _MAX_NAMED} more images are unreadable and left out')


def _with_progress(loader: Any, silent: bool) -> Iterator:
    """The batches, with a bar on a terminal, a log line every ten seconds elsewhere."""
    bar = tqdm(loader, 'features', leave=False, disable=silent or not sys.stderr.isatty())
    began = logged = time.monotonic()
    for done, batch in enumerate(bar, start=1):
        yield batch
        now = time.monotonic()
        if bar.disable and not silent and now - logged > 10:
            logged = now
            left = timedelta(seconds=round((now - began) / done * (len(loader) - done)))
            _logger.info(f'features [{done}/{len(loader)}], ETA {left}')


@dataclass
class FeatureExtractor:
    """Features of whole data sets, each image once, the work divided among the processes.

    Batches are those of a single process, whatever the number of processes: the features are the same to the last bit.

    Args:
        data_config: see `create_eval_loader`
        process: this process; the models are on its device
        batch_size: per process
        workers: data workers per process
        amp_dtype, channels_last: see `extract_features`
    """

    data_config: Dict[str, Any]
    process: Process = Process()
    _: KW_ONLY
    batch_size: int = 256
    workers: int = 0
    amp_dtype: Optional[torch.dtype] = None
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and into the memory format of the images."""
        return model.to(self.process.device, memory_format=self.memory_format)

    @torch.no_grad()
    def batch_features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """(B, D) float32 features of (B, C, H, W) normalised images on the device, from the model as it is."""
        return pooled_features(model, images.to(memory_format=self.memory_format), self.amp_dtype)

    def _loader(self, dataset: Dataset, share: torch.Tensor) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Batches of the images at the indices `share`, with (B, 2) labels and places in `share`."""
        loader = create_eval_loader(
            Subset(dataset, share.tolist()), self.data_config, self.batch_size, self.workers, self.process.device,
            numbered=True)
        return _with_progress(loader, silent=not self.process.primary)

    def iterate(
            self, model: nn.Module, dataset: Dataset, indices: torch.Tensor) -> Iterator[Tuple[Any, Any, torch.Tensor]]:
        """Features of images batch by batch, for what does not fit into memory; this rank's share of the batches.

        Args:
            model: see `extract_features`
            dataset: map-style, (PIL image, label) items
            indices: (n,) of the images, those of all ranks

        Yields:
            (B, D) float32 features, on the CPU; (B,) indices of their images; (b,) indices of the batch, those of
            unreadable images included
        """
        share = indices[block_indices(len(indices), self.batch_size, self.process.rank, self.process.world_size)]
        if not len(share):
            return
        batches = _feature_batches(
            model, self._loader(dataset, share), self.process.device, self.amp_dtype, self.channels_last)
        for (features, rows), block in zip(batches, share.split(self.batch_size)):
            yield features, share[rows[:, 1]], block

    def __call__(self, model: nn.Module, dataset: Dataset, warn_unreadable: bool = True) -> Features:
        """Extract the features of a data set, without the images that cannot be read.

        Collective: every rank must call, and gets all features.

        Args:
            model: see `extract_features`
            dataset: map-style, (PIL image, label) items
            warn_unreadable: log the names of unreadable images

        Raises:
            InputError: no image can be read
        """
        process, count = self.process, len(dataset)
        share = block_indices(count, self.batch_size, process.rank, process.world_size)
        features, rows = torch.empty(0, 0), torch.empty(0, 2, dtype=torch.long)
        if len(share):
            features, rows = extract_features(
                model, self._loader(dataset, share), process.device, self.amp_dtype, self.channels_last)
        labels, own = rows[:, 0], share[rows[:, 1]]
        parts = all_gather_objects((own, features.shape[1]))
        indices = torch.cat([part for part, _ in parts]).sort().values
        unreadable = sorted({*range(count)} - {*indices.tolist()})
        if process.primary and (warn_unreadable or len(unreadable) == count):
            _log_unreadable(dataset, unreadable)
        if not len(indices):
            raise InputError(f'data_dir: none of {count} images can be read, {image_name(dataset, 0)} among them')
        features = features.view(len(own), max(width for _, width in parts))  # it is 0 on a rank without images
        places = torch.searchsorted(indices, own)
        features, labels = (
            gather_rows(part, places, len(indices), process.device) for part in (features, labels.contiguous()))
        return Features(features, labels, indices)

    def find_readable(self, dataset: Dataset) -> torch.Tensor:
        """(N,) indices of the images that can be read; the others are logged. Collective: every rank must call."""
        pixels = Pixels(self.data_config['mean'], self.data_config['std'], max_size=1).to(self.process.device)
        return self(pixels, dataset).indices

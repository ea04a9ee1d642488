"""Images -> feature matrix of a frozen backbone, the images divided among the processes."""
import logging
import sys
import time
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_cgh.data import image_mode
from timm_cgh.data.decode import read_or_substitute
from timm_cgh.data.workers import iterate
from timm_cgh.distributed import Process, all_gather_objects

from .gather import block_indices, gather_rows
from .loader import create_eval_loader

__all__ = ['FeatureExtractor', 'Pixels', 'extract_features', 'pooled_features']

_logger = logging.getLogger('eval')


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
        (N, D) float32 features and (N,) int64 labels, on the CPU, in the loader's order

    Raises:
        ValueError: the model has a classifier or does not pool, or the loader is empty
    """
    if getattr(model, 'num_classes', 0):
        raise ValueError(f'features need a model without classifier: num_classes=0, not {model.num_classes}')
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
        raise ValueError('no images to extract features from')
    return torch.cat(features), torch.cat(labels).long()


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


class _Share(Dataset):
    """This rank's images of a data set; an unreadable one is replaced by the same other image on every rank."""

    def __init__(self, dataset: Dataset, indices: torch.Tensor, mode: str, warn_unreadable: bool):
        self.dataset, self.indices, self.mode, self.warn_unreadable = dataset, indices, mode, warn_unreadable

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        image, label, unreadable = read_or_substitute(self.dataset, int(self.indices[index]), self.mode)
        for name in unreadable if self.warn_unreadable else ():
            _logger.warning(f'Unreadable image, replaced by another: {name}')
        return image, label


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

    def __call__(
            self,
            model: nn.Module,
            dataset: Dataset,
            warn_unreadable: bool = True,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Extract the features of a data set. Collective: every rank must call.

        Args:
            model: see `extract_features`
            dataset: map-style, (PIL image, label) items
            warn_unreadable: log the name of each image that had to be replaced by another

        Returns:
            (N, D) float32 features and (N,) int64 labels on the CPU, in the data set's order, on every rank
        """
        count, device = len(dataset), self.process.device
        indices = block_indices(count, self.batch_size, self.process.rank, self.process.world_size)
        share = _Share(dataset, indices, image_mode(self.data_config['input_size'][0]), warn_unreadable)
        features, labels = torch.empty(0, 0), torch.empty(0, dtype=torch.long)
        if len(indices):
            loader = create_eval_loader(share, self.data_config, self.batch_size, self.workers, device)
            batches = _with_progress(loader, silent=not self.process.primary)
            features, labels = extract_features(model, batches, device, self.amp_dtype, self.channels_last)
        width = max(all_gather_objects(features.shape[1]))  # 0 on a rank without images
        features = features.view(len(features), width)
        return gather_rows(features, indices, count, device), gather_rows(labels, indices, count, device)

"""Labelled images -> augmented batches, to train linear heads and to fine-tune."""
import contextlib
import random
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from timm_cgh.data import EpochBatchSampler, image_mode
from timm_cgh.data.decode import UNREADABLE, image_name, read_image
from timm_cgh.data.workers import iterate, start_worker
from timm_cgh.distributed import Process
from timm_cgh.errors import InputError, reason

__all__ = ['BlockSampler', 'CropLoader']


class BlockSampler(EpochBatchSampler):
    """The sampler of pre-training, but the incomplete last batch is kept: 1 % of a small data set may be less than one.

    Args:
        num_samples, batch_size, seed, rank, world_size: see `EpochBatchSampler`
        least: images that every process needs in a batch (2 for batch norm); a last batch with fewer is dropped
    """

    def __init__(
            self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, least: int = 1):
        super().__init__(num_samples, batch_size, seed, rank, world_size)
        if num_samples < least * world_size:
            needed = f'{least * world_size} are needed, {least} for each process'
            raise InputError(f'{num_samples} images to train on are too few: {needed}')
        self.block = batch_size * world_size
        whole, rest = divmod(num_samples, self.block)
        self.steps = whole + (rest >= least * world_size)

    def __len__(self) -> int:
        return self.steps

    def block_size(self, batch: int) -> int:
        """Number of images in a batch over all processes."""
        return min(self.block, self.num_samples - batch * self.block)

    def blocks(self) -> Iterator[torch.Tensor]:
        """This process's part of each batch of the epoch: (B,) indices."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)))
        for block in torch.randperm(self.num_samples, generator=generator).split(self.block)[:self.steps]:
            yield block[self.rank::self.world_size]

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        return ([(self.epoch, index) for index in block.tolist()] for block in self.blocks())


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the two generators that transforms draw from; their states are restored afterwards."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every device as well: 100 us
            yield
    finally:
        random.setstate(state)


class _Crops(Dataset):
    """(uint8 crop, label) by (epoch, index): the crop is a function of seed, epoch and index alone."""

    def __init__(self, dataset: Dataset, transform: Any, seed: int, mode: str):
        self.dataset, self.transform, self.seed, self.mode = dataset, transform, seed, mode

    def __getitem__(self, key: Tuple[int, int]) -> Tuple[torch.Tensor, int]:
        try:
            image, label = read_image(self.dataset, key[1], self.mode)
        except UNREADABLE as error:
            name = image_name(self.dataset, key[1])
            raise InputError(f'data_dir: {name} could be read before, but not now ({reason(error)})') from error
        if isinstance(image, np.ndarray):  # of other than 1 and 3 channels
            image = torch.from_numpy(image.copy()).permute(2, 0, 1)
        with _seeded(hash((self.seed, *key))):
            return self.transform(image), label


class CropLoader:
    """timm's training transform (random resized crop, flip) over a labelled map-style data set.

    The batches are the same for any number of workers and after a resume; N processes see what one process with N times
    the batch size would.

    Args:
        images: (PIL image, label) items, all readable (`FeatureExtractor.find_readable`)
        data_config: timm's `input_size`, `mean`, `std`, `interpolation`
        process: this process; the batches are on its device
        batch_size: per process
        seed: of order and crops
        workers: per process
        scale, hflip: of the crop (the authors' code: 0.08 to 1, 0.5)
        least: see `BlockSampler`
    """

    def __init__(
            self,
            images: Dataset,
            data_config: Dict[str, Any],
            process: Process = Process(),
            *,
            batch_size: int,
            seed: int = 42,
            workers: int = 0,
            scale: Sequence[float] = (0.08, 1.0),
            hflip: float = 0.5,
            least: int = 1,
    ):
        self.device = process.device
        transform = create_transform(
            tuple(data_config['input_size']),
            is_training=True,
            scale=tuple(scale),
            hflip=hflip,
            color_jitter=None,
            interpolation=data_config.get('interpolation') or 'bilinear',
            normalize=False,  # uint8: a quarter of what float would move between processes
        )
        self.sampler = BlockSampler(len(images), batch_size, seed, process.rank, process.world_size, least)
        self.loader = DataLoader(
            _Crops(images, transform, seed, image_mode(data_config['input_size'][0])),
            batch_sampler=self.sampler,
            num_workers=workers,
            worker_init_fn=start_worker,
            pin_memory=self.device.type == 'cuda',
            persistent_workers=workers > 0,
        )
        self.mean, self.std = (
            255 * torch.tensor(data_config[name], device=self.device).view(1, -1, 1, 1) for name in ('mean', 'std'))

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, epoch: int) -> Iterator[Tuple[torch.Tensor, torch.Tensor, int]]:
        """Batches of an epoch: normalised (B, C, H, W) images, (B,) labels, number of images over all processes."""
        self.sampler.set_epoch(epoch)
        for batch, (images, labels) in enumerate(iterate(self.loader)):
            images = images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
            yield images, labels.to(self.device, non_blocking=True), self.sampler.block_size(batch)

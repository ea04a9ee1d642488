"""Batches of uint8 views on the CPU, from a training data set."""
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from timm_cgh.errors import InputError

from .sources import is_stream, num_images
from .view_dataset import EpochBatchSampler, ViewDataset, ViewStream
from .views import ViewSpec
from .workers import iterate, start_worker

__all__ = ['Batch', 'ViewLoader', 'create_view_loader']


class Batch(NamedTuple):
    """Views of a batch before photometric augmentation.

    views: per view (B, C, H, W) uint8, channels last in memory; params: per view its photometric rows (B, 7)
    float32, or None; target: (B,) int64, -1 where unknown; index: (B,) int64, -1 in streams; unreadable: names of the
    images that could not be read.
    """
    views: List[torch.Tensor]
    params: List[Optional[torch.Tensor]]
    target: torch.Tensor
    index: torch.Tensor
    unreadable: List[str]


def _collate(samples: Sequence[Tuple]) -> Batch:
    views, params, targets, indices, unreadable = zip(*samples)
    return Batch(
        # stays channels last; in a worker, `default_collate` writes straight to shared memory
        views=[default_collate([v.permute(1, 2, 0) for v in view]).permute(0, 3, 1, 2) for view in zip(*views)],
        params=[None if rows[0] is None else torch.stack(rows) for rows in zip(*params)],
        target=torch.tensor(targets),
        index=torch.tensor(indices),
        unreadable=[name for names in unreadable for name in names],
    )


class ViewLoader:
    """Batches of one epoch at a time: call `set_epoch`, then iterate. `len()` counts the batches of a whole epoch.

    Args:
        loader: torch's, of a `ViewDataset` or a `ViewStream`
        steps: batches per epoch
    """

    def __init__(self, loader: DataLoader, steps: int):
        self.loader = loader
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the next epoch and its first batch; call before iterating."""
        dataset = self.loader.dataset  # workers of a stream are new each epoch, and see what is set on it
        (dataset if is_stream(dataset) else self.loader.batch_sampler).set_epoch(epoch, start_batch)

    def read(self, indices: Sequence[int], epoch: int = 0) -> Batch:
        """Views of chosen images of a map-style data set, read in this process."""
        return _collate([self.loader.dataset[epoch, index] for index in indices])

    def __iter__(self) -> Iterator[Batch]:
        return iterate(self.loader)


def create_view_loader(
        dataset: Dataset,
        specs: Sequence[ViewSpec],
        batch_size: int,
        seed: int = 42,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        multiprocessing_context: Optional[str] = None,
) -> ViewLoader:
    """Create a loader of `Batch`es; except for streams, they are the same for any number of workers.

    Args:
        dataset: see `timm_cgh.data.sources.open_dataset`
        specs: the views of each image
        batch_size: per process
        seed: of the order and the views
        workers: worker processes, of one thread each
        rank, world_size: of this process
        pin_memory: whether batches are page-locked
        multiprocessing_context: `fork`, `spawn`, ...; default the platform's

    Raises:
        InputError: the data set has fewer images than one batch of all processes
    """
    count = num_images(dataset)
    steps = count // (batch_size * world_size)
    if steps == 0:
        processes = f' in each of {world_size} processes' if world_size > 1 else ''
        raise InputError(
            f'batch_size={batch_size}{processes}: the data set has only {count} images; '
            f'must be at most {count // world_size}')
    common = dict(
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        multiprocessing_context=multiprocessing_context if workers else None,
    )
    if is_stream(dataset):
        if hasattr(dataset, 'set_loader_cfg'):  # timm's readers divide the stream by the number of workers
            dataset.set_loader_cfg(num_workers=workers)
        stream = ViewStream(dataset, specs, seed, batch_size, steps, rank)
        return ViewLoader(DataLoader(stream, batch_size=batch_size, drop_last=True, **common), steps)
    sampler = EpochBatchSampler(count, batch_size, seed, rank, world_size)
    views = ViewDataset(dataset, specs, seed)
    loader = DataLoader(views, batch_sampler=sampler, persistent_workers=workers > 0, **common)
    return ViewLoader(loader, steps)

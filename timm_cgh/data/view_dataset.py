"""Views of the images of a data set, map-style or a stream, and the order in which they come."""
from dataclasses import dataclass, field
from typing import Any, Iterator, List, Sequence, Tuple

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from timm_cgh.errors import InputError, reason

from .decode import Decoding, dataset_decoding, read_or_substitute
from .labels import to_label
from .views import ViewSpec, cut_views

__all__ = ['EpochBatchSampler', 'ViewDataset', 'ViewStream']


@dataclass(eq=False)
class ViewDataset(Dataset):
    """Views of the images of a map-style data set, indexed by (epoch, index).

    An item is (views, photometric rows, target, index, names of unreadable images), see `Batch`. An image that cannot
    be read is replaced by one elsewhere in the data set (see `read_or_substitute`).

    Args:
        dataset: of (PIL image, target) items
        specs: the views of each image
        seed: of all random choices (see `timm_cgh.data.views`)
    """
    dataset: Dataset
    specs: Sequence[ViewSpec]
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Tuple[int, int]) -> Tuple:
        def cut(image: Any, decoding: Decoding):
            # a substitute too is cut by this key, so that its views differ from those under its own index
            return cut_views(image, self.specs, self.seed, *key, decoding)

        _, index = key
        (views, params), target, unreadable = read_or_substitute(self.dataset, index, cut)
        return views, params, target, index, unreadable


@dataclass(eq=False)
class EpochBatchSampler(Sampler):
    """Batches of (epoch, index) in an order that is a function of seed and epoch.

    The i-th batches of all processes together are the i-th block of one permutation, so N processes see what one
    process with N times the batch size would. The incomplete last batch is dropped. The epoch comes with each index,
    because persistent workers do not see attributes that are set on their data set later.

    Args:
        num_samples: images in the data set
        batch_size: images per batch and process
        seed: of the order
        rank, world_size: of this process
    """
    num_samples: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    epoch: int = field(default=0, init=False)
    start_batch: int = field(default=0, init=False)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the next epoch and its first batch; the images of the batches before it are not read."""
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for batch in range(self.start_batch, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[start:start + self.batch_size]]


@dataclass(eq=False)
class ViewStream(IterableDataset):
    """Views of the images of a stream (timm's `IterableImageDataset`), in the order of the stream.

    Each worker yields its share of the epoch's batches, and restarts its part of the stream where that ends early.

    Args:
        dataset: the stream
        specs, seed: see `ViewDataset`
        batch_size: per process
        steps: batches per epoch
        rank: of this process
    """
    dataset: IterableDataset
    specs: Sequence[ViewSpec]
    seed: int
    batch_size: int
    steps: int
    rank: int = 0
    epoch: int = field(default=0, init=False)
    start_batch: int = field(default=0, init=False)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the next epoch, which is shorter by `start_batch` batches."""
        self.epoch = epoch
        self.start_batch = start_batch
        if hasattr(self.dataset, 'set_epoch'):  # timm's streams shuffle by it
            self.dataset.set_epoch(epoch)

    def _images(self, worker: int) -> Iterator[Tuple]:
        while True:
            given = 0
            try:
                for item in self.dataset:
                    yield item[:2]
                    given += 1
            except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
                why = reason(error)
                if isinstance(error, KeyError):
                    why = f'no column {why}: see `input_key` and `target_key`'
                raise InputError(f'dataset: the stream fails ({why})') from error
            if not given:
                broken = self._take_unreadable()
                if broken:
                    raise InputError(f'dataset: no image of the stream can be read, {broken[0]} among them')
                raise InputError(
                    f'workers: the stream has no image for worker {worker}; all processes together may have at most as '
                    f'many workers as there are shards')

    def _take_unreadable(self) -> List[str]:
        """Names of the images skipped since the last call, where the reader has them."""
        names = getattr(getattr(self.dataset, 'reader', None), 'unreadable', [])
        taken = names[:]
        names.clear()
        return taken

    def __iter__(self) -> Iterator[Tuple]:
        info = torch.utils.data.get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        batches = len(range(self.start_batch + worker, self.steps, workers))  # the loader takes turns
        decoding = dataset_decoding(self.dataset)
        stream = self.rank * 4096 + worker  # no two workers draw the same random numbers
        for count, (image, target) in zip(range(batches * self.batch_size), self._images(worker)):
            index = (stream << 40) + count
            views, params = cut_views(image, self.specs, self.seed, self.epoch, index, decoding)
            yield views, params, to_label(target), -1, self._take_unreadable()

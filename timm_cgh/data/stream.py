"""Views of images that come as a stream (wds/, hfids/, tfds/)."""
from typing import Iterator, List, Sequence, Tuple

import torch
from torch.utils.data import IterableDataset

from timm_cgh.errors import InputError

from .decode import to_label
from .views import ViewSpec, cut_views

__all__ = ['ViewStream']


class ViewStream(IterableDataset):
    """Views of the images of a stream (timm's `IterableImageDataset`), in the order in which they come.

    Each worker gives its share of the epoch's batches, and goes round where its part of the stream ends before.

    Args:
        dataset: the stream
        specs, seed, mode: see `ViewDataset`
        batch_size: per process
        steps: batches per epoch
        rank: this process
    """

    def __init__(
            self,
            dataset: IterableDataset,
            specs: Sequence[ViewSpec],
            seed: int,
            batch_size: int,
            steps: int,
            mode: str = 'RGB',
            rank: int = 0,
    ):
        self.dataset = dataset
        self.specs = list(specs)
        self.seed = seed
        self.batch_size = batch_size
        self.steps = steps
        self.mode = mode
        self.rank = rank
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Which epoch comes next, and how many of its batches are done."""
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
                reason = ' '.join(str(error).split()) or type(error).__name__
                if isinstance(error, KeyError):
                    reason = f'no column {reason}: --input-key, --target-key'
                raise InputError(f'--dataset: the stream fails ({reason[:300]})') from error
            if not given:
                broken = self._unreadable()
                if broken:
                    raise InputError(f'--dataset: no image of the stream can be read, not even {broken[0]}')
                raise InputError(
                    f'--workers: the stream gives worker {worker} no image; take no more workers (of all processes) '
                    f'than there are shards')

    def _unreadable(self) -> List[str]:
        """Names of images passed over since the last call, where the reader has them."""
        names = getattr(getattr(self.dataset, 'reader', None), 'unreadable', [])
        taken = names[:]
        names.clear()
        return taken

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        batches = len(range(self.start_batch + worker, self.steps, workers))  # the loader asks its workers in turn
        stream = self.rank * 4096 + worker  # no two workers draw the same numbers
        for count, (image, target) in zip(range(batches * self.batch_size), self._images(worker)):
            index = (stream << 40) + count
            views, params = cut_views(image, self.specs, self.seed, self.epoch, index, self.mode)
            yield views, params, to_label(target), -1, self._unreadable()

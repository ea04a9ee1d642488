"""timm data set -> batches of uint8 views on the CPU -> normalised views on the training device."""
import logging
import signal
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from timm_cgh.errors import InputError

from .augment import photometric
from .sources import is_stream
from .views import ViewSpec, cut_views

__all__ = ['Batch', 'EpochBatchSampler', 'ViewDataset', 'ViewStream', 'ViewsToDevice', 'create_view_loader']

_logger = logging.getLogger('train')
_MAX_UNREADABLE = 10  # in a row, before a data set is given up
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class Batch(NamedTuple):
    """Views of a batch, photometric changes not yet made.

    views: per view (B, C, size, size) uint8; params: per view (B, 7) float32 or None; target: (B,) int64, -1 unknown;
    index: (B,) int64, -1 in streams; unreadable: names of images that were passed over.
    """
    views: List[torch.Tensor]
    params: List[Optional[torch.Tensor]]
    target: torch.Tensor
    index: torch.Tensor
    unreadable: List[str]


def _collate(samples: Sequence[Tuple]) -> Batch:
    views, params, targets, indices, unreadable = zip(*samples)
    return Batch(
        views=[torch.stack(view) for view in zip(*views)],
        params=[None if rows[0] is None else torch.stack(rows) for rows in zip(*params)],
        target=torch.tensor(targets),
        index=torch.tensor(indices),
        unreadable=[name for names in unreadable for name in names],
    )


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith('I;16') or image.mode == 'I':  # PIL clips 16-bit grey levels where it should scale them
        image = image.point(lambda value: value / 256).convert('L')
    return image if image.mode == mode else image.convert(mode)


def _label(target: Any) -> int:
    try:
        return int(target)
    except (TypeError, ValueError):  # none, or several
        return -1


class ViewDataset(Dataset):
    """Views of the images of a map-style data set, asked for by (epoch, index).

    An image that cannot be read is replaced by the next one, and named.

    Args:
        dataset: gives (PIL image, target) items
        specs: the views of each image
        seed: of all random choices (see `timm_cgh.data.views`)
        mode: PIL mode of the images
    """

    def __init__(self, dataset: Dataset, specs: Sequence[ViewSpec], seed: int, mode: str = 'RGB'):
        self.dataset = dataset
        self.specs = list(specs)
        self.seed = seed
        self.mode = mode

    def __len__(self) -> int:
        return len(self.dataset)

    def _read(self, dataset: Dataset, index: int) -> Tuple[Image.Image, int]:
        if isinstance(dataset, Subset):
            return self._read(dataset.dataset, dataset.indices[index])
        if hasattr(dataset, 'reader'):  # past timm's own item access, which replaces what it cannot read without a name
            file, target, *_ = dataset.reader[index]
            with file:
                return _to_mode(Image.open(file), self.mode), _label(target)
        image, target = dataset[index][:2]
        return _to_mode(image, self.mode), _label(target)

    def _name(self, dataset: Dataset, index: int) -> str:
        if isinstance(dataset, Subset):
            return self._name(dataset.dataset, dataset.indices[index])
        try:
            return str(dataset.filename(index)) or f'image {index}'
        except Exception:  # not every reader knows names
            return f'image {index}'

    def __getitem__(self, key: Tuple[int, int]):
        epoch, index = key
        unreadable: List[str] = []
        for step in range(_MAX_UNREADABLE):
            source = (index + step) % len(self.dataset)
            try:
                image, target = self._read(self.dataset, source)
                break
            except _UNREADABLE:
                unreadable.append(self._name(self.dataset, source))
        else:
            raise InputError(f'--data-dir: {_MAX_UNREADABLE} images in a row cannot be read, from {unreadable[0]} on')
        views, params = cut_views(image, self.specs, self.seed, epoch, index)
        return views, params, target, index, unreadable


class EpochBatchSampler(Sampler):
    """Batches of (epoch, index) in an order that is a function of seed and epoch.

    Batch i of all processes together is the i-th block of one permutation, and each process takes its part of the
    block: N processes see what a single one with the N-fold batch would. The incomplete last batch is left out.

    Args:
        num_samples: images in the data set
        batch_size: images per batch and process
        seed: of the order
        rank, world_size: this process, of how many
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Which epoch comes next, and from which of its batches on (no skipped image is read)."""
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


class ViewStream(IterableDataset):
    """Views of the images of a stream (timm's `IterableImageDataset`), in the order in which they come.

    Args:
        dataset: the stream
        specs, seed, mode: see `ViewDataset`
        rank: this process
        batch_size: the last incomplete batch of a worker is left out
    """

    def __init__(self, dataset: IterableDataset, specs: Sequence[ViewSpec], seed: int, mode: str, rank: int):
        self.dataset = dataset
        self.specs = list(specs)
        self.seed = seed
        self.mode = mode
        self.rank = rank
        self.epoch = 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        stream = self.rank * 4096 + worker  # no two workers draw the same numbers
        for count, (image, target, *_) in enumerate(self.dataset):
            index = (stream << 40) + count
            views, params = cut_views(_to_mode(image, self.mode), self.specs, self.seed, self.epoch, index)
            yield views, params, _label(target), -1, []


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process ends its workers itself
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


class _ViewLoader:
    """Iterable over one epoch's batches; `len()` is its steps."""

    def __init__(self, loader: DataLoader, steps: int):
        self.loader = loader
        self.steps = steps
        self.start_batch = 0

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the batch to start from; before iterating."""
        self.start_batch = start_batch
        dataset = self.loader.dataset
        if isinstance(dataset, ViewDataset):
            self.loader.batch_sampler.set_epoch(epoch, start_batch)
        else:  # its workers are started anew each epoch and see this
            dataset.epoch = epoch
            if hasattr(dataset.dataset, 'set_epoch'):
                dataset.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        remaining = self.steps - self.start_batch
        iterator = iter(self.loader)
        while remaining > 0:
            served = 0
            for batch in iterator:
                yield batch
                served += 1
                remaining -= 1
                if not remaining:
                    return
            if not served:
                raise InputError('--dataset: the stream gave no full batch; a smaller --batch-size or fewer --workers may do')
            iterator = iter(self.loader)  # a stream that ended early goes round


def create_view_loader(
        dataset: Dataset,
        specs: Sequence[ViewSpec],
        batch_size: int,
        seed: int = 42,
        mode: str = 'RGB',
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
) -> _ViewLoader:
    """Loader of `Batch`es of a training data set; the same batches for any number of workers (streams aside).

    Args:
        dataset: see `timm_cgh.data.sources.open_dataset`
        specs: the views of each image
        batch_size: per process
        seed: of order and views
        mode: PIL mode of the images
        workers: worker processes
        rank, world_size: this process, of how many
        pin_memory: page-locked batches

    Raises:
        InputError: fewer images than one batch of all processes
    """
    steps = len(dataset) // (batch_size * world_size)
    if steps == 0:
        raise InputError(
            f'--batch-size {batch_size}: the data set has {len(dataset)} images, not one batch'
            + (f' of {world_size} processes' if world_size > 1 else '') + '; take less')
    common = dict(
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )
    if is_stream(dataset):
        if hasattr(dataset, 'set_loader_cfg'):
            dataset.set_loader_cfg(num_workers=workers)
        stream = ViewStream(dataset, specs, seed, mode, rank)
        return _ViewLoader(DataLoader(stream, batch_size=batch_size, drop_last=True, **common), steps)
    sampler = EpochBatchSampler(len(dataset), batch_size, seed, rank, world_size)
    views = ViewDataset(dataset, specs, seed, mode)
    return _ViewLoader(DataLoader(views, batch_sampler=sampler, persistent_workers=workers > 0, **common), steps)


class ViewsToDevice:
    """Batch -> normalised float32 views on the training device, photometric changes made there.

    Args:
        mean, std: per channel, of pixels in [0, 1]
        device: where the views go
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: Union[str, torch.device]):
        self.device = torch.device(device)
        self.mean = torch.tensor(mean, device=self.device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(1, -1, 1, 1)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> List[torch.Tensor]:
        """Per view (B, C, size, size) float32."""
        return [
            photometric(view.to(self.device, non_blocking=True), params).sub_(self.mean).div_(self.std)
            for view, params in zip(batch.views, batch.params)
        ]

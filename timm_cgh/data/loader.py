"""timm data set -> batches of uint8 views on the CPU -> normalised views on the training device."""
from typing import Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from timm_cgh.errors import InputError

from .augment import photometric
from .decode import read_or_another
from .sources import is_stream, num_images
from .stream import ViewStream
from .views import ViewSpec, cut_views
from .workers import signals_held, start_worker

__all__ = [
    'Batch', 'EpochBatchSampler', 'ViewDataset', 'ViewLoader', 'ViewsToDevice', 'create_view_loader',
]


class Batch(NamedTuple):
    """Views of a batch, photometric changes not yet made.

    views: per view (B, C, size, size) uint8, in memory channels last; params: per view (B, 7) float32 or None;
    target: (B,) int64, -1 unknown; index: (B,) int64, -1 in streams; unreadable: names of images that were passed over.
    """
    views: List[torch.Tensor]
    params: List[Optional[torch.Tensor]]
    target: torch.Tensor
    index: torch.Tensor
    unreadable: List[str]


def _collate(samples: Sequence[Tuple]) -> Batch:
    views, params, targets, indices, unreadable = zip(*samples)
    return Batch(
        # stays channels last, and goes straight to shared memory in a worker
        views=[default_collate([v.permute(1, 2, 0) for v in view]).permute(0, 3, 1, 2) for view in zip(*views)],
        params=[None if rows[0] is None else torch.stack(rows) for rows in zip(*params)],
        target=torch.tensor(targets),
        index=torch.tensor(indices),
        unreadable=[name for names in unreadable for name in names],
    )


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

    def __getitem__(self, key: Tuple[int, int]):
        epoch, index = key

        def cut(image: Image.Image, mode: str):
            # drawn by the index asked for: a replacement does not look like its own turn in the epoch
            return cut_views(image, self.specs, self.seed, epoch, index, mode)

        (views, params), target, unreadable = read_or_another(self.dataset, index, self.mode, cut)
        return views, params, target, index, unreadable


class EpochBatchSampler(Sampler):
    """Batches of (epoch, index) in an order that is a function of seed and epoch.

    Batch i of all processes together is the i-th block of one permutation, and each process takes its part of the
    block: N processes see what a single one with the N-fold batch would. The incomplete last batch is left out.
    The epoch travels with the index, since workers that persist never see what is set on their data set.

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


class ViewLoader:
    """Batches of one epoch after another: `set_epoch`, then iterate; `len()` is the steps of a whole epoch.

    Args:
        loader: torch's, over a `ViewDataset` or a `ViewStream`
        steps: batches per epoch
    """

    def __init__(self, loader: DataLoader, steps: int):
        self.loader = loader
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the batch to start from; before iterating."""
        dataset = self.loader.dataset  # a stream's workers start anew each epoch and so see what is set on it
        (dataset if is_stream(dataset) else self.loader.batch_sampler).set_epoch(epoch, start_batch)

    def __iter__(self) -> Iterator[Batch]:
        with signals_held():
            iterator = iter(self.loader)
        try:
            yield from iterator
        except Exception as error:
            # Left to the garbage collector (error and traceback hold each other), the workers' queues would be closed
            # before the workers are told to end, and the exit would wait for them.
            if self.loader.num_workers:
                iterator._shutdown_workers()
                self.loader._iterator = None
            if isinstance(error, InputError):  # a worker's comes wrapped in its traceback
                raise InputError(str(error).rpartition('InputError: ')[2].strip()) from None
            raise


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
        persistent: bool = True,
        multiprocessing_context: Optional[str] = None,
) -> ViewLoader:
    """Loader of `Batch`es of a training data set; the same batches for any number of workers (streams aside).

    Args:
        dataset: see `timm_cgh.data.sources.open_dataset`
        specs: the views of each image
        batch_size: per process
        seed: of order and views
        mode: PIL mode of the images
        workers: worker processes, of one thread each
        rank, world_size: this process, of how many
        pin_memory: page-locked batches
        persistent: keep the workers from epoch to epoch (map-style)
        multiprocessing_context: `fork`, `spawn`, ...; default the platform's

    Raises:
        InputError: fewer images than one batch of all processes
    """
    count = num_images(dataset)
    steps = count // (batch_size * world_size)
    if steps == 0:
        of_all = f' of each of {world_size} processes' if world_size > 1 else ''
        raise InputError(
            f'--batch-size {batch_size}{of_all}: the data set has {count} images, not one batch; '
            f'at most {count // world_size} would do')
    common = dict(
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        multiprocessing_context=multiprocessing_context if workers else None,
    )
    if is_stream(dataset):
        if hasattr(dataset, 'set_loader_cfg'):  # timm's readers divide the stream by it
            dataset.set_loader_cfg(num_workers=workers)
        stream = ViewStream(dataset, specs, seed, batch_size, steps, mode, rank)
        return ViewLoader(DataLoader(stream, batch_size=batch_size, drop_last=True, **common), steps)
    sampler = EpochBatchSampler(count, batch_size, seed, rank, world_size)
    views = ViewDataset(dataset, specs, seed, mode)
    loader = DataLoader(views, batch_sampler=sampler, persistent_workers=persistent and workers > 0, **common)
    return ViewLoader(loader, steps)


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
            photometric(view.to(self.device, non_blocking=True), params, self.mean, self.std)
            for view, params in zip(batch.views, batch.params)
        ]

    def prefetch(self, loader: Iterable[Batch]) -> Iterator[Tuple[Batch, List[torch.Tensor]]]:
        """Each batch with its views; on a GPU the next ones travel and are augmented while it works on these."""
        if self.device.type != 'cuda':
            for batch in loader:
                yield batch, self(batch)
            return
        stream, ready = torch.cuda.Stream(self.device), None
        for batch in loader:
            current = torch.cuda.current_stream(self.device)
            stream.wait_stream(current)  # the step before last may still read the memory that these views will reuse
            with torch.cuda.stream(stream):
                views = self(batch)
            if ready is not None:
                yield ready
            current.wait_stream(stream)
            ready = batch, views
        if ready is not None:
            yield ready

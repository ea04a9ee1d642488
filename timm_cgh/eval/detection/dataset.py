"""Annotated images as torchvision's detectors take them, and batches of them."""
from itertools import count
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from timm_cgh.data import image_mode
from timm_cgh.data.decode import to_mode
from timm_cgh.data.workers import iterate, start_worker
from timm_cgh.distributed import Process
from timm_cgh.errors import InputError

from .annotations import Annotations, decode_mask

__all__ = ['DetectionImages', 'load_batches', 'shape_groups', 'training_batches', 'training_transform']

Target = Dict[str, torch.Tensor]


class DetectionImages(Dataset):
    """Images of a split, (C, H, W) uint8, and their objects: `boxes` (N, 4) x1, y1, x2, y2 in px, `labels` (N,) from 1,
    and `masks` (N, H, W) where asked for. An item whose file cannot be read raises an `InputError`.

    Args:
        annotations: of the split
        objects: of each image (see `training_objects`); None for images alone
        in_chans: 3 or 1
        masks: decode them

    Raises:
        InputError: other channels
    """

    def __init__(
            self,
            annotations: Annotations,
            objects: Optional[Sequence[List[Dict[str, Any]]]] = None,
            in_chans: int = 3,
            masks: bool = False,
    ):
        self.entries = annotations.content['images']
        self.read = annotations.read
        self.objects = objects or [[] for _ in self.entries]
        if in_chans not in (1, 3):
            raise InputError(f'in_chans={in_chans}: detectors take 3 (colour) or 1 (grey)')
        self.mode = image_mode(in_chans)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Target]:
        entry, objects = self.entries[index], self.objects[index]
        image = tv_tensors.Image(to_mode(self.read(entry), self.mode))
        size = entry['height'], entry['width']
        boxes = torch.tensor([item['box'] for item in objects], dtype=torch.float32).view(-1, 4)
        target = dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size),
            labels=torch.tensor([item['label'] for item in objects], dtype=torch.int64),
        )
        if self.masks:
            masks = [decode_mask(item['segmentation'], *size) for item in objects]
            target['masks'] = tv_tensors.Mask(np.stack(masks) if masks else np.zeros((0, *size), np.uint8))
        return image, target


class _Items(Dataset):
    """Items by (step, index), transformed by a function of seed, step and index alone."""

    def __init__(self, images: DetectionImages, transform: Optional[v2.Transform], seed: int):
        self.images = images
        self.transform = transform or v2.Identity()
        self.seed = seed

    def __getitem__(self, key: Tuple[int, int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, *key)))
            return self.transform(*self.images[key[1]])


def load_batches(
        images: DetectionImages,
        keys: Iterable[List[Tuple[int, int]]],
        device: torch.device,
        workers: int = 0,
        transform: Optional[v2.Transform] = None,
        seed: int = 0,
) -> Iterator[Tuple[List[torch.Tensor], List[Target]]]:
    """Batches of plain float32 images (C, H, W) in [0, 1] and plain targets.

    Args:
        images: to load
        keys: (step, index) of the images of each batch; what is random is a function of these and the seed
        device, workers: device of the batches, number of data workers
        transform, seed: see `training_transform`

    Raises:
        InputError: an image cannot be read
    """
    def plain(value: torch.Tensor) -> torch.Tensor:
        return value.as_subclass(torch.Tensor).to(device, non_blocking=True)

    loader = DataLoader(
        _Items(images, transform, seed), batch_sampler=keys, num_workers=workers, collate_fn=list,
        worker_init_fn=start_worker, pin_memory=device.type == 'cuda')
    for batch in iterate(loader):
        yield (
            [v2.functional.to_dtype(plain(image), scale=True) for image, _ in batch],
            [{name: plain(value) for name, value in target.items()} for _, target in batch],
        )


def training_transform(min_size: Sequence[int], max_size: int, hflip: float) -> v2.Transform:
    """Flip with a probability, and a short side drawn from some (px), of an image with its boxes and masks."""
    return v2.Compose([v2.RandomHorizontalFlip(hflip), v2.RandomShortestSize(list(min_size), max_size)])


def shape_groups(
        wide: Dict[int, bool],
        batch_size: int,
        seed: int,
        steps: range,
        process: Process = Process(),
) -> Iterator[List[Tuple[int, int]]]:
    """Batches of either wide or tall images, which need less padding, as (step, index) of their images.

    Endless epochs, each in its own order. The batches of all processes together do not depend on their number, and a
    later step is reached without loading what comes before.

    Args:
        wide: index of each image to draw from -> whether it is wider than tall
        batch_size: per process
        seed: of the order
        steps: whose batches to give
        process: this process, which gets its share of each batch
    """
    indices, step = list(wide), 0
    waiting: Dict[bool, List[int]] = {False: [], True: []}
    for epoch in count():
        generator = torch.Generator().manual_seed(hash((seed, epoch)))
        for place in torch.randperm(len(indices), generator=generator).tolist():
            group = waiting[wide[indices[place]]]
            group.append(indices[place])
            if len(group) < batch_size * process.world_size:
                continue
            if step >= steps.stop:
                return
            if step in steps:
                yield [(step, index) for index in group[process.rank::process.world_size]]
            step += 1
            group.clear()


def training_batches(
        images: DetectionImages,
        transform: v2.Transform,
        steps: range,
        batch_size: int,
        seed: int = 42,
        workers: int = 0,
        process: Process = Process(),
) -> Iterator[Tuple[List[torch.Tensor], List[Target]]]:
    """Batches of images with objects for some steps; see `load_batches` and `shape_groups`."""
    wide = {i: entry['width'] > entry['height'] for i, entry in enumerate(images.entries) if images.objects[i]}
    keys = shape_groups(wide, batch_size, seed, steps, process)
    return load_batches(images, keys, process.device, workers, transform, seed)

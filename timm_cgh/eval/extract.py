"""Features of a whole data set, by all processes together."""
import argparse
import logging
import sys
import time
from datetime import timedelta
from typing import Any, Dict, Iterable, Iterator, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from timm.utils import is_primary
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_cgh.data import image_mode
from timm_cgh.data.decode import read_or_another

from .features import create_eval_loader, extract_features

__all__ = ['extract_distributed', 'gather_rows']

_logger = logging.getLogger('eval')


def block_indices(count: int, size: int, rank: int, world_size: int) -> torch.Tensor:
    """Indices of every `world_size`-th block of `size` rows: the same blocks, whatever the number of processes."""
    blocks = torch.arange(count).split(size)[rank::world_size]
    return torch.cat(blocks) if blocks else torch.arange(0)


def gather_rows(
        rows: torch.Tensor,
        count: int,
        size: int,
        device: torch.device,
        chunk_bytes: int = 2 ** 26,
) -> torch.Tensor:
    """Rows of all processes in their order, on every process; each has the rows of `block_indices`.

    Args:
        rows: (n, ...) of this process, CPU
        count: rows in all
        size: of a block
        device: what the process group communicates with
        chunk_bytes: of this process sent at a time, which bounds the memory on the device

    Returns:
        (count, ...) on the CPU
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size == 1:
        return rows
    places = [block_indices(count, size, rank, world_size) for rank in range(world_size)]
    out = rows.new_empty((count, *rows.shape[1:]))
    step = max(1, chunk_bytes // max(1, rows[0:1].nbytes or out[0:1].nbytes))
    for start in range(0, max(map(len, places)), step):
        stop = min(start + step, max(map(len, places)))
        mine = rows.new_zeros((stop - start, *rows.shape[1:]))  # padded where this process has fewer; not read below
        part = rows[start:stop]
        mine[:len(part)] = part
        all_rows = torch.empty((world_size * len(mine), *mine.shape[1:]), dtype=mine.dtype, device=device)
        dist.all_gather_into_tensor(all_rows, mine.to(device))
        for place, theirs in zip(places, all_rows.cpu().split(len(mine))):
            place = place[start:stop]
            out[place] = theirs[:len(place)]
    return out


class _Share(Dataset):
    """This process's images of a data set; in place of an unreadable one another, whoever asks."""

    def __init__(self, dataset: Dataset, indices: torch.Tensor, mode: str, name_unreadable: bool):
        self.dataset = dataset
        self.indices = indices
        self.mode = mode
        self.name_unreadable = name_unreadable

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        image, label, unreadable = read_or_another(self.dataset, int(self.indices[index]), self.mode)
        for name in unreadable if self.name_unreadable else ():
            _logger.warning(f'Unreadable image, another one stands in for it: {name}')
        return image, label


def _with_progress(batches: Iterable, total: int, silent: bool) -> Iterator:
    """The batches, with a bar on a terminal, lines elsewhere."""
    bar = sys.stderr.isatty()
    began = said = time.monotonic()
    for done, batch in enumerate(tqdm(batches, total=total, desc='features', unit='batch', leave=False,
                                      disable=silent or not bar), start=1):
        yield batch
        now = time.monotonic()
        if not silent and not bar and now - said > 10:
            said = now
            left = timedelta(seconds=round((now - began) / done * (total - done)))
            _logger.info(f'features [{done}/{total}], ETA {left}')


def extract_distributed(
        model: nn.Module,
        dataset: Dataset,
        data_config: Dict[str, Any],
        args: argparse.Namespace,
        device: torch.device,
        name_unreadable: bool = True,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Features of a data set, each image once, the work shared among all processes.

    Batches are those of a single process, whatever the number of processes: the features are the same to the last bit.

    Args:
        model: see `extract_features`, on `device`
        dataset: map-style, (PIL image, label) items
        data_config: see `create_eval_loader`
        args: `batch_size`, `workers`, `amp`, `amp_dtype`, `channels_last`, and what `init_run` sets
        device: of this process
        name_unreadable: warn of each image that another stands in for

    Returns:
        (N, D) float32 features and (N,) int64 labels on the CPU, in the order of the data set, on every process
    """
    count, size = len(dataset), args.batch_size
    indices = block_indices(count, size, args.rank, args.world_size)
    share = _Share(dataset, indices, image_mode(data_config['input_size'][0]), name_unreadable)
    features = labels = None
    if len(indices):
        loader = create_eval_loader(share, data_config, batch_size=size, workers=args.workers, device=device)
        features, labels = extract_features(
            model,
            _with_progress(loader, len(loader), silent=not is_primary(args)),
            device,
            amp_dtype=getattr(torch, args.amp_dtype) if args.amp else None,
            channels_last=args.channels_last,
        )
    if args.distributed:
        width = torch.tensor(features.shape[1] if len(indices) else 0, device=device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        if not len(indices):  # fewer batches than processes
            features, labels = torch.empty(0, int(width)), torch.empty(0, dtype=torch.long)
    return gather_rows(features, count, size, device), gather_rows(labels, count, size, device)

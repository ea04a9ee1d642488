"""The data path relative to the official recipe, and training relative to its step and its loader."""
import argparse
import itertools
import random
import statistics
import time
from typing import Any, Callable, Dict, Iterator, Sequence

import torch
from PIL import Image, ImageFilter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from timm_cgh.data import Batch, ViewLoader, ViewsToDevice, create_view_loader, is_stream, open_dataset, two_views
from timm_cgh.data.decode import decode_pixels, read_image, simplejpeg
from timm_cgh.errors import InputError

from .step import CGHStep
from .timing import median_ratio, random_images, timed

__all__ = ['benchmark_data', 'benchmark_e2e']


def open_images(args: argparse.Namespace) -> Dataset:
    dataset = open_dataset(args.dataset, args.data_dir, args.split, split_parameter='split')
    if is_stream(dataset):
        raise InputError(f'dataset={args.dataset}: must not be a stream')
    return dataset


def pillow_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


class OfficialViews(Dataset):
    """The authors' two views of each image: Pillow and torchvision, image by image, up to normalised floats."""

    def __init__(self, dataset, size):
        self.dataset = dataset
        self.weak, self.contrastive = (
            transforms.Compose([
                transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
                *photometric,
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]) for photometric in ((), (
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([pillow_blur], p=0.5),
            )))

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, _ = read_image(self.dataset, index, 'RGB', lambda image, decoding: image.convert(decoding.mode))
        return self.weak(image), self.contrastive(image)


def _charge(spent: Dict[str, float], name: str, function: Callable, *args: Any) -> Any:
    """Call a function and add its CPU seconds to those of `name`."""
    began = time.process_time()
    result = function(*args)
    spent[name] += time.process_time() - began
    return result


def _decode(dataset: Dataset, indices: Sequence[int]) -> None:
    for index in indices:
        read_image(dataset, index, 'RGB', decode_pixels)


def benchmark_data(args: argparse.Namespace) -> Dict[str, Any]:
    """CPU milliseconds per image, in one thread, of the authors' recipe and of ours, from the same files.

    Each ends with a batch: theirs of normalised floats; ours of 8-bit views ready for the device, and of normalised
    floats where the device's work is done on the same core. The floor only decodes the images.
    """
    dataset = open_images(args)
    dataset = Subset(dataset, range(min(args.images, len(dataset))))
    loader = create_view_loader(dataset, two_views(args.img_size), args.batch_size)
    official = DataLoader(OfficialViews(dataset, args.img_size), args.batch_size, drop_last=True)
    to_device = ViewsToDevice(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, 'cpu')
    torch.set_num_threads(1)
    rows = {
        'official': 'official recipe',
        'uint8': 'ours, photometric work left to the device',
        'whole': 'ours, photometric work on the same core',
        'decode': 'floor: full decode alone',
    }
    ms = {name: [] for name in rows}
    for turn in range(args.turns + 1):
        spent = dict.fromkeys(rows, 0.0)
        loader.set_epoch(turn)
        ours, theirs = iter(loader), iter(official)
        for _ in range(len(loader)):  # batch by batch in turn, so that other load of the machine affects all of them
            _charge(spent, 'official', next, theirs)
            batch = _charge(spent, 'uint8', next, ours)
            _charge(spent, 'whole', to_device, batch)
            _charge(spent, 'decode', _decode, dataset, batch.index.tolist())
        spent['whole'] += spent['uint8']
        for name in rows if turn else ():  # the first turn warms up
            ms[name].append(1000 * spent[name] / (len(loader) * args.batch_size))
    decoder = 'simplejpeg' if simplejpeg else 'Pillow'
    print(f'{len(dataset)} images, two views of {args.img_size} px, decoded by {decoder}')
    print(f'{"":42}  ms/image  images/s  x official')
    medians = {name: statistics.median(values) for name, values in ms.items()}
    ratio = {name: median_ratio(ms['official'], values) for name, values in ms.items()}
    for name, text in rows.items():
        print(f'{text:42}  {medians[name]:8.2f}  {1000 / medians[name]:8.0f}  {ratio[name]:10.2f}')
    return dict(decoder=decoder, cpu_ms_per_image=medians, times_official=ratio, turns=ms)


def _epochs(loader: ViewLoader) -> Iterator[Batch]:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def benchmark_e2e(args: argparse.Namespace) -> Dict[str, Any]:
    """Images per second of training as in `train.py`, of its step on synthetic views, and of its loader."""
    device, size = torch.device(args.device), args.batch_size
    dataset = open_images(args)
    ahead = 2 * args.workers + 2  # batches already loaded when a turn begins, which are not timed
    count = max(size * (args.repeats + ahead), len(dataset))  # not too short an epoch
    loader = create_view_loader(
        Subset(dataset, [i % len(dataset) for i in range(count)]), two_views(args.img_size), size,
        workers=args.workers, pin_memory=device.type == 'cuda')
    to_device = ViewsToDevice(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, device)
    step, batches = CGHStep(args), _epochs(loader)
    views, prefetched = [random_images(args)] * 2, to_device.prefetch(batches)
    steps = {
        'synthetic': lambda: step(views),
        'loader': lambda: next(batches),
        'e2e': lambda: step(next(prefetched)[1]),
    }
    rate = {name: [] for name in steps}
    for turn in range(args.turns + 1):
        for name, run in steps.items():
            for _ in range(1 if name == 'synthetic' else ahead):
                run()
            seconds = timed(run, device, args.repeats)
            if turn:  # the first turn warms up
                rate[name].append(size / seconds)
    bound = [min(pair) for pair in zip(rate['synthetic'], rate['loader'])]
    medians = {name: statistics.median(values) for name, values in rate.items()}
    of_synthetic, of_the_slower = (median_ratio(rate['e2e'], other) for other in (rate['synthetic'], bound))
    print(f'{args.model} {args.img_size} px, batch {size}, {args.workers} workers, {device}: images/s ' + ', '.join(
        f'{name} {value:.1f}' for name, value in medians.items()))
    print(f'end to end: {of_synthetic:.3f} of synthetic, {of_the_slower:.3f} of the slower of both')
    return dict(images_per_s=medians, of_synthetic=of_synthetic, of_the_slower=of_the_slower, turns=rate)

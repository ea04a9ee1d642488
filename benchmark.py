#!/usr/bin/env python3
"""What CGH costs beside what it could cost: the step, the data path, both together, kNN.

    python benchmark.py step --model resnet18 --img-size 64 --batch-size 64 --bank-size 16384
    python benchmark.py data --data-dir images/ --img-size 224          # folder, tar or hfds
    python benchmark.py e2e --data-dir images/ --model resnet50 --img-size 224 --batch-size 256 --workers 8
    python benchmark.py knn                                             # needs faiss-cpu

What is compared is timed in turn in one process; the figure to quote is the median of the ratios.
"""
import argparse
import copy
import itertools
import json
import os
import platform
import random
import resource
import statistics
import sys
import time
from contextlib import nullcontext

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # as train.py and the eval scripts do, and for both sides

import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from timm_cgh import create_task
from timm_cgh.arguments import Parser, at_least_one, natural
from timm_cgh.data import ViewsToDevice, create_view_loader, is_stream, open_dataset, two_views
from timm_cgh.data.decode import decode_pixels, read_image, simplejpeg
from timm_cgh.errors import InputError
from timm_cgh.eval import knn_predict
from timm_cgh.models import create_backbone


def median_ratio(numerators, denominators):
    return statistics.median(n / d for n, d in zip(numerators, denominators))


def timed(step, device, repeats):
    """Seconds per call, over `repeats` calls."""
    synchronize = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize()
    return (time.perf_counter() - began) / repeats


def autocast(args, device):
    return torch.autocast(device.type, dtype=torch.bfloat16) if args.amp else nullcontext()


def floor_step(args, device, images):
    student = create_backbone(args.model, img_size=args.img_size).to(device).train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    if args.channels_last:
        student.to(memory_format=torch.channels_last)
        teacher.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step():
        with autocast(args, device):
            with torch.no_grad():
                teacher(images)
            loss = student(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cgh_step(args, device):
    task = create_task(args.model, context=args.context, bank_size=args.bank_size, img_size=args.img_size)
    task.to(device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.torchcompile:
        task.compile()
    optimizer = create_optimizer_v2(task.student, 'momentum', lr=0.01, weight_decay=1e-4, foreach=True)

    def step(views):
        with autocast(args, device):
            loss = task(views)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()

    return step


def benchmark_step(args):
    """Milliseconds of a CGH step and of its floor, and peak memory.

    The floor is student forward + backward + SGD and teacher forward, nothing else, with torch's own defaults.
    """
    device = torch.device(args.device)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    if args.channels_last:
        images = images.to(memory_format=torch.channels_last)
    cgh = cgh_step(args, device)
    steps = {'floor': floor_step(args, device, images), 'cgh': lambda: cgh([images, images])}
    for step in steps.values():
        timed(step, device, 2)  # warm up
    seconds = {name: [] for name in steps}
    for _ in range(args.turns):
        for name, step in steps.items():
            seconds[name].append(timed(step, device, args.repeats))
    on_gpu = device.type == 'cuda'
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = dict(
        floor_ms=1000 * statistics.median(seconds['floor']),
        cgh_ms=1000 * statistics.median(seconds['cgh']),
        ratio=median_ratio(seconds['cgh'], seconds['floor']),
        images_per_s=args.batch_size / statistics.median(seconds['cgh']),
        peak_memory_mib=peak / 2 ** 20,  # of the process on a CPU, libraries included
        seconds=seconds,
    )
    print(
        f'{args.model} {args.img_size} px, batch {args.batch_size}, bank {args.bank_size}: '
        f"step {result['cgh_ms']:.1f} ms, floor {result['floor_ms']:.1f} ms, ratio {result['ratio']:.2f}, "
        f"{result['images_per_s']:.1f} images/s, peak {result['peak_memory_mib']:.0f} MiB")
    return result


def open_images(args):
    dataset = open_dataset(args.dataset, args.data_dir, args.split)
    if is_stream(dataset):
        raise InputError(f'--dataset {args.dataset}: must have its images in an order of their own; this is a stream')
    return dataset


def pillow_blur(image):
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


class OfficialViews(Dataset):
    """The authors' two views of each image: Pillow and torchvision, image by image, up to normalised floats."""

    def __init__(self, dataset, size):
        self.dataset = dataset
        crop = [transforms.RandomResizedCrop(size, scale=(0.2, 1.0))]
        end = [
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
        self.weak = transforms.Compose(crop + end)
        self.contrastive = transforms.Compose(crop + [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([pillow_blur], p=0.5),
        ] + end)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, _ = read_image(self.dataset, index, 'RGB', Image.Image.convert)
        return self.weak(image), self.contrastive(image)


def benchmark_data(args):
    """CPU milliseconds per image, in one thread, of the authors' recipe and of ours, from the same files.

    Either ends with a batch: theirs of normalised floats; ours of 8-bit views, ready for the device, and after the work
    that is left to the device, done here. The floor decodes the images and does no more.
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

        def charge(name, work):
            began = time.process_time()
            result = work()
            spent[name] += time.process_time() - began
            return result

        loader.set_epoch(turn)
        ours, theirs = iter(loader), iter(official)
        for _ in range(len(loader)):  # batch by batch in turn: what else the machine does meets all alike
            charge('official', lambda: next(theirs))
            batch = charge('uint8', lambda: next(ours))
            charge('whole', lambda: to_device(batch))
            charge('decode', lambda: [read_image(dataset, i, 'RGB', decode_pixels) for i in batch.index.tolist()])
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


def benchmark_e2e(args):
    """Images per second of training as `train.py` does it, of its step on views that lie ready, and of its loader."""
    device, size = torch.device(args.device), args.batch_size
    dataset = open_images(args)
    ahead = 2 * args.workers + 2  # batches that lie ready when a turn begins: not timed
    wanted = size * (args.repeats + ahead)
    dataset = Subset(dataset, [i % len(dataset) for i in range(max(wanted, len(dataset)))])  # epochs of some length
    loader = create_view_loader(
        dataset, two_views(args.img_size), size, workers=args.workers, pin_memory=device.type == 'cuda')
    to_device = ViewsToDevice(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, device)

    def epochs():
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            yield from loader

    step, batches = cgh_step(args, device), epochs()
    fixed = [torch.randn(size, 3, args.img_size, args.img_size, device=device) for _ in range(2)]
    prefetched = to_device.prefetch(batches)
    ways = {
        'synthetic': lambda: step(fixed),
        'loader': lambda: next(batches),
        'e2e': lambda: step(next(prefetched)[1]),
    }
    rate = {name: [] for name in ways}
    for turn in range(args.turns + 1):
        for name, way in ways.items():
            for _ in range(1 if name == 'synthetic' else ahead):
                way()
            seconds = timed(way, device, args.repeats)
            if turn:  # the first turn warms up
                rate[name].append(size / seconds)
    bound = [min(pair) for pair in zip(rate['synthetic'], rate['loader'])]
    result = dict(
        images_per_s={name: statistics.median(values) for name, values in rate.items()},
        of_synthetic=median_ratio(rate['e2e'], rate['synthetic']),
        of_the_slower=median_ratio(rate['e2e'], bound),
        turns=rate,
    )
    print(f'{args.model} {args.img_size} px, batch {size}, {args.workers} workers, {device}: images/s ' + ', '.join(
        f'{name} {value:.1f}' for name, value in result['images_per_s'].items()))
    print(f"end to end: {result['of_synthetic']:.3f} of synthetic, {result['of_the_slower']:.3f} of the slower of both")
    return result


def benchmark_knn(args, queries=10000, images=50000, width=512, classes=1000, ks=(10, 20, 100, 200), temp=0.07):
    """Seconds of `knn_predict` and of faiss-cpu's exact search followed by the same vote, in turn, from raw features.

    Returns:
        dict of the medians, the median of the ratios, and how many of the predictions differ (ties in float32)
    """
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    labels, truth = (torch.randint(classes, (n,), generator=generator) for n in (images, queries))
    train, test = (centres[y] + 4 * torch.randn(len(y), width, generator=generator) for y in (labels, truth))

    def with_faiss():
        index = faiss.IndexFlatIP(width)
        index.add(F.normalize(train).numpy())
        similarity, found = index.search(F.normalize(test).numpy(), max(ks))
        similarity, voter = torch.from_numpy(similarity).double(), labels[torch.from_numpy(found)]
        weight = ((similarity - similarity[:, :1]) / temp).exp()
        votes, done, predictions = weight.new_zeros(queries, classes), 0, {}
        for k in ks:
            votes.scatter_add_(1, voter[:, done:k], weight[:, done:k])
            predictions[k], done = votes.argmax(dim=1), k
        return predictions

    ways = {'ours': lambda: knn_predict(train, labels, test, ks, temp), 'faiss': with_faiss}
    seconds, predictions = {name: [] for name in ways}, {}
    for _ in range(args.turns):
        for name, way in ways.items():
            began = time.perf_counter()
            predictions[name] = way()
            seconds[name].append(time.perf_counter() - began)
    result = dict(
        knn_s=statistics.median(seconds['ours']),
        faiss_s=statistics.median(seconds['faiss']),
        ratio=median_ratio(seconds['ours'], seconds['faiss']),
        differing={k: int((predictions['ours'][k] != predictions['faiss'][k]).sum()) for k in ks},
        seconds=seconds,
        threads=torch.get_num_threads(),
        faiss=faiss.__version__,
    )
    print(f"kNN {result['knn_s']:.2f} s, faiss {result['faiss_s']:.2f} s, ratio {result['ratio']:.2f}")
    return result


COMMANDS = {'step': benchmark_step, 'data': benchmark_data, 'e2e': benchmark_e2e, 'knn': benchmark_knn}

parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(dest='what', required=True)
for what, function in COMMANDS.items():
    sub = commands.add_parser(what, description=function.__doc__)
    sub.add_argument('--turns', type=at_least_one, default=7)
    sub.add_argument('--json', metavar='FILE')
    if what == 'knn':
        continue
    sub.add_argument('--img-size', type=at_least_one, default=64 if what == 'step' else 224)
    sub.add_argument('--batch-size', type=at_least_one, default=50 if what == 'data' else 64)
    if what != 'step':
        sub.add_argument('--data-dir', metavar='DIR', help='as in train.py')
        sub.add_argument('--dataset', metavar='NAME', default='', help='as in train.py')
        sub.add_argument('--split', metavar='NAME', default='train')
    if what == 'data':
        sub.add_argument('--images', type=at_least_one, default=1000, help='per turn, at most')
        continue
    sub.add_argument('--model', default='resnet18')
    sub.add_argument('--bank-size', type=at_least_one, default=16384)
    sub.add_argument('--context', default='cross')
    sub.add_argument('--repeats', type=at_least_one, default=5, help='steps per turn')
    sub.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    sub.add_argument('--amp', action='store_true', help='bfloat16')
    sub.add_argument('--channels-last', action='store_true')
    sub.add_argument('--torchcompile', action='store_true')
    if what == 'e2e':
        sub.add_argument('--workers', type=natural, default=min(4, os.cpu_count() or 1))


def main(argv=None):
    args = parser.parse_args(argv)
    result = COMMANDS[args.what](args)
    on_gpu = torch.device(getattr(args, 'device', 'cpu')).type == 'cuda'
    result.update(
        options=vars(args),
        processor=torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
    )
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as file:
            json.dump(result, file, indent=2)
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))

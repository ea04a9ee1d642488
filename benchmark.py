#!/usr/bin/env python3
"""What a CGH step costs beside the bare backbone, and kNN beside faiss.

    python benchmark.py step --model resnet18 --img-size 64 --batch-size 64 --bank-size 16384
    python benchmark.py knn                                             # needs faiss-cpu

`floor` is student forward + backward + SGD and teacher forward, nothing else, with torch's own defaults. What is
compared is timed in turn in one process; the figure to quote is the median of the ratios.
"""
import copy
import json
import os
import platform
import resource
import statistics
import sys
import time
from contextlib import nullcontext

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # as train.py and the eval scripts do, and for both sides

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from timm_cgh import create_task
from timm_cgh.arguments import Parser, at_least_one
from timm_cgh.eval import knn_predict
from timm_cgh.models import create_backbone


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


def cgh_step(args, device, images):
    task = create_task(args.model, context=args.context, bank_size=args.bank_size, img_size=args.img_size)
    task.to(device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.torchcompile:
        task.compile()
    optimizer = create_optimizer_v2(task.student, 'momentum', lr=0.01, weight_decay=1e-4, foreach=True)

    def step():
        with autocast(args, device):
            loss = task([images, images])['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()

    return step


def benchmark_knn(turns=5, queries=10000, images=50000, width=512, classes=1000, ks=(10, 20, 100, 200), temp=0.07):
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
    for _ in range(turns):
        for name, way in ways.items():
            began = time.perf_counter()
            predictions[name] = way()
            seconds[name].append(time.perf_counter() - began)
    return dict(
        knn_s=statistics.median(seconds['ours']),
        faiss_s=statistics.median(seconds['faiss']),
        ratio=statistics.median(o / f for o, f in zip(seconds['ours'], seconds['faiss'])),
        differing={k: int((predictions['ours'][k] != predictions['faiss'][k]).sum()) for k in ks},
        seconds=seconds,
        threads=torch.get_num_threads(),
        faiss=faiss.__version__,
    )


def parse():
    parser = Parser(description=__doc__)
    parser.add_argument('what', choices=('step', 'knn'))
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--img-size', type=at_least_one, default=64)
    parser.add_argument('--batch-size', type=at_least_one, default=64)
    parser.add_argument('--bank-size', type=at_least_one, default=16384)
    parser.add_argument('--context', default='cross')
    parser.add_argument('--turns', type=at_least_one, default=7)
    parser.add_argument('--repeats', type=at_least_one, default=5, help='steps per turn')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--torchcompile', action='store_true')
    parser.add_argument('--json', metavar='FILE')
    return parser.parse_args()


def benchmark_step(args):
    """Milliseconds of a CGH step and of its floor, peak memory, and the machine."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    if args.channels_last:
        images = images.to(memory_format=torch.channels_last)
    steps = {'floor': floor_step(args, device, images), 'cgh': cgh_step(args, device, images)}
    for step in steps.values():
        timed(step, device, 2)  # warm up
    seconds = {name: [] for name in steps}
    for _ in range(args.turns):
        for name, step in steps.items():
            seconds[name].append(timed(step, device, args.repeats))
    on_gpu = device.type == 'cuda'
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(
        floor_ms=1000 * statistics.median(seconds['floor']),
        cgh_ms=1000 * statistics.median(seconds['cgh']),
        ratio=statistics.median(c / f for c, f in zip(seconds['cgh'], seconds['floor'])),
        images_per_s=args.batch_size / statistics.median(seconds['cgh']),
        peak_memory_mib=peak / 2 ** 20,  # of the process on a CPU, libraries included
        seconds=seconds,
    )


def main():
    args = parse()
    result = benchmark_step(args) if args.what == 'step' else benchmark_knn(args.turns)
    on_gpu = args.what == 'step' and torch.device(args.device).type == 'cuda'
    result.update(
        options=vars(args),
        processor=torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
    )
    if args.what == 'step':
        print(
            f'{args.model} {args.img_size} px, batch {args.batch_size}, bank {args.bank_size}: '
            f"step {result['cgh_ms']:.1f} ms, floor {result['floor_ms']:.1f} ms, ratio {result['ratio']:.2f}, "
            f"{result['images_per_s']:.1f} images/s, peak {result['peak_memory_mib']:.0f} MiB")
    else:
        print(f"kNN {result['knn_s']:.2f} s, faiss {result['faiss_s']:.2f} s, ratio {result['ratio']:.2f}")
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as file:
            json.dump(result, file, indent=2)


if __name__ == '__main__':
    sys.exit(main())

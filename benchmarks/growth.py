"""How the cost grows with the memory bank, with the batch and with the number of processes."""
import argparse
import statistics
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict

import torch
import torch.distributed as dist

from .step import CGHStep, relation_loss
from .timing import in_turn, median_ratio, memory_of, random_images, timed

__all__ = ['benchmark_loss', 'benchmark_processes']


def loss_step(args: argparse.Namespace, bank_size: int, batch_size: int) -> Callable:
    return relation_loss(args.device, args.embed_dim, bank_size, batch_size)[0]


def benchmark_loss(args: argparse.Namespace) -> Dict[str, Any]:
    """Time and memory of the relation loss as bank and batch grow, relative to the six products that it needs."""
    torch.manual_seed(0)
    sizes = [args.bank_size // 8, args.bank_size // 4, args.bank_size // 2, args.bank_size]
    steps = {}
    for size in sizes:
        steps['loss', size], steps['products', size] = relation_loss(
            args.device, args.embed_dim, size, args.batch_size)
    seconds = in_turn(args, steps)
    ms = {name: [1000 * statistics.median(seconds[name, size]) for size in sizes] for name in ('loss', 'products')}
    slopes = {
        name: [statistics.linear_regression(sizes, [seconds[name, size][turn] for size in sizes]).slope
               for turn in range(args.turns)] for name in ms}
    ratio = median_ratio(slopes['loss'], slopes['products'])
    slope, intercept = statistics.linear_regression(sizes, ms['loss'])
    residual = max(abs(value - slope * size - intercept) for size, value in zip(sizes, ms['loss'])) / ms['loss'][-1]
    memory = {}
    for size in (sizes[0], sizes[-1]):
        for batch in (args.batch_size, 4 * args.batch_size):
            banks = 2 * size * args.embed_dim * 4 / 2 ** 20
            memory[f'{batch} x {size}'] = memory_of(loss_step, args, size, batch) - banks
    print('bank        ' + ''.join(f'{size:>10}' for size in sizes))
    for name, values in ms.items():
        print(f'{name + ", ms":12}' + ''.join(f'{value:10.1f}' for value in values))
    print(f'slope of the loss / slope of its products {ratio:.2f}; '
          f'off a straight line by at most {100 * residual:.1f} %')
    print('memory without the banks, MiB: ' + ', '.join(f'{name} {value:.0f}' for name, value in memory.items()))
    return dict(bank_sizes=sizes, ms=ms, slope_ratio=ratio, off_line=residual, memory_mib=memory)


def _join(ranks: Any, world: int, args: argparse.Namespace, store: str) -> None:
    global _run  # of this process
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{store}', rank=ranks.get(), world_size=world)
    _run = partial(CGHStep(args), [random_images(args)] * 2)


def _run_steps(repeats: int) -> None:
    for _ in range(repeats):
        _run()


def benchmark_processes(args: argparse.Namespace) -> Dict[str, Any]:
    """Images per second of one process with all threads of the CPU, and of as many processes with one thread each."""
    args.device = 'cpu'
    device, world = torch.device('cpu'), torch.get_num_threads()
    context = torch.multiprocessing.get_context('spawn')
    ranks = context.SimpleQueue()
    for rank in range(world):
        ranks.put(rank)
    share = argparse.Namespace(**{**vars(args), 'batch_size': args.batch_size // world})
    with TemporaryDirectory() as folder, context.Pool(world, _join, (ranks, world, share, f'{folder}/store')) as pool:
        # each process waits for the others in every step, so that none takes the turn of another
        many = partial(pool.map, _run_steps, [args.repeats] * world, chunksize=1)
        one = partial(CGHStep(args), [random_images(args)] * 2)
        many()
        one()
        rate = {'one': [], 'many': []}
        for _ in range(args.turns):
            rate['one'].append(args.batch_size / timed(one, device, args.repeats))
            rate['many'].append(args.batch_size * args.repeats / timed(many, device, 1))
    ratio, medians = median_ratio(rate['many'], rate['one']), {k: statistics.median(v) for k, v in rate.items()}
    print(f'{args.model} {args.img_size} px, batch {args.batch_size} in all: {world} processes of one thread '
          f"{medians['many']:.1f} images/s, one of {world} {medians['one']:.1f}, ratio {ratio:.2f}")
    return dict(images_per_s=medians, ratio=ratio, turns=rate)

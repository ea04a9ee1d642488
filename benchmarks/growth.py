"""How the cost grows with the memory bank, with the batch and with the number of processes."""
import argparse
import os
import socket
import statistics
from typing import Any, Dict

import torch
import torch.distributed as dist

from .loss import relation_loss
from .step import CGHStep
from .timing import in_turn, median_ratio, memory_of, random_images, timed

__all__ = ['benchmark_loss', 'benchmark_processes']


def run_loss(args: argparse.Namespace, bank_size: int, batch_size: int) -> None:
    """The loss once, to measure its memory."""
    relation_loss(args, bank_size, batch_size)[0]()


def benchmark_loss(args: argparse.Namespace) -> Dict[str, Any]:
    """Time and memory of the relation loss as bank and batch grow, relative to the six products that it needs."""
    torch.manual_seed(0)
    sizes = [args.bank_size // 8, args.bank_size // 4, args.bank_size // 2, args.bank_size]
    steps = {(name, size): step for size in sizes
             for name, step in zip(('loss', 'products'), relation_loss(args, size, args.batch_size))}
    seconds = in_turn(args, steps)
    ms = {name: [1000 * statistics.median(seconds[name, size]) for size in sizes] for name in ('loss', 'products')}
    slopes = {
        name: [statistics.linear_regression(sizes, [seconds[name, size][turn] for size in sizes]).slope
               for turn in range(args.turns)] for name in ms}
    ratio = median_ratio(slopes['loss'], slopes['products'])
    fit = statistics.linear_regression(sizes, ms['loss'])
    residual = max(abs(value - fit.slope * size - fit.intercept) for size, value in zip(sizes, ms['loss']))
    residual /= ms['loss'][-1]
    memory = {}
    for size in (sizes[0], sizes[-1]):
        for batch in (args.batch_size, 4 * args.batch_size):
            banks = 2 * size * args.embed_dim * 4 / 2 ** 20
            memory[f'{batch} x {size}'] = memory_of(run_loss, args, size, batch) - banks
    print('bank        ' + ''.join(f'{size:>10}' for size in sizes))
    for name, values in ms.items():
        print(f'{name + ", ms":12}' + ''.join(f'{value:10.1f}' for value in values))
    print(f'slope of the loss / slope of its products {ratio:.2f}; '
          f'off a straight line by at most {100 * residual:.1f} %')
    print('memory without the banks, MiB: ' + ', '.join(f'{name} {value:.0f}' for name, value in memory.items()))
    return dict(bank_sizes=sizes, ms=ms, slope_ratio=ratio, off_line=residual, memory_mib=memory)


def _gloo_process(rank: int, world: int, args: argparse.Namespace, port: int, connection: Any) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=world)
    args.batch_size //= world
    step, images = CGHStep(args), random_images(args)
    while connection.recv():
        for _ in range(args.repeats):
            step([images, images])
        connection.send(True)
    dist.destroy_process_group()


def benchmark_processes(args: argparse.Namespace) -> Dict[str, Any]:
    """Images per second of one process with all threads of the CPU, and of as many processes with one thread each."""
    args.device = 'cpu'
    device, world = torch.device('cpu'), torch.get_num_threads()
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context('spawn')
    pipes = [context.Pipe() for _ in range(world)]
    workers = [
        context.Process(target=_gloo_process, args=(rank, world, args, port, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)]
    for worker in workers:
        worker.start()
    step, images = CGHStep(args), random_images(args)

    def one():
        step([images, images])

    def many():
        for mine, _ in pipes:
            mine.send(True)
        for mine, _ in pipes:
            mine.recv()

    rate = {'one': [], 'many': []}
    many()
    one()
    for _ in range(args.turns):
        rate['one'].append(args.batch_size / timed(one, device, args.repeats))
        rate['many'].append(args.batch_size * args.repeats / timed(many, device, 1))
    for mine, _ in pipes:
        mine.send(False)
    ratio = median_ratio(rate['many'], rate['one'])
    print(f'{args.model} {args.img_size} px, batch {args.batch_size} in all: {world} processes of one thread '
          f"{statistics.median(rate['many']):.1f} images/s, one of {world} {statistics.median(rate['one']):.1f}, "
          f'ratio {ratio:.2f}')
    return dict(images_per_s={k: statistics.median(v) for k, v in rate.items()}, ratio=ratio, turns=rate)

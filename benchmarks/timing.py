"""Timing and memory of things that are compared in one run."""
import argparse
import math
import statistics
import time
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence

import torch

__all__ = ['autocast', 'in_turn', 'median_ratio', 'memory_format', 'memory_of', 'random_images', 'timed']


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of values that were measured in the same turn."""
    return statistics.median(n / d for n, d in zip(numerators, denominators))


def timed(step: Callable, device: torch.device, repeats: int) -> float:
    """Seconds per call, over `repeats` calls."""
    synchronize = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize()
    return (time.perf_counter() - began) / repeats


def in_turn(args: argparse.Namespace, steps: Dict[Any, Callable]) -> Dict[Any, List[float]]:
    """Seconds per call of each step, `args.turns` times one after the other, after two calls to warm up."""
    device, seconds = torch.device(args.device), {name: [] for name in steps}
    for step in steps.values():
        timed(step, device, 2)
    for _ in range(args.turns):
        for name, step in steps.items():
            seconds[name].append(timed(step, device, args.repeats))
    return seconds


def _peak_on_cpu() -> float:
    """Peak memory of this process since the last reset, MiB (Linux)."""
    with open('/proc/self/status', encoding='ascii') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('VmHWM:')) / 2 ** 10


def _added_memory(create_step: Callable, args: argparse.Namespace, *more: Any) -> float:
    device = torch.device(args.device)
    torch.randn(256, 256, device=device) @ torch.randn(256, 256, device=device)  # allocates the libraries' buffers
    if device.type == 'cuda':
        timed(create_step(args, *more), device, 2)
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        with open('/proc/self/clear_refs', 'w', encoding='ascii') as file:
            file.write('5')  # resets the peak, which the imports have raised
    except OSError:  # not Linux
        return math.nan
    before = _peak_on_cpu()
    timed(create_step(args, *more), device, 2)
    return _peak_on_cpu() - before


def memory_of(create_step: Callable, args: argparse.Namespace, *more: Any) -> float:
    """Peak memory of two calls of what a module's `create_step(args, *more)` returns, in a new process, MiB; nan where
    the system cannot tell.
    """
    with torch.multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_added_memory, (create_step, args, *more))


def autocast(args: argparse.Namespace) -> ContextManager:
    """bfloat16 with `--amp`."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """That of models and images."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def random_images(args: argparse.Namespace, size: Optional[int] = None) -> torch.Tensor:
    """(B, 3, size, size) in the memory format asked for; default size `--img-size`."""
    shape = args.batch_size, 3, *[size or args.img_size] * 2
    return torch.randn(shape, device=args.device).to(memory_format=memory_format(args))

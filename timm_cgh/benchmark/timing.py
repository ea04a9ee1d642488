"""Timing and memory of things that are compared in one run."""
import argparse
import math
import statistics
import time
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence

import torch

__all__ = ['autocast', 'in_turn', 'median_ratio', 'memory_of', 'random_images', 'timed']


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios of what was measured in the same turn."""
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


def in_turn(args: argparse.Namespace, device: torch.device, ways: Dict[Any, Callable]) -> Dict[Any, List[float]]:
    """Seconds per call of each way, `args.turns` times one after the other, after two calls to warm up."""
    seconds: Dict[Any, List[float]] = {name: [] for name in ways}
    for way in ways.values():
        timed(way, device, 2)
    for _ in range(args.turns):
        for name, way in ways.items():
            seconds[name].append(timed(way, device, args.repeats))
    return seconds


def _peak_of_cpu() -> float:
    """MiB that this process has had at most since the peak was last set back (Linux)."""
    with open('/proc/self/status', encoding='ascii') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('VmHWM:')) / 2 ** 10


def _added_memory(function: Callable, args: argparse.Namespace, *more: Any) -> float:
    device = torch.device(args.device)
    torch.randn(256, 256, device=device) @ torch.randn(256, 256, device=device)  # the libraries' own buffers
    if device.type == 'cuda':
        function(args, *more)
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        with open('/proc/self/clear_refs', 'w', encoding='ascii') as file:
            file.write('5')  # sets the peak back to what is held now: imports have had more
    except OSError:  # no Linux
        return math.nan
    before = _peak_of_cpu()
    function(args, *more)
    return _peak_of_cpu() - before


def memory_of(function: Callable, args: argparse.Namespace, *more: Any) -> float:
    """MiB that a module's `function(args, *more)` takes at most in a fresh process; nan where the system cannot tell."""
    with torch.multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_added_memory, (function, args, *more))


def autocast(args: argparse.Namespace, device: torch.device) -> ContextManager:
    """bfloat16 where `--amp` asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if args.amp else nullcontext()


def random_images(args: argparse.Namespace, device: torch.device, size: Optional[int] = None) -> torch.Tensor:
    """(B, 3, size, size) in the layout asked for, `--img-size` by default."""
    size = size or args.img_size
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    return images.to(memory_format=torch.channels_last) if args.channels_last else images

"""Data workers and the signals that ask a run to save and end."""
import atexit
import multiprocessing
import signal
import weakref
from contextlib import contextmanager
from typing import Iterable, Iterator

import torch

__all__ = ['iterate', 'signals_held', 'start_worker']

_ASKING = {signal.SIGINT, signal.SIGTERM}
_CAN_HOLD = hasattr(signal, 'pthread_sigmask')  # not on Windows


_workers: 'weakref.WeakSet[multiprocessing.process.BaseProcess]' = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """An error that ends the process leaves workers: they would forgive the SIGTERM that multiprocessing sends last."""
    if any(worker.is_alive() for worker in _workers) and hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each as a failure
    for worker in _workers:
        worker.kill()


def _forgive_once(signum: int, _: object) -> None:
    signal.signal(signum, signal.SIG_DFL)


def start_worker(_: int) -> None:
    """For `worker_init_fn`: one thread, and no end by the signals that ask the main process to save first."""
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group, while the main process still wants batches. A
    # second SIGTERM is the main process's own, for a worker that did not end when asked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _forgive_once)
    if _CAN_HOLD:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back what asks to stop while workers start: they are born so, and lift it in `start_worker`."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING) if _CAN_HOLD else None
    others = set(multiprocessing.active_children())
    try:
        yield
    finally:
        _workers.update(set(multiprocessing.active_children()) - others)
        if _CAN_HOLD:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def iterate(loader: Iterable) -> Iterator:
    """Iterate over a loader that starts its workers with the first batch, at the latest; see `signals_held`."""
    iterator, end = iter(loader), object()
    with signals_held():
        item = next(iterator, end)
    while item is not end:
        yield item
        item = next(iterator, end)

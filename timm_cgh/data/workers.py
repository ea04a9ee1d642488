"""Start and end of data workers, which must not react to the signals that stop the run."""
import atexit
import multiprocessing
import re
import signal
import weakref
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Iterable, Iterator

import torch
from torch.utils.data import DataLoader

from timm_cgh.errors import InputError

__all__ = ['STOP_SIGNALS', 'iterate', 'signals_blocked', 'start_worker']

STOP_SIGNALS = {getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)}
_CAN_BLOCK = hasattr(signal, 'pthread_sigmask')  # not on Windows

_workers: 'weakref.WeakSet[multiprocessing.process.BaseProcess]' = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Kill the workers that an error has left: they ignore the SIGTERM that multiprocessing sends at exit."""
    if any(worker.is_alive() for worker in _workers) and hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch reports each as a failure
    for worker in _workers:
        worker.kill()


def start_worker(_: int) -> None:
    """For `worker_init_fn`: use one thread, and outlive the signals that ask the main process to stop."""
    torch.set_num_threads(1)
    # Ctrl-C, a scheduler's SIGTERM and torchrun's relay of it reach the whole process group, more than once, while the
    # main process still needs batches.
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the stop signals while workers start: they inherit that, and unblock them in `start_worker`."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if _CAN_BLOCK else set()
    others = set(multiprocessing.active_children())
    try:
        yield
    finally:
        _workers.update(set(multiprocessing.active_children()) - others)
        if _CAN_BLOCK:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def iterate(loader: Iterable) -> Iterator:
    """Iterate over a loader. Workers start under `signals_blocked`, those of timm's prefetcher with the first batch.

    Raises:
        InputError: the shared memory, through which workers send batches, is full: containers have 64 MB
    """
    iterator: Any = None
    try:
        with signals_blocked():
            iterator = iter(loader)
            batches = iterator if isinstance(loader, DataLoader) else chain(list(islice(iterator, 1)), iterator)
        yield from batches
    except Exception as error:
        # The garbage collector would close the workers' queues before it tells the workers to end (the error and its
        # traceback refer to each other), and the exit would wait for them.
        if hasattr(iterator, '_shutdown_workers'):
            iterator._shutdown_workers()
            loader._iterator = None  # type: ignore[attr-defined]
        if isinstance(error, RuntimeError) and re.search('shared memory|[bB]us error', str(error)):
            raise InputError(
                'workers: the shared memory (/dev/shm) is full; take fewer workers or a smaller `batch_size`, or give '
                'the container more (docker run --shm-size 8g)') from error
        raise

"""Progress reporting: a bar on a terminal, lines elsewhere; logging, memory and rates."""
import contextlib
import logging
import logging.handlers
import math
import sys
import time
from datetime import timedelta
from typing import Callable, ContextManager, Iterable, Iterator, Optional, TypeVar

import torch
from timm.utils import FormatterNoInfo
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ['Progress', 'log_to_console', 'log_to_file', 'peak_memory']

_logger = logging.getLogger('train')
_Item = TypeVar('_Item')


@contextlib.contextmanager
def _root_handler(handler: logging.Handler) -> Iterator[None]:
    level = logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        logging.root.setLevel(level)
        handler.close()


def log_to_console() -> ContextManager[None]:
    """Print the log on standard error within the block, as timm's scripts do."""
    handler = logging.StreamHandler()
    handler.setFormatter(FormatterNoInfo())
    return _root_handler(handler)


@contextlib.contextmanager
def log_to_file() -> Iterator[Callable[[str], None]]:
    """Collect the log, with times, within the block, which gets a function that writes all of it to a file."""
    memory = logging.handlers.MemoryHandler(1, logging.CRITICAL + 1, flushOnClose=False)

    def open_file(path: str) -> None:
        file = logging.FileHandler(path, encoding='utf-8')
        file.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
        memory.setTarget(file)

    with _root_handler(memory):
        try:
            yield open_file
        finally:
            memory.flush()
            if isinstance(memory.target, logging.Handler):
                memory.target.close()


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: what torch has allocated on a GPU; on a CPU the process's own, libraries included and data
    workers not.
    """
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == 'darwin' else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


class Progress:
    """Progress of one epoch: a bar on a terminal, lines elsewhere.

    Args:
        epoch, epochs: which epoch, counted from 0, of how many
        start, steps: first batch in this process's lifetime, batches of an epoch
        batch_size: images per batch, over all processes
        silent: print nothing (all ranks but 0)
    """

    def __init__(self, epoch: int, epochs: int, start: int, steps: int, batch_size: int, silent: bool = False):
        self.epoch, self.epochs, self.start, self.steps, self.batch_size = epoch, epochs, start, steps, batch_size
        self.silent = silent
        self.began = time.perf_counter()
        self.waited = 0.0  # seconds
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc=f'epoch {epoch}',
            unit='batch',
            leave=False,
            disable=silent or not sys.stderr.isatty(),
        )

    def images_per_second(self, done: int) -> float:
        """Rate since the start, after `done` batches of the epoch."""
        return (done - self.start) * self.batch_size / (time.perf_counter() - self.began)

    def waiting(self, batches: Iterable[_Item]) -> Iterator[_Item]:
        """The batches, with the time that each lets the training wait."""
        iterator, asked = iter(batches), time.perf_counter()
        for batch in iterator:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    @property
    def data_wait(self) -> float:
        """Percentage of the time since the start in which the training waited for data."""
        return 100 * self.waited / (time.perf_counter() - self.began)

    def report(self, done: int, loss: float, lr: float, knn: Optional[float] = None) -> None:
        """Report rate, remaining time and the epoch's mean loss so far."""
        rate = self.images_per_second(done)
        left = (self.epochs - self.epoch) * self.steps - done
        eta = timedelta(seconds=round(left * self.batch_size / rate))
        knn_text = '' if knn is None else f', kNN {knn:.1f} %'
        rates = f'{rate:.1f} images/s (data wait {self.data_wait:.0f} %), ETA {eta}{knn_text}'
        self.bar.set_postfix_str(f'loss {loss:.3f}, {rates}')
        if self.bar.disable and not self.silent:
            _logger.info(f'epoch {self.epoch} [{done}/{self.steps}] loss {loss:.4f}, lr {lr:.3g}, {rates}')

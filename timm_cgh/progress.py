"""How a run talks to the person before the screen, and how it is asked to stop."""
import logging
import math
import signal
import sys
import time
from datetime import timedelta
from typing import Optional

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ['Progress', 'StopRequest', 'peak_memory']

_logger = logging.getLogger('train')


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, MiB: what torch has taken of a GPU; of a CPU what this process has taken, libraries
    included and data workers not.
    """
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == 'darwin' else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


class StopRequest:
    """SIGTERM and Ctrl-C ask for a clean end; a second Ctrl-C ends at once.

    Processes must ask each other, and those of a GPU wait for it then: only now and then, yet in time for a launcher
    that kills after half a minute.

    Args:
        patience: seconds between two questions, about
    """

    def __init__(self, patience: float = 5.0):
        self.patience = patience
        self.signum = 0
        self.every, self.waited, self.asked = 1, 0, time.perf_counter()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum, _):
        self.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def due(self, most: int) -> bool:
        """Whether it is time to ask, on all processes at once; to be called after each update.

        Args:
            most: updates between two questions
        """
        self.waited += 1
        return not (dist.is_available() and dist.is_initialized()) or self.waited >= min(self.every, most)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked; in DDP, all must call."""
        if dist.is_available() and dist.is_initialized():
            pace = (time.perf_counter() - self.asked) / max(1, self.waited)
            answers = torch.tensor([self.signum, pace], device=device)
            dist.all_reduce(answers, op=dist.ReduceOp.MAX)
            signum, pace = answers.tolist()  # of the slowest: the same number on all
            self.every, self.waited, self.asked = int(self.patience / max(pace, 1e-6)), 0, time.perf_counter()
            agreed = int(signum)
            self.signum = agreed or self.signum  # asked in the meantime: the others hear of it the next time
            return agreed != 0
        return self.signum != 0


class Progress:
    """One epoch's progress: a bar on a terminal, lines elsewhere.

    Args:
        epoch, epochs: which epoch, counted from 0, of how many
        start, steps: first batch of this sitting, batches of an epoch
        batch_size: images per batch, of all processes
        silent: say nothing (all processes but the first)
    """

    def __init__(self, epoch: int, epochs: int, start: int, steps: int, batch_size: int, silent: bool = False):
        self.epoch, self.epochs, self.start, self.steps, self.batch_size = epoch, epochs, start, steps, batch_size
        self.silent = silent
        self.began = time.perf_counter()
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc=f'epoch {epoch}',
            unit='batch',
            leave=False,
            disable=silent or not sys.stderr.isatty(),
        )

    def images_per_second(self, done: int) -> float:
        """Rate of this sitting, after `done` batches of the epoch."""
        return (done - self.start) * self.batch_size / (time.perf_counter() - self.began)

    def report(self, done: int, loss: float, lr: float, knn: Optional[float]) -> None:
        """Say how far it is, with the mean loss of the epoch so far."""
        rate = self.images_per_second(done)
        left = (self.epochs - self.epoch) * self.steps - done
        eta = timedelta(seconds=round(left * self.batch_size / rate))
        knn_text = '' if knn is None else f', kNN {knn:.1f} %'
        self.bar.set_postfix_str(f'{rate:.0f} images/s, ETA {eta}, loss {loss:.3f}{knn_text}')
        if self.bar.disable and not self.silent:
            _logger.info(
                f'epoch {self.epoch} [{done}/{self.steps}] loss {loss:.4f}, lr {lr:.3g}, {rate:.1f} images/s, ETA {eta}'
                f'{knn_text}')

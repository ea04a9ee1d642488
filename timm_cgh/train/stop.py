"""Graceful shutdown: signals that ask a run to save its state and end."""
import logging
import signal
import threading
import time
from typing import Any, Dict

import torch
import torch.distributed as dist

from timm_cgh.data.workers import STOP_SIGNALS
from timm_cgh.distributed import is_distributed

__all__ = ['StopRequest']

_logger = logging.getLogger('train')


class StopRequest:
    """Catches SIGTERM, SIGHUP and Ctrl-C while its block runs, and puts the former handlers back after it.

    Before `defer` there is nothing to save: a signal raises `SystemExit` with 128 + its number. From then on it is only
    noted, for the training loop to ask `due` and `agreed`. A second Ctrl-C interrupts at once; a second SIGTERM does
    not, since launchers relay the scheduler's.

    Handlers can only be set in the main thread; in any other, nothing is caught.

    Args:
        patience: seconds between two exchanges among the processes, which make a GPU wait: seldom, yet in time for a
            launcher that kills half a minute after its SIGTERM
    """

    def __init__(self, patience: float = 5.0):
        self.patience = patience
        self.signum = 0
        self.deferred = False
        self._before: Dict[int, Any] = {}
        self._every, self._waited, self._asked = 1, 0, time.perf_counter()

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.signum and not self.deferred:  # not in the handler: it may have interrupted a write to the same stream
            _logger.info(f'Stopped by {self.name} before training began')
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, signum: int, _: Any) -> None:
        if self.deferred and self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if not self.deferred:
            raise SystemExit(128 + signum)

    @property
    def name(self) -> str:
        """Of the signal."""
        return signal.Signals(self.signum).name

    def defer(self) -> None:
        """From now on the state is worth saving: note signals instead of exiting."""
        self.deferred = True

    def due(self, most: int) -> bool:
        """Whether to exchange now: the same answer on every rank. Call after each update.

        Args:
            most: updates between two exchanges
        """
        self._waited += 1
        return not is_distributed() or self._waited >= min(self._every, most)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop. Collective: every rank must call."""
        if not is_distributed():
            return self.signum != 0
        pace = (time.perf_counter() - self._asked) / max(1, self._waited)
        answers = torch.tensor([self.signum, pace], device=device)
        dist.all_reduce(answers, op=dist.ReduceOp.MAX)
        signum, pace = answers.tolist()  # the pace of the slowest, so that all ranks count alike
        self._every, self._waited, self._asked = int(self.patience / max(pace, 1e-6)), 0, time.perf_counter()
        self.signum = int(signum) or self.signum  # a signal since the tensor was filled waits for the next exchange
        return int(signum) != 0

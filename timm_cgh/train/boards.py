"""Weights & Biases and TensorBoard."""
import importlib.util
import os
from typing import Any, Callable, Dict, List

from timm_cgh.errors import InputError

__all__ = ['Boards', 'check_packages']


def check_packages(log_wandb: bool = False, log_tensorboard: bool = False) -> None:
    """Check that the packages of the experiment trackers are installed.

    Raises:
        InputError: one is not
    """
    for name, wanted in (('wandb', log_wandb), ('tensorboard', log_tensorboard)):
        if wanted and importlib.util.find_spec(name) is None:
            raise InputError(f"log_{name}: needs the {name} package (pip install 'timm-cgh[{name}]')")


class Boards:
    """The experiment trackers that a run reports to, one row per epoch.

    Args:
        folder: of the run
        config: its options
        log_wandb, log_tensorboard: which to open (see `check_packages`)
    """

    def __init__(self, folder: str, config: Dict[str, Any], log_wandb: bool = False, log_tensorboard: bool = False):
        self._log: List[Callable[[Dict[str, Any]], None]] = []
        if log_wandb:
            import wandb
            wandb.init(project='timm-cgh', name=os.path.basename(folder), config=config)
            self._log.append(wandb.log)
        if log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(folder)
            self._log.append(self._add_scalars)

    def _add_scalars(self, row: Dict[str, Any]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, row['epoch'])

    def log(self, row: Dict[str, Any]) -> None:
        """Report the row of an epoch."""
        for log in self._log:
            log(row)

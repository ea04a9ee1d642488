"""Weights & Biases and TensorBoard."""
import importlib.util
import os
from pathlib import Path
from typing import Any, Callable, Dict, List

from timm_cgh.errors import InputError
from timm_cgh.files import atomic_write

__all__ = ['Boards', 'check_packages']


def check_packages(log_wandb: bool, log_tensorboard: bool) -> None:
    """Raise `InputError` where the package of an experiment tracker is not installed."""
    for name, wanted in (('wandb', log_wandb), ('tensorboard', log_tensorboard)):
        if wanted and importlib.util.find_spec(name) is None:
            raise InputError(f"log_{name}: needs the {name} package (pip install 'timm-cgh[{name}]')")


class Boards:
    """The experiment trackers that a run reports to, one row per epoch.

    Args:
        folder: of the run
        settings: what it describes itself by (`resolved.yaml`)
        log_wandb, log_tensorboard: which to open (see `check_packages`)
        wandb_project: that the run belongs to; its name is the folder's, its id is kept in the folder for a resume
    """

    def __init__(
            self,
            folder: str,
            settings: Dict[str, Any],
            log_wandb: bool = False,
            log_tensorboard: bool = False,
            wandb_project: str = 'timm-cgh',
    ):
        self._log: List[Callable[[Dict[str, Any]], None]] = []
        self._close: List[Callable[[], None]] = []
        if log_wandb:
            import wandb
            path = Path(folder, 'wandb_id.txt')
            kept = path.read_text(encoding='utf-8').strip() if path.exists() else None
            run = wandb.init(
                project=wandb_project, name=os.path.basename(folder), id=kept, resume='allow', config=settings)
            with atomic_write(path) as file:
                file.write(f'{run.id}\n')
            self._log.append(run.log)
            self._close.append(run.finish)
        if log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(folder)
            self._log.append(self._add_scalars)
            self._close.append(self.writer.close)

    def _add_scalars(self, row: Dict[str, Any]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, row['epoch'])

    def log(self, row: Dict[str, Any]) -> None:
        """Report the row of an epoch."""
        for log in self._log:
            log(row)

    def close(self) -> None:
        """Send what is left; another run of this process opens its own."""
        for close in self._close:
            close()

"""The epochs of a run, one row each: `summary.csv`, whole at any moment, and the boards that people watch."""
import csv
import os
from typing import Any, Callable, Dict, List, Mapping, Sequence

from timm_cgh.errors import blame
from timm_cgh.files import atomic_write

__all__ = ['Boards', 'Summary', 'epochs_done', 'read_rows']


def read_rows(path: str) -> List[Dict[str, str]]:
    """Rows of a `summary.csv`, values as text; none where there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def epochs_done(rows: Sequence[Mapping[str, Any]]) -> int:
    """Epochs behind the last row; there may be fewer rows, where a run went on in another folder."""
    return int(rows[-1]['epoch']) + 1 if rows else 0


class Summary:
    """Rows of a run's `summary.csv` under timm's column names, rewritten in one rename per epoch.

    Columns may appear late or stay blank (a kNN check every few epochs, InfoNCE only in the warm-up).

    Args:
        path: the file
        start_epoch: rows of earlier epochs are kept, later ones (of a run that is resumed before them) dropped
    """

    def __init__(self, path: str, start_epoch: int = 0):
        self.path = path
        self.rows: List[Dict[str, Any]] = []
        if start_epoch:
            self.rows = [row for row in read_rows(path) if int(row['epoch']) < start_epoch]

    def add(self, row: Dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        with atomic_write(self.path) as file:
            writer = csv.DictWriter(file, fieldnames=names, restval='', lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.rows)


class Boards:
    """Weights & Biases and TensorBoard, where they are asked for."""

    def __init__(self):
        self._add: List[Callable[[Dict[str, Any]], None]] = []

    def open(self, folder: str, config: Dict[str, Any], wandb: bool = False, tensorboard: bool = False) -> None:
        """
        Args:
            folder: of the run
            config: its options
            wandb, tensorboard: which to open

        Raises:
            InputError: the package is not installed, or does not start
        """
        if wandb:
            with blame('--log-wandb'):
                import wandb as client
                client.init(project='timm-cgh', name=os.path.basename(folder), config=config)
                self._add.append(client.log)
        if tensorboard:
            with blame('--log-tensorboard'):
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(folder)

            def add_scalars(row: Dict[str, Any]) -> None:
                for name, value in row.items():
                    writer.add_scalar(name, value, row['epoch'])

            self._add.append(add_scalars)

    def add(self, row: Dict[str, Any]) -> None:
        """Show the row of an epoch."""
        for add in self._add:
            add(row)

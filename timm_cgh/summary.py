"""`summary.csv` of a run: one row per epoch, whole at any moment."""
import csv
import os
from typing import Any, Dict, List

from timm_cgh.files import atomic_write

__all__ = ['Summary']


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
        if start_epoch and os.path.exists(path):
            with open(path, newline='', encoding='utf-8') as file:
                self.rows = [row for row in csv.DictReader(file) if int(row['epoch']) < start_epoch]

    def add(self, row: Dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        with atomic_write(self.path) as file:
            writer = csv.DictWriter(file, fieldnames=names, restval='', lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.rows)

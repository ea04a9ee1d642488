"""Files of evaluations that train: `last.pth.tar` to resume from, and `summary.csv`."""
import logging
import os
import time
from typing import Any, Dict, Mapping, Optional

import torch

from timm_cgh.errors import InputError
from timm_cgh.files import Summary, atomic_write
from timm_cgh.models.checkpoints import read_file

__all__ = ['Recorder', 'find_state']

_logger = logging.getLogger('eval')
_LAST = 'last.pth.tar'
_SECONDS = 60  # between two writings


def find_state(output: Optional[str], resume: Optional[str], settings: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
    """Content of the checkpoint to resume from, if any.

    Args:
        output: folder of the run
        resume: `auto` (the checkpoint in the folder, where there is one), a file, or None
        settings: what the run must have in common with the checkpoint

    Raises:
        InputError: the folder holds a run that is not resumed, or the file is not a checkpoint of such a run
    """
    last = os.path.join(output, _LAST) if output else None
    if resume is None:
        if last and os.path.exists(last):
            raise InputError(f'output={output}: holds a run; `resume` auto continues it, or choose another folder')
        return None
    if resume == 'auto':
        if not last:
            raise InputError('resume=auto: say which run with `output` DIR')
        if not os.path.exists(last):
            return None
        resume = last
    state = read_file(resume, 'resume')
    if last and os.path.exists(last) and not os.path.samefile(last, resume):
        raise InputError(f'output={output}: holds another run than `resume` {resume}; choose another folder')
    if not isinstance(state.get('settings'), dict):
        raise InputError(f'resume={resume}: not a checkpoint of such a run')
    for key, value in settings.items():
        if state['settings'].get(key) != value:
            raise InputError(f"resume={resume}: was made with other settings: {key.replace('_', ' ')}")
    unit = 'epoch' if 'epoch' in state else 'iteration'
    _logger.info(f'Resumed {resume} at {unit} {state[unit]}')
    return state


class Recorder:
    """Writes `summary.csv` and `last.pth.tar` of a run: at most once a minute, since an epoch on cached features takes
    less time than the writing.

    Args:
        output: folder of the run; None to write nothing
        settings: see `find_state`
        start: first epoch of this sitting
        unit: `epoch` or `iteration`, the column that numbers the rows
    """

    def __init__(self, output: Optional[str], settings: Mapping[str, Any], start: int = 0, unit: str = 'epoch'):
        self.output = output
        self.settings = settings
        self.unit = unit
        self.summary = Summary(os.path.join(output, 'summary.csv'), start, unit) if output else None
        self.written = time.monotonic()

    def add(self, row: Dict[str, Any], write: bool, **state: Any) -> None:
        """Record an epoch, or the iterations up to one.

        Args:
            row: of the summary, with its number, counted from 0
            write: in any case
            **state: of the checkpoint after it
        """
        if self.output is None or self.summary is None:
            return
        if not write and time.monotonic() - self.written <= _SECONDS:
            self.summary.rows.append(row)
            return
        self.summary.add(row)
        content = {'settings': dict(self.settings), self.unit: row[self.unit] + 1, **state}
        with atomic_write(os.path.join(self.output, _LAST), 'wb') as file:
            torch.save(content, file)
        self.written = time.monotonic()

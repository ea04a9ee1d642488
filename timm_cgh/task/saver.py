"""Checkpoints that survive a kill at any moment and resume at the very step (timm's file names)."""
import argparse
import glob
import logging
import os
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.utils import CheckpointSaver
from timm.utils.model import unwrap_model

from timm_cgh.errors import InputError

from .cgh import CGHTask
from .portable import local_checkpoint, read_portable

__all__ = ['RunSaver', 'find_resume', 'newest_files', 'read_checkpoint', 'resume_path']

_logger = logging.getLogger('train')


def read_checkpoint(path: str, mmap: bool = False) -> Dict[str, Any]:
    """A checkpoint of a pre-training run, by `torch.load(weights_only=True)`; or one as safetensors, from the Hub.

    Raises:
        InputError: no such file, not readable, or not a checkpoint of a pre-training run; one line naming the file
    """
    if not os.path.isfile(path):
        raise InputError(f'--resume {path}: no such file')
    try:
        if path.endswith('.safetensors'):
            state = read_portable(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as error:  # whatever a broken or foreign file may make the reader raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f'--resume {path}: not a readable checkpoint ({reason[:200]})') from error
    if not isinstance(state, dict) or 'task_state' not in state or 'progress' not in state:
        raise InputError(
            f'--resume {path}: not a checkpoint of a CGH pre-training run (weights go to --initial-checkpoint)')
    return state


def _place(state: Dict[str, Any]) -> Tuple[int, int]:
    """Epoch and batch where a checkpoint goes on."""
    return state['progress']['epoch'], state['progress']['batch']


def newest_files(folder: str) -> List[str]:
    """The checkpoints of a run's folder that it may go on from: `last` and recovery files."""
    last = os.path.join(folder, 'last.pth.tar')
    return [path for path in (last, *glob.glob(os.path.join(folder, 'recovery-*.pth.tar'))) if os.path.exists(path)]


def find_resume(folder: str) -> Optional[str]:
    """The most advanced readable checkpoint of a run's folder, `last` or a recovery file; None where there is none."""
    best, best_at = None, None
    for path in newest_files(folder):
        try:
            at = _place(read_checkpoint(path, mmap=True))
        except InputError as error:
            _logger.warning(f'passed over: {error}')
            continue
        if best is None or at > best_at:
            best, best_at = path, at
    return best


def resume_path(resume: Optional[str], folder: str) -> Optional[str]:
    """The checkpoint that `--resume` means: of the run's folder where it says `auto`, else the file, here or on the Hub."""
    return find_resume(folder) if resume == 'auto' else local_checkpoint(resume)


class RunSaver(CheckpointSaver):
    """timm's `CheckpointSaver` with renames that never leave a name without its file, and the place in the run.

    `progress` is stored with every checkpoint: `epoch` and `batch` (where to go on, counted from 0), `num_updates`, and
    what else the loop puts there. Recovery files go when the epoch's own checkpoint is written.

    Args:
        task: the task whose state is saved
        **kwargs: see `timm.utils.CheckpointSaver`
    """

    def __init__(self, task: CGHTask, **kwargs: Any):
        # timm asks `task` for the entries of a checkpoint: the saver answers itself, to add `progress`
        super().__init__(model=task.student.backbone, task=self, **kwargs)
        self.run_task = task
        self.progress: Dict[str, Any] = {}

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn=unwrap_model) -> Dict[str, Any]:
        state = self.run_task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        return state if ema else {**state, 'progress': self.progress}

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)  # timm unlinks dst first: a kill between the two would leave no checkpoint

    def _duplicate(self, src: str, dst: str) -> None:
        if os.path.exists(dst) and os.path.samefile(src, dst):  # renaming one link over the other would do nothing
            return
        beside = f'{dst}.tmp'
        if os.path.exists(beside):
            os.unlink(beside)
        super()._duplicate(src, beside)
        os.replace(beside, dst)

    def save_checkpoint(self, epoch: int, metric: Optional[float] = None):
        best = super().save_checkpoint(epoch, metric)
        self._remove_recovery()
        self.curr_recovery_file = self.prev_recovery_file = ''
        return best

    def restore(self, state: Dict[str, Any], path: str) -> None:
        """Take up the ranking of checkpoints where `state` left it; for the first process alone.

        A run that has gone further since is taken back: what is newer than `state` would be resumed in its place.

        Args:
            state: content of a checkpoint
            path: where it was read, in this run's folder
        """
        saver = state.get('saver')
        if saver is None:
            return
        epoch, metric = saver['pending']
        self.load_state_dict(saver)
        last = os.path.join(self.checkpoint_dir, 'last' + self.extension)
        newest = find_resume(self.checkpoint_dir)
        if newest is not None and _place(read_checkpoint(newest, mmap=True)) > _place(state):
            self._duplicate(path, last)
            self._remove_recovery(keep=path)  # other processes may still read it
        if metric is None:
            return
        # killed when `last` was in place and `model_best` not yet: make it now
        if self.best_metric is None or self.cmp(metric, self.best_metric):
            self.best_epoch, self.best_metric = epoch, metric
        if self.best_epoch == epoch and state['progress']['batch'] == 0:
            self._duplicate(path, os.path.join(self.checkpoint_dir, 'model_best' + self.extension))

    def _remove_recovery(self, keep: str = '') -> None:
        for path in glob.glob(os.path.join(self.recovery_dir, f'{self.recovery_prefix}-*{self.extension}')):
            if os.path.basename(path) != os.path.basename(keep):
                os.unlink(path)

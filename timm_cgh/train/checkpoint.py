"""Checkpoints of a run under timm's file names, whole at any moment, with the position in the run."""
import glob
import os
from typing import Any, Dict, List, Mapping, Optional, Tuple

from timm.utils import CheckpointSaver
from timm.utils.model import unwrap_model

from timm_cgh.errors import InputError
from timm_cgh.models.checkpoints import read_file
from timm_cgh.task import MomentumTask

from .portable import read_portable

__all__ = ['RunSaver', 'position', 'read_checkpoint']


def read_checkpoint(path: str, mmap: bool = False) -> Dict[str, Any]:
    """Content of a checkpoint of a pre-training run: a torch file, or the safetensors file that `publish.py` uploads.

    Args:
        path: the file
        mmap: leave the tensors of a torch file on disk until they are used

    Raises:
        InputError: no such file, not readable, or not a checkpoint of a pre-training run
    """
    if path.endswith('.safetensors'):
        state = read_portable(path)
    else:
        state = read_file(path, 'resume', mmap=mmap)
    if 'task_state' not in state or 'progress' not in state:
        raise InputError(
            f'resume={path}: not a checkpoint of a pre-training run (weights alone: `initial_checkpoint`)')
    return state


def position(state: Dict[str, Any]) -> Tuple[int, int]:
    """Epoch and batch that a checkpoint continues from, counted from 0."""
    return state['progress']['epoch'], state['progress']['batch']


class RunSaver(CheckpointSaver):
    """timm's `CheckpointSaver`, with renames that never leave a name without its file, and the position in the run.

    `progress` is stored with every checkpoint: `epoch` and `batch` to continue from, and what else the run puts there.
    Recovery files are removed once the epoch's own checkpoint is written.

    Args:
        task: the task whose state is saved
        options: of the run, plain values; `model` among them
        **kwargs: see `timm.utils.CheckpointSaver`
    """

    best_metric: Optional[float]

    def __init__(self, task: MomentumTask, options: Mapping[str, Any], **kwargs: Any):
        # timm asks `task` for the entries of a checkpoint: the saver answers itself, to add its own
        super().__init__(model=task.student.backbone, task=self, **kwargs)
        self.run_task = task
        self.options = dict(options)
        self.progress: Dict[str, Any] = {}

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn=unwrap_model) -> Dict[str, Any]:
        state = self.run_task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        if ema:
            return state
        # a plain dictionary: torch.load's default refuses the Namespace that timm would store
        return {**state, 'arch': self.options['model'], 'args': self.options, 'progress': self.progress}

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

    def recovery_files(self) -> List[str]:
        return glob.glob(os.path.join(glob.escape(self.recovery_dir), f'{self.recovery_prefix}-*{self.extension}'))

    def restore(self, state: Dict[str, Any], path: str, rewind: bool) -> None:
        """Take up the ranking of checkpoints where `state` left it. Rank 0 only.

        Args:
            state: content of a checkpoint
            path: where it was read, in this run's folder
            rewind: the folder holds later checkpoints, which `auto` would resume instead: replace them by this one
        """
        saver = state.get('saver')
        if saver is None:
            return
        epoch, metric = saver['pending']
        self.load_state_dict(saver)
        if rewind:
            self._duplicate(path, os.path.join(self.checkpoint_dir, 'last' + self.extension))
            self._remove_recovery(keep=path)  # other processes may still read it
        if metric is None:
            return
        # the run was killed between the renames of `last` and `model_best`: make up for the second
        if self.best_metric is None or self.cmp(metric, self.best_metric):
            self.best_epoch, self.best_metric = epoch, metric
        if self.best_epoch == epoch and state['progress']['batch'] == 0:
            self._duplicate(path, os.path.join(self.checkpoint_dir, 'model_best' + self.extension))

    def _remove_recovery(self, keep: str = '') -> None:
        for path in self.recovery_files():
            if os.path.basename(path) != os.path.basename(keep):
                os.unlink(path)

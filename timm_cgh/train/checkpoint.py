"""Checkpoints of a run under timm's file names, whole at any moment, with the position in the run."""
import contextlib
import os
import re
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from timm.utils import CheckpointSaver
from timm.utils.model import unwrap_model

from timm_cgh.errors import InputError, reason
from timm_cgh.files import sync
from timm_cgh.models.checkpoints import read_file
from timm_cgh.task import MomentumTask

from .portable import read_portable

__all__ = ['RunSaver', 'read_checkpoint']


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Content of a checkpoint of a pre-training run: a torch file, or the safetensors file that `publish.py` uploads.

    The tensors of a torch file stay on disk until they are used.

    Raises:
        InputError: no such file, not readable, or not a checkpoint of a pre-training run
    """
    state = read_portable(path) if path.endswith('.safetensors') else read_file(path, 'resume', mmap=True)
    if not isinstance(state.get('task_state'), dict) or not isinstance(state.get('progress'), dict):
        raise InputError(f'resume={path}: not a checkpoint of a pre-training run (weights alone: `initial_checkpoint`)')
    progress = state['progress']
    for name in ('epoch', 'batch'):
        if type(progress.get(name)) is not int or not 0 <= progress[name] < 2 ** 40:
            raise InputError(f'resume={path}: broken, its {name} is {progress.get(name)!r}')
    return state


class RunSaver(CheckpointSaver):
    """timm's `CheckpointSaver`, with renames that never leave a name without its file, and the position in the run.

    `progress` is stored with every checkpoint: `epoch` and `batch` to continue from, and what else the run puts there.
    Recovery files are removed once the epoch's own checkpoint is written.

    Args:
        task: the task whose state is saved
        options: of the run, plain values; `model` among them
        **kwargs: see `timm.utils.CheckpointSaver`
    """

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

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        # a name from somebody else's checkpoint must not lead to other files, which the ranking would delete
        files = [
            (name, metric) for name, metric in state_dict.get('checkpoint_files', [])
            if re.fullmatch(rf'{self.save_prefix}-\d+{re.escape(self.extension)}', name)]
        super().load_state_dict({**state_dict, 'checkpoint_files': files})

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as error:
            # torch.save raises a RuntimeError of its writer where the disk is full
            if not isinstance(error, OSError) and 'PytorchStreamWriter' not in str(error):
                raise
            with contextlib.suppress(OSError):
                os.unlink(save_path)
            there = [name for name in ('last', 'model_best') if os.path.exists(self._path(name))]
            kept = f'the last good checkpoint is {self._path(there[0])}' if there else 'there is no checkpoint yet'
            raise InputError(f'output: cannot write {save_path} ({reason(error, 120)}); {kept}') from error

    def _path(self, name: str) -> str:
        return os.path.join(self.checkpoint_dir, name + self.extension)

    def _replace(self, src: str, dst: str) -> None:
        sync(src)
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
        return best

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
        if rewind or not os.path.exists(self._path('last')):
            self._duplicate(path, self._path('last'))
            self._remove_recovery(keep=path)  # other processes may still read it
        if state['progress']['batch']:
            return
        # where the run was killed after the rename of `last`, make up for those of `checkpoint-N` and `model_best`
        worst = self.checkpoint_files[-1][1] if len(self.checkpoint_files) >= self.max_history else None
        if not os.path.exists(self._checkpoint_path(epoch)) and (
                worst is None or (metric is not None and self.cmp(metric, worst))):
            self._cleanup_checkpoints(1)
            self._duplicate(path, self._checkpoint_path(epoch))
            self._track_checkpoint(self._checkpoint_path(epoch), epoch, metric, update_best_file=False)
        if metric is not None and self.best_epoch == epoch:
            self._duplicate(path, self._path('model_best'))

    def _remove_recovery(self, keep: str = '') -> None:
        for path in Path(self.recovery_dir).glob(f'{self.recovery_prefix}-*{self.extension}'):
            if path.name != os.path.basename(keep):
                path.unlink()

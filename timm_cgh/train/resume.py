"""Where a run starts: its folder, and the checkpoint that it continues from."""
import glob
import logging
import os
from datetime import datetime
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from timm.utils import NativeScaler

from timm_cgh.distributed import all_gather_objects, broadcast_object
from timm_cgh.download import HUB_PREFIX, fetch, split_hub_name
from timm_cgh.errors import InputError, checking, reason
from timm_cgh.models.backbone import timm_config
from timm_cgh.optim import load_optimizer
from timm_cgh.task import MomentumTask

from .checkpoint import position, read_checkpoint
from .portable import TASK_FILE

__all__ = ['ResumePoint', 'check_ranks_agree', 'find_checkpoint', 'find_run', 'restore']

_logger = logging.getLogger('train')


class ResumePoint(NamedTuple):
    """A checkpoint to continue from, opened once; its tensors stay on disk until they are used."""
    path: str
    state: Dict[str, Any]
    rewind: bool = False  # the folder of the run holds a later one

    @property
    def progress(self) -> Dict[str, Any]:
        return self.state['progress']


def _candidates(folder: str) -> List[str]:
    paths = [os.path.join(folder, 'last.pth.tar'), *glob.glob(os.path.join(glob.escape(folder), 'recovery-*.pth.tar'))]
    return [path for path in paths if os.path.exists(path)]


def find_checkpoint(folder: str) -> Optional[ResumePoint]:
    """The most advanced readable checkpoint of a run's folder, `last` or a recovery file; None where there is none."""
    best = None
    for path in _candidates(folder):
        try:
            point = ResumePoint(path, read_checkpoint(path, mmap=True))
        except InputError as error:
            _logger.warning(f'skipped: {error}')
            continue
        if best is None or position(point.state) > position(best.state):
            best = point
    return best


def _open_resume(resume: Optional[str], folder: str) -> Optional[ResumePoint]:
    """What `resume` names: `auto`, a file, or `hf-hub:owner/name[@revision]`."""
    if resume is None:
        return None
    newest = find_checkpoint(folder)
    if resume == 'auto':
        return newest
    if resume.startswith(HUB_PREFIX):
        repo_id, revision = split_hub_name(resume)
        with checking('resume', resume, RuntimeError):
            resume = fetch(repo_id, TASK_FILE, revision)
    state = read_checkpoint(resume, mmap=True)
    return ResumePoint(resume, state, newest is not None and position(newest.state) > position(state))


def find_run(
        output: str,
        experiment: str,
        resume: Optional[str],
        default_name: str,
) -> Tuple[str, Optional[ResumePoint]]:
    """Folder of the run, which need not exist yet, and the checkpoint to continue from, if any.

    Args:
        output: folder of all runs
        experiment: name of the run; where it is empty, the time and `default_name`
        resume: `auto` for the run's newest checkpoint, if any; a file; `hf-hub:owner/name`; None to start afresh
        default_name: of a run without a name

    Raises:
        InputError: `auto` without a name, a folder that holds another run, an unusable checkpoint
    """
    if resume == 'auto' and not experiment:
        raise InputError('resume=auto: needs the name of the run (`experiment`)')
    # the clocks of two nodes may differ: rank 0's counts
    name = experiment or broadcast_object(f'{datetime.now():%Y%m%d-%H%M%S}-{default_name}')
    folder = os.path.join(output, name)
    point = _open_resume(resume, folder)
    own = resume == 'auto' or (
        point is not None and os.path.realpath(os.path.dirname(point.path)) == os.path.realpath(folder))
    if not own and _candidates(folder):
        raise InputError(
            f'experiment={name}: {folder} holds a run; continue it (`resume` auto), or choose another name')
    return folder, point


def restore(
        point: ResumePoint,
        task: MomentumTask,
        optimizer: torch.optim.Optimizer,
        scaler: Optional[NativeScaler] = None,
) -> None:
    """Load a checkpoint into task, optimiser and scaler.

    Raises:
        InputError: a checkpoint of another model, method or optimiser
    """
    state = point.state
    try:
        task.load_checkpoint_state(state['state_dict'], state['task_state'])
        load_optimizer(optimizer, state['optimizer'])
        if scaler is not None and scaler.state_dict_key in state:
            scaler.load_state_dict(state[scaler.state_dict_key])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"resume={point.path}: a checkpoint of {state.get('arch')} that does not fit this run of "
            f"{timm_config(task.student.backbone)['architecture']} ({reason(error, 160)})") from error


def check_ranks_agree(point: Optional[ResumePoint]) -> None:
    """Raise where ranks would continue from different positions: each reads the checkpoint from its own file system.

    Collective: every rank must call.

    Raises:
        InputError: not all nodes see the same files
    """
    mine = 'no checkpoint' if point is None else 'epoch {}, batch {}'.format(*position(point.state))
    places = all_gather_objects(mine)
    for rank, place in enumerate(places):
        if place != places[0]:
            raise InputError(
                f'resume: rank 0 finds {places[0]}, rank {rank} {place}; all nodes must see the same files, so '
                f'`output` must be on a disk that they share')

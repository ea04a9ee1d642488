"""Where a run starts: its folder, and the checkpoint that it continues from."""
import glob
import itertools
import logging
import os
import shutil
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from filelock import FileLock, Timeout
from timm.utils import NativeScaler

from timm_cgh.distributed import Process, all_gather_objects, broadcast_object
from timm_cgh.download import HUB_PREFIX, fetch, split_hub_name
from timm_cgh.errors import InputError, checking, reason
from timm_cgh.files import make_folder
from timm_cgh.optim import load_optimizer
from timm_cgh.task import MomentumTask

from .checkpoint import read_checkpoint
from .portable import TASK_FILE

__all__ = ['ResumePoint', 'check_ranks_agree', 'claim_folder', 'find_checkpoint', 'find_run', 'is_within', 'restore']

_logger = logging.getLogger('train')


class ResumePoint(NamedTuple):
    """A checkpoint to continue from, opened once; its tensors stay on disk until they are used."""
    path: str
    state: Dict[str, Any]
    rewind: bool = False  # the folder of the run holds a later one

    @property
    def progress(self) -> Dict[str, Any]:
        return self.state['progress']

    @property
    def position(self) -> Tuple[int, int]:
        """Epoch and batch to continue from, counted from 0."""
        return self.progress['epoch'], self.progress['batch']


def _files(folder: str, *patterns: str) -> List[str]:
    return [path for pattern in patterns for path in sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))]


def find_checkpoint(folder: str) -> Optional[ResumePoint]:
    """The most advanced checkpoint of a run's folder: `last` or a recovery file, else an older one that is readable.

    None where the folder has no checkpoint.

    Raises:
        InputError: checkpoints, but none that can be read
    """
    broken = ''
    for patterns in (
            ('last.pth.tar', 'recovery-*.pth.tar'),
            ('checkpoint-*.pth.tar', 'milestone-*.pth.tar', 'model_best.pth.tar'),
    ):
        points = []
        for path in _files(folder, *patterns):
            try:
                points.append(ResumePoint(path, read_checkpoint(path)))
            except InputError as error:
                _logger.warning(f'skipped: {error}')
                broken = str(error)
        if points:
            return max(points, key=lambda point: point.position)
    if broken:
        raise InputError(broken)
    return None


def _open_resume(resume: Optional[str], folder: str) -> Optional[ResumePoint]:
    """What `resume` names: `auto`, a file, or `hf-hub:owner/name[@revision]`."""
    if resume is None:
        return None
    if resume == 'auto':
        return find_checkpoint(folder)
    if resume.startswith(HUB_PREFIX):
        repo_id, revision = split_hub_name(resume)
        with checking('resume', resume, RuntimeError):
            resume = fetch(repo_id, TASK_FILE, revision)
    point, newest = ResumePoint(resume, read_checkpoint(resume)), None
    with suppress(InputError):  # the folder's own are all broken
        newest = find_checkpoint(folder)
    return point._replace(rewind=newest is not None and newest.position > point.position)


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

    Raises:
        InputError: `auto` without a name, a folder that holds another run, an unusable checkpoint
    """
    if resume == 'auto' and not experiment:
        raise InputError('resume=auto: needs the name of the run (`experiment`)')
    # the clocks of two nodes may differ: rank 0's counts
    name = experiment or broadcast_object(f'{datetime.now():%Y%m%d-%H%M%S}-{default_name}')
    folder = os.path.join(output, name)
    point = _open_resume(resume, folder)
    if resume != 'auto' and not (point is not None and is_within(point.path, folder)):
        _check_unused(folder)
    return folder, point


def is_within(path: str, folder: str) -> bool:
    """Whether a file lies directly in a folder."""
    return os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder)


def _check_unused(folder: str) -> None:
    if _files(folder, 'last.pth.tar', 'recovery-*.pth.tar'):
        raise InputError(
            f'experiment={os.path.basename(folder)}: {folder} holds a run; continue it (`resume` auto), or choose '
            f'another name')


@contextmanager
def claim_folder(folder: str, output: str, named: bool, fresh: bool, process: Process) -> Iterator[str]:
    """Make the run's folder and lock it against other processes while the block runs.

    Collective: every rank must enter.

    Args:
        folder, output: see `find_run`
        named: whether the user has named the run; otherwise the folder gets a number where its name is taken
        fresh: whether the run continues from no checkpoint

    Raises:
        InputError: another process trains there, or it cannot be written
    """
    failure, lock = None, None
    if process.primary:
        try:
            folder = _make_run_folder(folder, output, named)
            lock = _lock(folder)
            if fresh:
                _check_unused(folder)  # another process may have finished a run there since `find_run`
            _remove_litter(folder)
        except InputError as error:
            failure = str(error)
    folder, failure = broadcast_object((folder, failure))
    if failure:
        raise InputError(failure)
    try:
        yield folder
    finally:
        if lock is not None:
            os.unlink(lock.lock_file)
            lock.release()


def _make_run_folder(folder: str, output: str, named: bool) -> str:
    make_folder(output, 'output', output)
    if not named:
        base = folder
        for number in itertools.count(2):  # of runs that start in the same second, each makes a folder of its own
            try:
                os.mkdir(folder)
                break
            except FileExistsError:
                folder = f'{base}-{number}'
    make_folder(folder, 'output', output)
    return folder


def _lock(folder: str) -> FileLock:
    lock = FileLock(os.path.join(folder, '.lock'))
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(f'experiment={os.path.basename(folder)}: another process is training in {folder}') from error
    except (NotImplementedError, OSError) as error:  # some network file systems
        _logger.warning(f'{folder} cannot be locked against other processes ({reason(error)})')
    return lock


def _remove_litter(folder: str) -> None:
    """Remove what a process that was killed had not finished."""
    for path in _files(folder, '.*.tmp', '*.pth.tar.tmp', 'tmp.pth.tar', 'recovery_tmp.pth.tar', '.export-*'):
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def _check_types(found: Any, wanted: Any, name: str) -> None:
    """Raise `ValueError` for what loading would convert or trip over, or not name; it checks the names itself."""
    for kind in (dict, list, torch.Tensor):
        if isinstance(wanted, kind) and not isinstance(found, kind):
            raise ValueError(f'its {name} is a {type(found).__name__}')
    if isinstance(wanted, dict):
        for key in found.keys() & wanted.keys():
            _check_types(found[key], wanted[key], key if isinstance(key, str) else name)
    elif isinstance(wanted, list):
        for pair in zip(found, wanted):
            _check_types(*pair, name)
    elif isinstance(wanted, torch.Tensor):
        if found.layout != torch.strided or found.is_nested or found.is_quantized or found.is_meta:
            raise ValueError(f'its {name} is not dense')
        if wanted.is_floating_point() != found.is_floating_point():
            raise ValueError(f'its {name} is {found.dtype}, not {wanted.dtype}')
        if found.shape != wanted.shape:
            raise ValueError(f'its {name} is {tuple(found.shape)}, not {tuple(wanted.shape)}')


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
        _check_types(state, {**task.get_checkpoint_state(), 'optimizer': optimizer.state_dict()}, 'content')
        task.load_checkpoint_state(state['state_dict'], state['task_state'])
        load_optimizer(optimizer, state['optimizer'])
        if scaler is not None and scaler.state_dict_key in state:
            scaler.load_state_dict(state[scaler.state_dict_key])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"resume={point.path}: a checkpoint of {state.get('arch')} that does not fit this run of "
            f"{task.student.backbone.pretrained_cfg['architecture']} ({reason(error, 160)})") from error


def check_ranks_agree(point: Optional[ResumePoint]) -> None:
    """Raise where ranks would continue from different positions: each reads the checkpoint from its own file system.

    Collective: every rank must call.

    Raises:
        InputError: not all nodes see the same files
    """
    mine = 'no checkpoint' if point is None else 'epoch {}, batch {}'.format(*point.position)
    places = all_gather_objects(mine)
    for rank, place in enumerate(places):
        if place != places[0]:
            raise InputError(
                f'resume: rank 0 finds {places[0]}, rank {rank} {place}; all nodes must see the same files, so '
                f'`output` must be on a disk that they share')

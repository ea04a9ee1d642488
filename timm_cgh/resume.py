"""Where a run of `train.py` starts: its folder, and the checkpoint that it goes on from."""
import argparse
import os
from datetime import datetime
from typing import Any, Dict, Optional, Tuple

import torch
import torch.distributed as dist
from timm.utils import NativeScaler

from timm_cgh.errors import InputError
from timm_cgh.files import make_folder
from timm_cgh.optim import load_optimizer
from timm_cgh.task import MomentumTask, newest_files, read_checkpoint, resume_path

__all__ = ['check_same_place', 'open_run_folder', 'order_of', 'restore']


def open_run_folder(args: argparse.Namespace, size: int) -> Tuple[str, Optional[str]]:
    """Folder of the run, and the checkpoint to go on from, if any."""
    if args.resume == 'auto' and not args.experiment:
        raise InputError('--resume auto: say which run with --experiment NAME')
    started = datetime.now().strftime('%Y%m%d-%H%M%S')
    name = args.experiment or f"{started}-{args.model.replace('/', '_').replace(':', '_')}-{size}"
    if dist.is_initialized():  # the clocks of two nodes may differ
        names = [name]
        dist.broadcast_object_list(names, src=0)
        name, = names
    folder = os.path.join(args.output, name)
    resume = resume_path(args.resume, folder)
    here = args.resume == 'auto' or (
        bool(resume) and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(folder))
    if not here and newest_files(folder):
        raise InputError(f'--experiment {name}: {folder} holds a run; --resume auto continues it, or take another name')
    make_folder(folder, '--output', args.output)
    return folder, resume


def order_of(args: argparse.Namespace, steps: int) -> Dict[str, int]:
    """What the order of the batches depends on: a checkpoint in the middle of an epoch holds for this order alone."""
    return dict(
        seed=args.seed,
        steps=steps,
        batch_size=args.batch_size,
        world_size=args.world_size,
        grad_accum_steps=args.grad_accum_steps,
    )


def restore(
        path: str,
        args: argparse.Namespace,
        task: MomentumTask,
        optimizer: torch.optim.Optimizer,
        scaler: Optional[NativeScaler] = None,
) -> Dict[str, Any]:
    """Load a checkpoint of a run into task, optimiser and scaler; gives its whole content.

    Raises:
        InputError: not such a file, or one of another model or method
    """
    state = read_checkpoint(path)
    try:
        task.load_checkpoint_state(state['state_dict'], state['task_state'])
        load_optimizer(optimizer, state['optimizer'])
        if scaler is not None and scaler.state_dict_key in state:
            scaler.load_state_dict(state[scaler.state_dict_key])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())[:160]
        raise InputError(
            f"--resume {path}: a checkpoint of '{state.get('arch')}' that does not fit --model {args.model} and the "
            f'options of the method ({reason})') from error
    return state


def check_same_place(resume: Optional[str], epoch: int, batch: int, device: torch.device) -> None:
    """Refuse processes that would go on from different places: each reads the checkpoint from its own file system."""
    if not dist.is_initialized():
        return
    place = torch.tensor([resume is not None, epoch, batch], device=device)
    places = [torch.empty_like(place) for _ in range(dist.get_world_size())]
    dist.all_gather(places, place)
    for rank, other in enumerate(places):
        if not torch.equal(other, places[0]):
            where = [f'epoch {int(p[1])}, batch {int(p[2])}' if p[0] else 'no checkpoint' for p in (places[0], other)]
            raise InputError(
                f'--resume: process 0 finds {where[0]}, process {rank} {where[1]}; all nodes must see the same files, '
                f'--output on a disk that they share')

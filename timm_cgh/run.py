"""From the arguments of `train.py` to the parts of a run."""
import argparse
import difflib
import logging
import math
import os
import tempfile
from datetime import datetime
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from timm.utils import NativeScaler
from torch.utils.data import Dataset

from timm_cgh.data import ViewSpec, is_stream, labels_of
from timm_cgh.errors import InputError, blame
from timm_cgh.eval import eval_crop_pct
from timm_cgh.eval.relations import RelationTracker, Selection, relation_curve, save_relations
from timm_cgh.hub import export_backbone, load_weights, plain_backbone
from timm_cgh.models import create_backbone
from timm_cgh.optim import load_optimizer
from timm_cgh.report import save_curves
from timm_cgh.summary import epochs_done
from timm_cgh.task import PEERS, CGHTask, MomentumTask, create_task, newest_files, read_checkpoint, resume_path

__all__ = [
    'build_task', 'check_same_place', 'check_view_sizes', 'create_tracker', 'export_run', 'leave_files',
    'open_run_folder', 'order_of', 'restore', 'warn_if_collapsed',
]

_logger = logging.getLogger('train')


def build_task(args: argparse.Namespace) -> Tuple[MomentumTask, Dict[str, Any]]:
    """Backbone from timm, with the weights to start from, and the task around it; also timm's arguments for it."""
    name = args.model
    if ':' not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name.split('.')[0], timm.list_models(), n=3)
        hint = f", did you mean {', '.join(near)}?" if near else ''
        raise InputError(f'--model {name}: timm has no such model{hint}')
    options = dict(args.model_kwargs, in_chans=args.in_chans)
    if args.drop_path is not None:
        options['drop_path_rate'] = args.drop_path
    wrapper = dict(features_only=True, out_indices=args.out_indices or (-2, -1)) if args.features_only else {}
    with blame('--model', name):
        backbone = create_backbone(name, img_size=args.img_size, pretrained=args.pretrained, **options, **wrapper)
    if args.initial_checkpoint:
        with blame('--initial-checkpoint', args.initial_checkpoint):
            load_weights(backbone, args.initial_checkpoint)
    if args.grad_checkpointing:
        with blame('--grad-checkpointing'):
            getattr(backbone, 'model', backbone).set_grad_checkpointing(True)
    options['img_size'] = args.img_size
    if args.features_only:
        with blame('--features-only'):
            plain_backbone(backbone, **options)  # what the run exports in the end
    norms = {'batch': nn.BatchNorm2d, 'group': lambda dim: nn.GroupNorm(1, dim), 'none': nn.Identity}
    if args.method in PEERS:
        return _build_peer_task(args, backbone), options
    with blame('--out-indices' if args.out_indices else '--model', args.out_indices or name):
        task = create_task(
            backbone,
            context='global' if args.method == 'moco' else args.context,
            method=args.method,
            bank_size=args.bank_size,
            momentum=args.momentum_teacher,
            shuffle_bn=args.shuffle_bn,
            bn_splits=args.bn_splits,
            bank_labels=args.track_relations is not None,
            out_indices=None if args.features_only else args.out_indices,
            hidden_dim=args.hidden_dim,
            embed_dim=args.embed_dim,
            predictor=args.predictor,
            hyper_norm_layer=norms[args.hyper_norm],
            temp_student=args.temp_student,
            temp_teacher=args.temp_teacher,
            temp_hyper=args.temp_hyper,
            temp_hyper_teacher=args.temp_hyper_teacher,
            relation_weight=args.relation_weight,
            contrast_temp=args.contrast_temp,
        )
    return task, options


def _build_peer_task(args: argparse.Namespace, backbone: nn.Module) -> MomentumTask:
    with blame('--method', args.method):
        try:
            from timm_cgh.task.peers import create_peer_task
        except ImportError as error:
            raise InputError(f"--method {args.method}: needs the lightly library (pip install 'timm-cgh[peers]')") \
                from error
    with blame('--method-kwargs', args.method_kwargs):
        return create_peer_task(
            args.method,
            backbone,
            hidden_dim=args.hidden_dim,
            embed_dim=args.embed_dim,
            bank_size=args.bank_size,
            momentum=args.momentum_teacher,
            **args.method_kwargs,
        )


@torch.no_grad()
def check_view_sizes(task: MomentumTask, views: Sequence[ViewSpec], in_chans: int) -> None:
    """Try the student on every size of image that it will see.

    Raises:
        InputError: the model does not take one of them
    """
    task.eval()
    full = views[0].size
    with blame('--img-size', full):
        task.student(torch.zeros(2, in_chans, full, full))
    for size in {view.size for view in views} - {full}:
        try:
            task.student(torch.zeros(2, in_chans, full, full), torch.zeros(2, in_chans, size, size))
        except Exception as error:  # each model has its own way to refuse
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f'--multi-crop {size}: the model does not take images of {full} and {size} px ({reason}); plain ViTs do '
                f'with --model-kwargs dynamic_img_size=True') from error


def create_tracker(args: argparse.Namespace, task: CGHTask, dataset: Dataset) -> Optional[RelationTracker]:
    """What `--track-relations` asks for; streams have no labels until they are read: their columns may stay blank."""
    if args.track_relations is None:
        return None
    labels = None if is_stream(dataset) else labels_of(dataset)
    if not is_stream(dataset) and (labels is None or len(np.unique(labels[labels >= 0])) < 2):
        raise InputError('--track-relations: needs training images of two classes or more, these have no labels')
    selection = Selection.parse(args.track_relations)
    with blame('--track-relations', args.track_relations):
        selection.check(args.bank_size)
    return RelationTracker(selection, {'global': task.loss.temp_teacher, 'hyper': task.loss.temp_hyper_teacher})


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
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f'--output {args.output}: cannot write to {folder} ({error.strerror})') from error
    return folder, resume


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


def order_of(args: argparse.Namespace, steps: int) -> Dict[str, int]:
    """What the order of the batches depends on: a checkpoint in the middle of an epoch holds for this order alone."""
    return dict(
        seed=args.seed,
        steps=steps,
        batch_size=args.batch_size,
        world_size=args.world_size,
        grad_accum_steps=args.grad_accum_steps,
    )


def warn_if_collapsed(row: Dict[str, Any], bank_size: int) -> None:
    """Say so when the averages of an epoch are those of a representation that has collapsed, or learns nothing."""
    for name in ('global', 'hyper'):
        std, entropy = row.get(f'train_std_{name}'), row.get(f'train_entropy_{name}')
        if std is not None and std < 0.05:
            _logger.warning(
                f'The {name} embeddings are nearly one point (standard deviation {std:.3f} of 1): the representation '
                f'has collapsed. A lower learning rate, a longer --warmup-epochs or --contrast-warmup-epochs may help.')
        if entropy is not None and math.log(bank_size) - entropy < 0.02:
            _logger.warning(
                f'The {name} target is flat over the bank (entropy {entropy:.2f}, at most {math.log(bank_size):.2f}): it '
                f'tells the student nothing. A lower teacher temperature or a longer --contrast-warmup-epochs may '
                f'help.')


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


def export_run(
        args: argparse.Namespace,
        folder: str,
        task: MomentumTask,
        rows: List[Dict[str, Any]],
        data_config: Dict[str, Any],
        model_kwargs: Dict[str, Any],
) -> None:
    """Write the backbone as it is now, a plain timm model, to `export/`."""
    export_backbone(
        task.student.backbone,
        os.path.join(folder, 'export'),
        **data_config,
        crop_pct=eval_crop_pct(data_config['input_size'][-1]),
        tag=f"{f'cgh_{args.context}' if args.method == 'cgh' else args.method}_{epochs_done(rows)}ep",
        model_kwargs=model_kwargs,
    )


def leave_files(
        args: argparse.Namespace,
        folder: str,
        task: MomentumTask,
        rows: List[Dict[str, Any]],
        knn_levels: Dict[str, float],
        tracker: Optional[RelationTracker] = None,
) -> List[str]:
    """Draw the pictures of a run, which needs an epoch to its end; gives the names of the files that it has."""
    names = ('args.yaml', 'summary.csv', 'last.pth.tar', 'export/')
    files = [name for name in names if os.path.exists(os.path.join(folder, name))]
    if not rows:
        return files
    name = os.path.basename(folder)
    drawn = save_curves(rows, os.path.join(folder, 'curves.png'), name, knn_levels)
    files.append('curves.png' if drawn else 'no curves.png (pip install matplotlib)')
    if tracker is not None and drawn:
        curves = [relation_curve(rows, context) for context in sorted(task.banks, reverse=True)]  # hyper first
        save_relations(curves, os.path.join(folder, 'relations.png'), tracker.selection, [args.bank_size], name)
        files.append('relations.png')
    return files

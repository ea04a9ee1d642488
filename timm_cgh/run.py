"""From the arguments of `train.py` to the parts of a run."""
import argparse
import difflib
import logging
import math
import os
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import Dataset

from timm_cgh.data import ViewSpec, is_stream, labels_of
from timm_cgh.errors import InputError, blame
from timm_cgh.eval import eval_crop_pct
from timm_cgh.eval.relations import RelationTracker, Selection, relation_curve, save_relations
from timm_cgh.hub import export_backbone, load_weights, plain_backbone
from timm_cgh.models import create_backbone
from timm_cgh.report import save_curves
from timm_cgh.summary import epochs_done
from timm_cgh.task import PEERS, CGHTask, MomentumTask, create_task

__all__ = [
    'all_unreadable', 'build_task', 'check_view_sizes', 'create_tracker', 'describe_run', 'export_run', 'leave_files',
    'warn_if_collapsed',
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


def describe_run(args: argparse.Namespace, task: MomentumTask, images: int, img_size: int, batches: int) -> str:
    """What begins: model, method, images and settings, in one line."""
    method = f'{args.context} context' if args.method == 'cgh' else args.method
    millions = sum(p.numel() for p in task.student.backbone.parameters()) / 1e6
    return (
        f'{args.model} ({millions:.2f} M parameters), {method}, {images} images of {img_size} px, {batches} batches of '
        f'{args.batch_size} x {args.world_size} an epoch, lr {args.lr:g}, bank {args.bank_size}, on {args.device}')


def all_unreadable(unreadable: Set[str]) -> Set[str]:
    """Names of the images that any process passed over; in DDP, all must call."""
    if not dist.is_initialized():
        return unreadable
    names: List[Set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(names, unreadable)
    return set().union(*names)


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

"""The parts of a run: backbone, task, optimiser, schedule, evaluation."""
import importlib.util
import logging
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.utils.data import Dataset

from timm_cgh.data import ViewSpec, is_stream, read_labels
from timm_cgh.errors import InputError, checking, reason
from timm_cgh.models import create_backbone, plain_backbone
from timm_cgh.models.backbone import ImageSize, as_image_size, check_model
from timm_cgh.models.checkpoints import load_weights
from timm_cgh.optim import fill_momentum
from timm_cgh.task import BASELINES, CGHTask, MomentumTask, create_task
from timm_cgh.task.positives import RelationTracker, Selection

__all__ = ['Backbone', 'build_backbone', 'build_optimizer', 'build_scheduler', 'build_task', 'build_tracker',
           'check_views']

_logger = logging.getLogger('train')


class Backbone(NamedTuple):
    """A timm module to train, and the arguments of `create_backbone` that build its plain model again for export."""
    module: nn.Module
    model_kwargs: Dict[str, Any]


def build_backbone(
        model: str,
        in_chans: int = 3,
        img_size: Optional[ImageSize] = None,
        pretrained: bool = False,
        initial_checkpoint: Optional[str] = None,
        features_only: bool = False,
        out_indices: Optional[Sequence[int]] = None,
        drop_path: Optional[float] = None,
        grad_checkpointing: bool = False,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> Backbone:
    """Create the backbone, with the weights that training starts from.

    Args:
        model: timm model name
        in_chans, img_size: channels and side of the images, px, or (H, W)
        pretrained, initial_checkpoint: start from timm's weights, or from these (see `load_weights`)
        features_only, out_indices: build timm's `features_only` wrapper, with these maps
        drop_path: stochastic depth rate
        grad_checkpointing: recompute activations in the backward pass
        model_kwargs: further arguments of `timm.create_model`

    Raises:
        InputError: no such model, arguments that it does not take, weights that do not fit
    """
    check_model(model, model_kwargs)
    options = dict(model_kwargs or {}, in_chans=in_chans)
    if drop_path is not None:
        options['drop_path_rate'] = drop_path
    wrapper = dict(features_only=True, out_indices=out_indices or (-2, -1)) if features_only else {}
    # constructors of 98 model modules refuse arguments in many ways
    with checking('model', model, AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError):
        backbone = create_backbone(model, img_size=img_size, pretrained=pretrained, **options, **wrapper)
    if initial_checkpoint:
        load_weights(backbone, initial_checkpoint, parameter='initial_checkpoint')
    if grad_checkpointing:
        with checking('grad_checkpointing', None, AssertionError):
            getattr(backbone, 'model', backbone).set_grad_checkpointing(True)
    options['img_size'] = as_image_size(img_size)
    if features_only:
        with checking('features_only', None, RuntimeError):
            plain_backbone(backbone, **options)  # what the run exports
    return Backbone(backbone, options)


def build_task(
        backbone: nn.Module,
        method: str = 'cgh',
        method_kwargs: Optional[Mapping[str, Any]] = None,
        **options: Any,
) -> MomentumTask:
    """The training task of a method: `cgh`, `moco`, or one of `BASELINES`, which take `method_kwargs` as well.

    Args:
        **options: of `create_task`

    Raises:
        InputError: options that the method or the backbone does not take
    """
    if method not in BASELINES:
        with checking('out_indices' if options.get('out_indices') else 'model', options.get('out_indices'), ValueError):
            return create_task(backbone, method=method, **options)
    try:
        from timm_cgh.task.baselines import create_baseline_task
    except ImportError as error:
        raise InputError(f"method={method}: needs the lightly library (pip install 'timm-cgh[baselines]')") from error
    with checking('method_kwargs', method_kwargs, TypeError, ValueError):
        return create_baseline_task(
            method,
            backbone,
            **{name: options[name] for name in ('hidden_dim', 'embed_dim', 'bank_size', 'momentum')},
            **(method_kwargs or {}),
        )


@torch.no_grad()
def check_views(task: MomentumTask, views: Sequence[ViewSpec], in_chans: int) -> None:
    """Run the student once on every image size that it will see.

    Raises:
        InputError: the model does not take one of them
    """
    refusals = (AssertionError, RuntimeError, ValueError)
    task.eval()
    full = views[0].size
    whole = torch.zeros(2, in_chans, *views[0].shape)
    with checking('img_size', full, *refusals):
        task.student(whole)
    for size, shape in {view.size: view.shape for view in views if view.size != full}.items():
        try:
            task.student(whole, torch.zeros(2, in_chans, *shape))
        except refusals as error:
            raise InputError(
                f'multi_crop={size}: the model does not take images of {full} and of {size} px ({reason(error)}); '
                f'plain ViTs do with `model_kwargs` dynamic_img_size=True') from error


def build_tracker(track_relations: Optional[str], task: CGHTask, dataset: Dataset) -> Optional[RelationTracker]:
    """Tracker of the positives that the teacher's relations select; None where none is asked for.

    Args:
        track_relations: see `Selection.parse`
        task: whose banks and temperatures are used
        dataset: training images; streams have no labels until they are read, their columns may stay blank

    Raises:
        InputError: images without labels, a selection that does not fit the bank
    """
    if track_relations is None:
        return None
    labels = None if is_stream(dataset) else read_labels(dataset)
    if not is_stream(dataset) and (labels is None or len(np.unique(labels[labels >= 0])) < 2):
        raise InputError('track_relations: needs training images of at least two classes, these have no labels')
    selection = Selection.parse(track_relations)
    with checking('track_relations', track_relations, ValueError):
        selection.check(task.banks['global'].size)
    return RelationTracker(selection, {'global': task.loss.temp_teacher, 'hyper': task.loss.temp_hyper_teacher})


def build_optimizer(student: nn.Module, no_decay_norm_bias: bool, **options: Any) -> torch.optim.Optimizer:
    """timm's optimiser, in torch's fused form where there is one.

    Args:
        no_decay_norm_bias: exempt norms and biases from weight decay
        **options: of `timm.optim.create_optimizer_v2`

    Raises:
        InputError: no such optimiser, or arguments that it does not take
    """
    if options['opt'].endswith('kron') and importlib.util.find_spec('opt_einsum') is None:
        # timm warns only, but its products then ask for 100 GB
        raise InputError(f"opt={options['opt']}: needs the opt_einsum package (pip install opt_einsum)")
    if options['opt'] in ('momentum', 'sgd', 'adam', 'adamw') and not options.get('foreach'):
        options.setdefault('fused', True)  # one pass over the parameters, on any device
    with checking('opt', options['opt'], AssertionError, ImportError, RuntimeError, TypeError, ValueError):
        # Some read their arguments in the first step only, or need more than gradients: try one
        probe = nn.Linear(2, 2)
        trial = create_optimizer_v2(probe, **options)
        probe(torch.ones(1, 2)).sum().backward()
        trial.step()
        optimizer = create_optimizer_v2(student, filter_bias_and_bn=no_decay_norm_bias, **options)
    fill_momentum(optimizer)
    return optimizer


def build_scheduler(
        optimizer: torch.optim.Optimizer,
        options: Mapping[str, Any],
        epochs: int,
        updates_per_epoch: int,
) -> Optional[Scheduler]:
    """timm's schedule, per update, with the warm-up inside the stated epochs; None for a constant rate.

    Args:
        optimizer: whose rates are set
        options: of `timm.scheduler.create_scheduler_v2`, epochs counted from the beginning of the run
        epochs: of the run, warm-up included (timm would add it)

    Raises:
        InputError: options that the schedule does not take
    """
    warmup = options['warmup_epochs']
    with checking('sched', options['sched'], AssertionError, TypeError, ValueError):
        scheduler, _ = create_scheduler_v2(optimizer, **{
            **options,
            'num_epochs': epochs - warmup,
            'warmup_prefix': True,
            'decay_milestones': sorted(max(0, epoch - warmup) for epoch in options['decay_milestones']),
            'step_on_epochs': False,
            'updates_per_epoch': updates_per_epoch,
        })
    return scheduler

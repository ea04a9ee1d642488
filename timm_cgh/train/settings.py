"""The options of `train.py`: checked, completed from the data and the checkpoint, and sorted by who takes them."""
import argparse
import logging
import math
from typing import Any, Dict, List, Optional, Tuple, Union

import torch.nn as nn

from timm_cgh.arguments import arguments_of
from timm_cgh.data import ViewSpec, multi_crop, two_views
from timm_cgh.errors import InputError
from timm_cgh.task import BASELINES, create_task

__all__ = ['HYPER_NORMS', 'check_method', 'choose_views', 'settle', 'task_options']

_logger = logging.getLogger('train')
HYPER_NORMS = {'batch': nn.BatchNorm2d, 'group': lambda dim: nn.GroupNorm(1, dim), 'none': nn.Identity}


def default_bank_size(num_images: int) -> int:
    """A power of two, at most an eighth of the images: the authors' 131072 on ImageNet-1k, and 4096 on CIFAR-10; of
    fewer than 32 images 2, since the relation to a single embedding is constant.
    """
    return min(131072, 2 ** int(math.log2(max(2, num_images // 8))))


def check_method(args: argparse.Namespace) -> None:
    """Raise `InputError` for options that have no meaning for the method."""
    if args.method == 'cgh':
        return
    baseline = args.method in BASELINES
    for parameter, given in (
            ('context', args.context != 'cross'),
            ('predictor', args.predictor),
            ('weak_scale', args.weak_scale is not None),
            ('track_relations', args.track_relations is not None),
            ('multi_crop', baseline and args.multi_crop is not None),
            ('shuffle_bn', baseline and args.shuffle_bn),
            ('bn_splits', baseline and args.bn_splits > 1),
            ('features_only', baseline and args.features_only),
    ):
        if given:
            raise InputError(f'{parameter}: has no meaning for the method {args.method}')


def _check_batches(args: argparse.Namespace, num_images: int, world_size: int) -> None:
    if num_images < 2:
        raise InputError('data_dir: holds a single image, training needs several')
    if args.batch_size < 2:
        raise InputError('batch_size=1: must be at least 2, for batch norm')
    if args.sync_bn and (world_size == 1 or args.device == 'cpu'):
        raise InputError('sync_bn: needs several processes with a GPU each (`shuffle_bn` works on any device)')
    if args.bn_splits > 1 and args.sync_bn:
        raise InputError(f'bn_splits={args.bn_splits}: cannot be combined with `sync_bn`')
    if args.bn_splits > 1 and (args.batch_size % args.bn_splits or args.batch_size < 2 * args.bn_splits):
        raise InputError(
            f'bn_splits={args.bn_splits}: must divide `batch_size` {args.batch_size} into equal parts of at least two '
            f'images')


def _settle_warmup(args: argparse.Namespace) -> None:
    auto = min(5.0, args.epochs / 4)
    if args.warmup_epochs is None:
        args.warmup_epochs = auto
    if args.method != 'cgh':
        args.contrast_warmup_epochs = 0.0
    elif args.contrast_warmup_epochs is None:
        args.contrast_warmup_epochs = 0.0 if args.context == 'global' else auto
    for name in ('warmup_epochs', 'contrast_warmup_epochs'):
        value = getattr(args, name)
        if value >= args.epochs:
            raise InputError(f'{name}={value:g}: must be shorter than the run (`epochs` {args.epochs})')


def _settle_bank_size(args: argparse.Namespace, num_images: int, saved: Optional[int]) -> None:
    if args.bank_size is None:
        args.bank_size = saved or default_bank_size(num_images)
        _logger.info(f'Memory banks of {args.bank_size} embeddings for {num_images} images')
    elif saved not in (None, args.bank_size):
        raise InputError(f'bank_size={args.bank_size}: the banks of `resume` {args.resume} hold {saved}')
    elif args.bank_size < 2:
        raise InputError('bank_size=1: must be at least 2, the relation to a single embedding is constant')
    elif saved is None and args.bank_size > num_images:
        raise InputError(
            f'bank_size={args.bank_size}: larger than the data set ({num_images} images), so that every image would '
            f'be in the bank several times; at most {default_bank_size(num_images)} is advised')


def settle(
        args: argparse.Namespace,
        num_images: int,
        world_size: int = 1,
        saved_bank_size: Optional[int] = None,
) -> None:
    """Check the options of `train.py` against each other and fill in those that were left open, in place.

    Args:
        num_images: in the training set
        saved_bank_size: of the checkpoint that the run continues from, whatever happened to the images since

    Raises:
        InputError: options that contradict each other or would train nothing
    """
    check_method(args)
    _check_batches(args, num_images, world_size)
    _settle_warmup(args)
    _settle_bank_size(args, num_images, saved_bank_size)
    settle_decay_rate(args)
    if args.lr is None:
        ratio = args.batch_size * world_size * args.grad_accum_steps / args.lr_base_size
        args.lr = args.lr_base * (ratio if args.lr_base_scale == 'linear' else math.sqrt(ratio))


def settle_decay_rate(args: argparse.Namespace) -> None:
    """Fill in the default factor of the learning rate at each step; timm takes the power of poly from it."""
    if args.decay_rate is None:
        args.decay_rate = 1.0 if args.sched == 'poly' else 0.1


def task_options(args: argparse.Namespace) -> Dict[str, Any]:
    """The keyword arguments of `create_task` in the options."""
    return {
        **arguments_of(create_task, args),
        'context': 'global' if args.method == 'moco' else args.context,
        'momentum': args.momentum_teacher,  # `momentum` is the optimiser's
        'bank_labels': args.track_relations is not None,
        'out_indices': None if args.features_only else args.out_indices,
        'hyper_norm_layer': HYPER_NORMS[args.hyper_norm],
        'device': None,  # the task moves to its device once it is complete
    }


def choose_views(args: argparse.Namespace, img_size: Union[int, Tuple[int, int]]) -> List[ViewSpec]:
    """The views of each image: the teacher's first, then the student's."""
    views = two_views(**{**arguments_of(two_views, args), 'img_size': img_size})
    if args.method != 'cgh':  # the other methods contrast two strongly augmented views
        views[0] = views[1]
    if args.multi_crop is not None:
        return multi_crop(views, args.multi_crop, args.multi_crop_scale)
    if args.multi_crop_scale:
        raise InputError('multi_crop_scale: needs `multi_crop` (without it there is one crop, of `scale`)')
    return views

"""What `train.py` takes its arguments to mean."""
import argparse
import logging
import math
import os
from typing import Any, Dict, List, Optional

from timm_cgh.data import ViewSpec, multi_crop, two_views
from timm_cgh.errors import InputError
from timm_cgh.task import PEERS, read_checkpoint, resume_path

__all__ = ['choose_settings', 'choose_views', 'resolve_data_config']

_logger = logging.getLogger('train')


def resolve_data_config(args: argparse.Namespace, cfg: Dict[str, Any]) -> Dict[str, Any]:
    """Size and normalisation of the images: the command line's, else the model's own."""
    size = args.img_size or cfg['input_size'][-1]
    config = dict(input_size=(args.in_chans, size, size), interpolation=args.train_interpolation)
    for name in ('mean', 'std'):
        values = list(getattr(args, name) or cfg[name])
        if len(values) != args.in_chans:
            if len(values) > 1 and getattr(args, name):
                raise InputError(f'--{name}: {len(values)} values for --in-chans {args.in_chans}')
            values = [sum(values) / len(values)] * args.in_chans  # grey images: the average of the colours
        config[name] = tuple(values)
    return config


def default_bank_size(num_images: int) -> int:
    """A power of two, at most an eighth of the images: the authors' 131072 on ImageNet-1k, and 4096 on CIFAR-10."""
    return min(131072, 2 ** int(math.log2(max(1, num_images // 8))))


def saved_bank_size(args: argparse.Namespace) -> Optional[int]:
    """Size of the banks in the checkpoint that `--resume` goes on from, whatever has come to the images since; None where
    there is none, or it does not say.
    """
    path = resume_path(args.resume, os.path.join(args.output, args.experiment))
    return read_checkpoint(path, mmap=True)['progress'].get('bank_size') if path else None


def check_method(args: argparse.Namespace) -> None:
    """Refuse options that have no meaning for the method."""
    if args.method != 'cgh':
        for flag, given in (
                ('--context', args.context != 'cross'),
                ('--predictor', args.predictor),
                ('--weak-scale', args.weak_scale is not None),
                ('--track-relations', args.track_relations is not None),
                ('--multi-crop', args.multi_crop is not None and args.method in PEERS),
                ('--shuffle-bn', args.shuffle_bn and args.method in PEERS),
                ('--bn-splits', args.bn_splits > 1 and args.method in PEERS),
                ('--features-only', args.features_only and args.method in PEERS),
        ):
            if given:
                raise InputError(f'{flag}: has no meaning for --method {args.method}')


def choose_settings(args: argparse.Namespace, num_images: int) -> None:
    """Refuse settings that would train nothing, or not what was meant; choose what was left open, and say so."""
    check_method(args)
    if args.sync_bn and (args.world_size == 1 or args.device == 'cpu'):
        raise InputError('--sync-bn: needs several processes with a GPU each (--shuffle-bn works on any device)')
    if args.bn_splits > 1 and args.sync_bn:
        raise InputError(f'--bn-splits {args.bn_splits}: has no meaning with --sync-bn')
    if args.bn_splits > 1 and (args.batch_size % args.bn_splits or args.batch_size < 2 * args.bn_splits):
        raise InputError(
            f'--bn-splits {args.bn_splits}: the parts of --batch-size {args.batch_size} must be equal, and of two images at '
            f'least')
    auto = min(5.0, args.epochs / 4)
    if args.warmup_epochs is None:
        args.warmup_epochs = auto
    if args.method != 'cgh':
        args.contrast_warmup_epochs = 0.0
    elif args.contrast_warmup_epochs is None:
        args.contrast_warmup_epochs = 0.0 if args.context == 'global' else auto
    for flag, value in (('warmup', args.warmup_epochs), ('contrast-warmup', args.contrast_warmup_epochs)):
        if value >= args.epochs:
            raise InputError(f'--{flag}-epochs {value:g}: as long as the run (--epochs {args.epochs}), take less')
    saved = saved_bank_size(args)
    if args.bank_size is None:
        args.bank_size = saved or default_bank_size(num_images)
        _logger.info(f'Memory banks of {args.bank_size} embeddings for {num_images} images (--bank-size)')
    elif saved not in (None, args.bank_size):
        raise InputError(f'--bank-size {args.bank_size}: the banks of --resume {args.resume} hold {saved}')
    elif saved is None and args.bank_size > num_images:
        raise InputError(
            f'--bank-size {args.bank_size}: larger than the data set ({num_images} images), every image would sit in '
            f'it several times; {default_bank_size(num_images)} would do')
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    if args.lr is None:
        args.lr = args.lr_base * (ratio if args.lr_base_scale == 'linear' else math.sqrt(ratio))
    for name in ('scale', 'ratio', 'weak_scale', 'gaussian_blur_sigma'):
        low_high = getattr(args, name)
        if low_high and low_high[0] > low_high[1]:
            low, high = low_high
            raise InputError(f"--{name.replace('_', '-')} {low:g} {high:g}: the first must not exceed the second")


def choose_views(args: argparse.Namespace, size: int) -> List[ViewSpec]:
    """The views of each image: the teacher's first, then the student's."""
    views = two_views(
        size,
        scale=args.scale,
        weak_scale=args.weak_scale,
        ratio=args.ratio,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        jitter_prob=args.color_jitter_prob,
        gray_prob=args.grayscale_prob,
        blur_prob=args.gaussian_blur_prob,
        blur_sigma=args.gaussian_blur_sigma,
        interpolation=args.train_interpolation,
    )
    if args.method != 'cgh':  # the other methods contrast two heavily augmented views
        views[0] = views[1]
    if args.multi_crop is not None:
        views = multi_crop(views, args.multi_crop, args.multi_crop_scale)
    elif args.multi_crop_scale:
        raise InputError('--multi-crop-scale: without --multi-crop there is one crop, of --scale')
    return views

"""The backbone that an evaluation's command line names."""
import argparse
import difflib
import logging
import os
from typing import Any, Dict, Tuple

import timm
import torch
import torch.nn as nn
from timm.utils import is_primary

from timm_cgh.data import image_mode
from timm_cgh.errors import InputError, blame
from timm_cgh.hub import plain_backbone
from timm_cgh.models import create_backbone
from timm_cgh.models.weights import weights_digest

from .checkpoints import backbone_state, read_weights, run_arguments

__all__ = ['load_backbone']

_logger = logging.getLogger('eval')


def _check_model_name(name: str) -> None:
    if name.startswith('local-dir:'):
        folder = name.partition(':')[2]
        if not os.path.isfile(os.path.join(folder, 'config.json')):
            raise InputError(f"--model {name}: no config.json in {folder}; a run's folder has an export/")
    elif ':' not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name.split('.')[0], timm.list_models(), n=3)
        hint = f", did you mean {', '.join(near)}?" if near else ''
        raise InputError(f'--model {name}: timm has no such model{hint}')


def load_backbone(args: argparse.Namespace) -> Tuple[nn.Module, Dict[str, Any]]:
    """The backbone that --model, --checkpoint and --teacher name, and how its images are to be prepared.

    What a run's checkpoint says of its own model and images is taken where the command line is silent. Sets
    `args.model` and `args.in_chans` to what they come to, and `args.digest` to the weights' (`weights_digest`).

    Returns:
        plain timm model (`num_classes=0`) on the CPU in eval mode, and `input_size`, `mean`, `std`, `interpolation`

    Raises:
        InputError: no such model or file, weights that do not fit, images that the model does not take
    """
    if args.teacher and not args.checkpoint:
        raise InputError("--teacher: is in a run's checkpoint, name it by --checkpoint RUN/last.pth.tar")
    content = read_weights(args.checkpoint) if args.checkpoint else {}
    run = run_arguments(content)
    if args.model is None:
        if not run:
            raise InputError('--model: say which (timm name, local-dir:RUN/export, hf-hub:OWNER/NAME)')
        args.model = run['model']
    elif run.get('model') != args.model:  # another model's settings do not matter
        run = {}
    _check_model_name(args.model)
    options = {**(run.get('model_kwargs') or {}), **args.model_kwargs}
    if args.in_chans or run.get('in_chans'):
        options['in_chans'] = args.in_chans or run['in_chans']
    size = args.img_size or run.get('img_size')
    wrapper = {}
    if run.get('features_only'):
        wrapper = dict(features_only=True, out_indices=run.get('out_indices') or (-2, -1))
    try:
        model = create_backbone(
            args.model, img_size=size, pretrained=not args.checkpoint and not args.no_pretrained, **options, **wrapper)
    except Exception as error:  # timm, the Hub's client and the network raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'--model {args.model}: {reason[:300]} (--checkpoint FILE gives weights)') from error
    if args.checkpoint:
        state, where = backbone_state(content, model, args.checkpoint, args.teacher, args.model)
        model.load_state_dict(state)
        if is_primary(args):
            _logger.info(f"Weights of {args.checkpoint}{f' ({where})' if where else ''}")
    if wrapper:
        model = plain_backbone(model, img_size=size, **options)
        if model.untrained_keys:
            _logger.warning(f'--features-only left {len(model.untrained_keys)} tensors of {args.model} untrained')

    cfg = model.pretrained_cfg
    args.in_chans = options.get('in_chans') or cfg['input_size'][0]
    image_mode(args.in_chans)
    size = size or options.get('img_size')
    sides = (size, size) if isinstance(size, int) else tuple(size or cfg['input_size'][1:])
    data_config = dict(
        input_size=(args.in_chans, *sides),
        interpolation=run.get('train_interpolation') or cfg.get('interpolation') or 'bilinear',
    )
    for name in ('mean', 'std'):
        values = list(getattr(args, name) or run.get(name) or cfg[name])
        if len(values) != args.in_chans:
            if len(values) > 1 and getattr(args, name):
                raise InputError(f'--{name}: {len(values)} values for {args.in_chans} channels')
            values = [sum(values) / len(values)] * args.in_chans  # grey images: the average of the colours
        data_config[name] = tuple(values)
    model.eval()
    args.digest = weights_digest(model)
    with blame('--img-size', sides[0]), torch.no_grad():
        output = model(torch.zeros(2, *data_config['input_size']))
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        raise InputError(f'--model {args.model}: gives no pooled feature')
    return model, data_config

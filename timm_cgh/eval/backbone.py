"""The backbone to evaluate, and how its images are prepared."""
import logging
import os
from typing import Any, Dict, NamedTuple, Optional, Sequence

import timm
import torch
import torch.nn as nn

from timm_cgh.data import image_mode
from timm_cgh.errors import InputError, checking
from timm_cgh.models.backbone import (
    ImageSize, check_model, create_backbone, plain_backbone, read_config, resolve_data_config)
from timm_cgh.models.checkpoints import find_source, load_weights, read_file, run_arguments, weights_digest

from .features import Pixels

__all__ = ['Backbone', 'load_backbone']

_logger = logging.getLogger('eval')


class Backbone(NamedTuple):
    """A frozen backbone.

    model: plain timm model (`num_classes=0`), on the CPU, in eval mode; name: timm's; data_config: `input_size`,
    `mean`, `std` and `interpolation` of its images; digest: see `weights_digest`; weights: where they are from.
    """
    model: nn.Module
    name: str
    data_config: Dict[str, Any]
    digest: str
    weights: str


def _create(name: str, run: Dict[str, Any], img_size: Any, pretrained: bool, options: Dict[str, Any]) -> nn.Module:
    """The model, built as the run did."""
    if pretrained and ':' not in name and not timm.is_model_pretrained(name):
        raise InputError(f'model={name}: timm has no weights for it; `checkpoint` FILE gives some')
    wrapper = {}
    if run.get('features_only'):
        wrapper = dict(features_only=True, out_indices=run.get('out_indices') or (-2, -1))
    with checking('model', name, AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError):
        return create_backbone(name, img_size=img_size, pretrained=pretrained, **options, **wrapper)


def _read_run(checkpoint: str, model: Optional[str]) -> Dict[str, Any]:
    """Settings of the run that weights are from, by the names of its options; empty where they are not known."""
    path = find_source(checkpoint)
    if path.is_file():
        return run_arguments(read_file(path, mmap=True))
    config = read_config(path / 'config.json')
    cfg = {**config, **config.get('pretrained_cfg', {})}  # old versions of timm wrote one level
    chans, *size = cfg.get('input_size') or [None]
    model = model or cfg['architecture']
    kwargs = config.get('model_args', {}) if model.partition('.')[0] == cfg['architecture'] else {}
    return dict(
        model=model,
        model_kwargs={name: value for name, value in kwargs.items() if name not in ('num_classes', 'img_size')},
        in_chans=chans,
        img_size=size or None,
        mean=cfg.get('mean'),
        std=cfg.get('std'),
        train_interpolation=cfg.get('interpolation'),
    )


def load_backbone(
        model: Optional[str] = None,
        checkpoint: Optional[str] = None,
        teacher: bool = False,
        no_pretrained: bool = False,
        model_kwargs: Optional[Dict[str, Any]] = None,
        in_chans: Optional[int] = None,
        img_size: Optional[ImageSize] = None,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
        pixels: bool = False,
) -> Backbone:
    """Load a backbone. What is not given comes from the checkpoint's training run, else from the model.

    Args:
        model: timm model name, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`
        checkpoint: weights, see `timm_cgh.models.checkpoints.load_weights`; default those of `model`
        teacher: take the averaged network of the checkpoint
        no_pretrained: random weights where there is no checkpoint
        model_kwargs: further arguments of `timm.create_model`
        in_chans: channels of the images
        img_size: side, px, or (H, W)
        mean, std: normalisation, of pixels in [0, 1]
        pixels: raw pixels (`Pixels`) of the size that the model takes instead, as a baseline

    Raises:
        InputError: no such model or file, weights that do not fit, images that the model does not take
    """
    if pixels and checkpoint:
        raise InputError('pixels: use no weights, not with `checkpoint`')
    no_pretrained = no_pretrained or pixels
    if teacher and not checkpoint:
        raise InputError("teacher: is in a run's checkpoint, name it with `checkpoint` RUN/last.pth.tar")
    run = _read_run(checkpoint, model) if checkpoint else {}
    name = model or run.get('model')
    if name is None:
        raise InputError('model: say which (timm name, local-dir:RUN/export, hf-hub:OWNER/NAME)')
    if name != run.get('model'):  # the settings of another model do not apply
        run = {}
    options = {**(run.get('model_kwargs') or {}), **(model_kwargs or {})}
    if in_chans is not None:
        image_mode(in_chans)
    if in_chans or run.get('in_chans'):
        options['in_chans'] = in_chans or run['in_chans']
    img_size = img_size or run.get('img_size')

    check_model(name, model_kwargs)
    net = _create(name, run, img_size, not checkpoint and not no_pretrained, options)
    weights = 'random' if no_pretrained else 'its own'
    if checkpoint:
        where = load_weights(net, checkpoint, teacher)
        weights = os.path.basename(checkpoint) + (', teacher' if teacher else '')
        _logger.info(f"Weights of {checkpoint}{f' ({where})' if where else ''}")
    if run.get('features_only'):
        net = plain_backbone(net, img_size=img_size, **options)
        if net.untrained_keys:
            _logger.warning(f'{len(net.untrained_keys)} tensors of {name} are untrained: its run had features_only')

    given = {key: run[key] for key in ('mean', 'std') if run.get(key)}
    data_config = resolve_data_config(
        {**net.pretrained_cfg, **given},
        in_chans=options.get('in_chans'),
        img_size=img_size,
        mean=mean,
        std=std,
        interpolation=run.get('train_interpolation'),
    )
    net.eval()
    digest = weights_digest(net)
    side = data_config['input_size'][-1]
    with checking('img_size', side, AssertionError, RuntimeError, ValueError), torch.no_grad():
        output = net(torch.zeros(2, *data_config['input_size']))
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        raise InputError(f'model={name}: has no pooled feature')
    if pixels:
        net, weights = Pixels(data_config['mean'], data_config['std']), 'pixels'
    return Backbone(net, name, data_config, digest, weights)

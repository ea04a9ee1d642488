"""Registry entry points `cgh_resnet18`, `cgh_resnet50`: plain timm ResNets, and where their CGH weights live."""
from typing import Any, Dict, Optional, Union

import timm
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, generate_default_cfgs, register_model

__all__ = ['CHECKPOINTS']

# One row per published checkpoint, the first of an architecture is its default: 'cgh_resnet50.<tag>' -> what differs
# from _cfg(), above all where the weights are ({'hf_hub_id': 'owner/name'} or {'url': 'https://...'}). None exists yet.
CHECKPOINTS: Dict[str, Dict[str, Any]] = {}


def _cfg(architecture: str, **kwargs: Any) -> Dict[str, Any]:
    """timm configuration of a CGH backbone at 224 px (Sec. 4.1): the stock architecture without a classifier."""
    return {
        'architecture': architecture,
        'num_classes': 0,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


# timm lists these (timm.list_pretrained('cgh_*')); registering replaces 'architecture' by the entry point's own name
default_cfgs = generate_default_cfgs({
    'cgh_resnet18': _cfg('resnet18'),
    'cgh_resnet50': _cfg('resnet50'),
    **{name: _cfg(name.split('.')[0].removeprefix('cgh_'), **where) for name, where in CHECKPOINTS.items()},
})


def _create(
        name: str,
        pretrained: bool,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """Build the stock architecture under its own name, with the weights of a row of `CHECKPOINTS` if asked for."""
    architecture = name.removeprefix('cgh_')
    overlay = dict(pretrained_cfg_overlay or {})
    if isinstance(pretrained_cfg, (dict, PretrainedCfg)):  # the caller's own, as timm takes it
        cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else pretrained_cfg.to_dict()
        cfg = {**cfg, 'architecture': architecture}
    else:
        tags = [row.split('.', 1)[1] for row in CHECKPOINTS if row.split('.', 1)[0] == name]
        if pretrained_cfg and pretrained_cfg not in tags:
            raise RuntimeError(f"{name} has no checkpoint tagged '{pretrained_cfg}', published: {tags or 'none yet'}")
        tag = pretrained_cfg or (tags[0] if tags else '')
        cfg = _cfg(architecture, **CHECKPOINTS[f'{name}.{tag}'], tag=tag) if tag else _cfg(architecture)

    merged = PretrainedCfg(**{**cfg, **overlay})
    if pretrained and not (merged.has_weights or merged.state_dict):
        raise RuntimeError(
            f'No CGH checkpoint is published for {name} yet: use pretrained=False for random weights, or load a run of '
            f"your own with timm.create_model('local-dir:<run>/export', pretrained=True)"
        )
    kwargs.setdefault('num_classes', 0)
    entry_point = timm.models.model_entrypoint(architecture)
    return entry_point(pretrained=pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **kwargs)


@register_model
def cgh_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-18, pre-trained with CGH where `pretrained`; no classifier unless `num_classes` asks for one.

    Raises:
        RuntimeError: `pretrained`, and no checkpoint is published
    """
    return _create('cgh_resnet18', pretrained, **kwargs)


@register_model
def cgh_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-50, pre-trained with CGH where `pretrained`; no classifier unless `num_classes` asks for one.

    Raises:
        RuntimeError: `pretrained`, and no checkpoint is published
    """
    return _create('cgh_resnet50', pretrained, **kwargs)

"""Registry entry points `cgh_resnet18` and `cgh_resnet50`: plain timm ResNets, and where their CGH weights are."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import timm
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, generate_default_cfgs, register_model

from timm_cgh.download import fetch_folder, verify
from timm_cgh.errors import InputError, checking

from .checkpoints import load_folder

__all__ = ['CHECKPOINTS', 'published']

# One row per checkpoint published on the Hub; `publish.py` prints it. The key is the model name in timm, `cgh_resnet50`
# or `cgh_resnet50.<tag>`; a name without a tag means the row of that name, else the architecture's first. Entries:
#   hf_hub_id  'owner/name@<commit>': pinned, so that later pushes change nothing here
#   sha256     of its model.safetensors
#   metrics    evaluation (its protocol is in the model card) -> top-1 in percent
#   what differs from _cfg(): input_size, mean, std, interpolation, crop_pct
# A folder weights/<key>/ of the repository, written by a dry run of `publish.py`, takes precedence and needs no row.
CHECKPOINTS: Dict[str, Dict[str, Any]] = {}

REPOSITORY = Path(__file__).resolve().parents[2]  # unless the package is installed without it


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
        **{key: value for key, value in kwargs.items() if key not in ('sha256', 'metrics')},
    }


def _in_repository() -> bool:
    return (REPOSITORY / 'hubconf.py').is_file()


def _folders() -> Dict[str, Path]:
    """Checkpoints in the repository: key -> folder."""
    if not _in_repository():
        return {}
    return {path.parent.name: path.parent for path in sorted(REPOSITORY.glob('weights/cgh_*/config.json'))}


def published(name: str = '') -> List[str]:
    """Checkpoints that `pretrained=True` can load, an architecture's default first.

    Args:
        name: of an entry point; default all of them
    """
    keys = [key for key in dict.fromkeys([*CHECKPOINTS, *_folders()]) if name in ('', key.split('.')[0])]
    return sorted(keys, key=lambda key: '.' in key)


# timm lists these (timm.list_pretrained('cgh_*')); registering replaces 'architecture' by the entry point's own name
default_cfgs = generate_default_cfgs({
    'cgh_resnet18': _cfg('resnet18'),
    'cgh_resnet50': _cfg('resnet50'),
    **{key: _cfg('', file=str(folder / 'model.safetensors')) for key, folder in _folders().items()},
    **{key: _cfg('', **row) for key, row in CHECKPOINTS.items()},
})


def _no_checkpoint(name: str) -> InputError:
    available = ', '.join(published()) or 'none'
    hint = '' if _in_repository() else (
        " An installed package comes without the repository's weights: torch.hub.load or pip install -e has them.")
    return InputError(
        f'{name}: no CGH checkpoint is published yet (available: {available}).{hint} Train one with train.py and load '
        f"it by timm.create_model('local-dir:RUN/export', pretrained=True); pretrained=False builds random weights")


def _create(
        name: str,
        pretrained: bool,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """Build the stock architecture, with published weights if asked for.

    Args:
        name: of the entry point
        pretrained: load weights
        pretrained_cfg: tag of a checkpoint, or a configuration of the caller's, as in timm
        pretrained_cfg_overlay: entries that replace the configuration's, as in timm
        **kwargs: arguments of timm's entry point; also `cache_dir` of the Hub's client

    Raises:
        InputError: no such checkpoint, or its download or verification failed
    """
    architecture = name.removeprefix('cgh_')
    overlay = dict(pretrained_cfg_overlay or {})
    kwargs.setdefault('num_classes', 0)
    key, row = '', {}
    if isinstance(pretrained_cfg, (dict, PretrainedCfg)):
        cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else pretrained_cfg.to_dict()
        cfg = {**cfg, 'architecture': architecture}
    else:
        keys = published(name)
        if pretrained_cfg and f'{name}.{pretrained_cfg}' not in keys:
            available = ', '.join(keys) or 'none'
            raise InputError(f"{name}: no checkpoint tagged '{pretrained_cfg}' (available: {available})")
        key = f'{name}.{pretrained_cfg}' if pretrained_cfg else keys[0] if keys else ''
        row = CHECKPOINTS.get(key, {})
        cfg = _cfg(architecture, **row, tag=key.partition('.')[2] or None)

    source = PretrainedCfg(**{**{k: v for k, v in cfg.items() if not row or k != 'hf_hub_id'}, **overlay})
    if not pretrained or source.has_weights or source.state_dict:  # the caller's own weights, by timm's own loader
        entry_point = timm.models.model_entrypoint(architecture)
        return entry_point(pretrained=pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **kwargs)
    if not key:
        raise _no_checkpoint(name)
    folder = _folders().get(key)
    if folder is None:
        with checking(key, None, RuntimeError):
            folder = Path(fetch_folder(row['hf_hub_id'], row['sha256'], kwargs.get('cache_dir')))
    elif 'sha256' in row:
        with checking(str(folder / 'model.safetensors'), None, RuntimeError):
            verify(folder / 'model.safetensors', row['sha256'])
    return load_folder(folder, architecture, pretrained_cfg_overlay=overlay, **kwargs)


@register_model
def cgh_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-18, if `pretrained` with weights trained by CGH; no classifier unless `num_classes` is given.

    Raises:
        InputError: `pretrained`, and no checkpoint is published, or it cannot be downloaded
    """
    return _create('cgh_resnet18', pretrained, **kwargs)


@register_model
def cgh_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-50, if `pretrained` with weights trained by CGH; no classifier unless `num_classes` is given.

    Raises:
        InputError: `pretrained`, and no checkpoint is published, or it cannot be downloaded
    """
    return _create('cgh_resnet50', pretrained, **kwargs)

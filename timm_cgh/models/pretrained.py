"""Registry entry points `cgh_resnet18`, `cgh_resnet50`: plain timm ResNets, and where their CGH weights live."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import timm
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, generate_default_cfgs, register_model

from timm_cgh.download import fetch_folder, verify

from .weights import load_folder

__all__ = ['CHECKPOINTS', 'published']

# One row per checkpoint published on the Hub; `publish.py` prints it. The key is what one types in timm, `cgh_resnet50`
# or `cgh_resnet50.<tag>`; without a tag the row of that very name is taken, else the architecture's first one. Besides:
#   hf_hub_id  'owner/name@<commit>': pinned, so that what is pushed there later changes nothing here
#   sha256     of its model.safetensors
#   metrics    figure (its protocol is in the card) -> top-1 in percent
#   what differs from _cfg(): input_size, mean, std, interpolation, crop_pct
# A folder weights/<key>/ of the repository goes before the row, and needs none:
#   publish.py RUN/export --repo-id OWNER/<key> --float16 --dry-run --output weights/<key>
CHECKPOINTS: Dict[str, Dict[str, Any]] = {}

REPOSITORY = Path(__file__).resolve().parents[2]  # where the package is not installed without its repository


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
    """Checkpoints that lie in the repository: key -> folder."""
    if not _in_repository():
        return {}
    return {path.parent.name: path.parent for path in sorted(REPOSITORY.glob('weights/cgh_*/config.json'))}


def published(name: str = '') -> List[str]:
    """What `pretrained=True` can load, the default of an architecture before its others.

    Args:
        name: of an entry point; default all
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


def _create(
        name: str,
        pretrained: bool,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """Build the stock architecture under its own name, with published weights if asked for.

    Args:
        name: of the entry point
        pretrained: load weights
        pretrained_cfg: tag of a checkpoint, or the caller's own configuration as timm takes it
        pretrained_cfg_overlay: entries that replace the configuration's, as timm takes them
        **kwargs: what timm's entry point takes; also `cache_dir` of the Hub's client

    Raises:
        RuntimeError: no such checkpoint, or one that is not to be had or not whole
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
            raise RuntimeError(f"{name} has no checkpoint tagged '{pretrained_cfg}', there are: {keys or 'none yet'}")
        key = f'{name}.{pretrained_cfg}' if pretrained_cfg else keys[0] if keys else ''
        row = CHECKPOINTS.get(key, {})
        cfg = _cfg(architecture, **row, tag=key.partition('.')[2] or None)

    source = PretrainedCfg(**{**{k: v for k, v in cfg.items() if not row or k != 'hf_hub_id'}, **overlay})
    if not pretrained or source.has_weights or source.state_dict:  # the caller's own weights, by timm's own loader
        entry_point = timm.models.model_entrypoint(architecture)
        return entry_point(pretrained=pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **kwargs)
    if not key:
        there = ', '.join(published()) or 'none of any architecture'
        elsewhere = '' if _in_repository() else (
            ' Those of the repository do not come with an installed package: torch.hub.load or pip install -e has them.')
        raise RuntimeError(
            f'No CGH checkpoint is published for {name} yet (there is: {there}).{elsewhere} Train one, python train.py --model '
            f"{architecture} --data-dir images/, and load it by timm.create_model('local-dir:<run>/export', "
            f'pretrained=True); pretrained=False gives random weights')
    folder = _folders().get(key)
    if folder is None:
        folder = fetch_folder(row['hf_hub_id'], row['sha256'], kwargs.get('cache_dir'))
    elif 'sha256' in row:
        try:
            verify(folder / 'model.safetensors', row['sha256'])
        except RuntimeError as error:
            raise RuntimeError(f"{folder / 'model.safetensors'} {error}") from error
    return load_folder(folder, architecture, pretrained_cfg_overlay=overlay, **kwargs)


@register_model
def cgh_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-18, pre-trained with CGH where `pretrained`; no classifier unless `num_classes` asks for one.

    Raises:
        RuntimeError: `pretrained`, and no checkpoint is published, or it cannot be had
    """
    return _create('cgh_resnet18', pretrained, **kwargs)


@register_model
def cgh_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-50, pre-trained with CGH where `pretrained`; no classifier unless `num_classes` asks for one.

    Raises:
        RuntimeError: `pretrained`, and no checkpoint is published, or it cannot be had
    """
    return _create('cgh_resnet50', pretrained, **kwargs)

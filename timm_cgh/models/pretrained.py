"""Registry entry points `cgh_resnet18` and `cgh_resnet50`: plain timm ResNets, and where their CGH weights are."""
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Union

import timm
import torch.nn as nn
from timm.models import PretrainedCfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from timm_cgh.download import fetch_folder, verify
from timm_cgh.errors import InputError, checking

from .backbone import read_config
from .checkpoints import load_folder

__all__ = ['CHECKPOINTS', 'published']

# One row per checkpoint published on the Hub; `publish.py` prints it. The key is the model name in timm, `cgh_resnet50`
# or `cgh_resnet50.<tag>`; a name without a tag means the row of that name, else the architecture's first. Entries:
#   hf_hub_id  'owner/name@<commit>': pinned, so that later pushes change nothing here
#   sha256     of its model.safetensors
#   metrics    evaluation (its protocol is in the model card) -> top-1 in percent
#   of the images, where they differ from _cfg(): input_size, mean, std, interpolation, crop_pct
# A folder weights/<key>/ of the repository, written by a dry run of `publish.py`, takes precedence and needs no row.
CHECKPOINTS: Dict[str, Dict[str, Any]] = {}

REPOSITORY = Path(__file__).resolve().parents[2]  # unless the package is installed without it
_OF_IMAGES = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')


def _folders() -> Dict[str, Path]:
    """Checkpoints in the repository: key -> folder."""
    if not (REPOSITORY / 'hubconf.py').is_file():
        return {}
    return {path.parent.name: path.parent for path in sorted(REPOSITORY.glob('weights/cgh_*/config.json'))}


def _read_images(folder: Path) -> Dict[str, Any]:
    """What a checkpoint's configuration says of its images, among other things; empty for a broken one."""
    with suppress(InputError):  # whoever loads it is told what is wrong with it
        return read_config(folder / 'config.json').get('pretrained_cfg', {})
    return {}


def _cfg(architecture: str, images: Mapping[str, Any], **kwargs: Any) -> PretrainedCfg:
    """timm configuration of the stock architecture without a classifier, for the images of a checkpoint.

    As in timm it describes the checkpoint whether its weights are loaded or not, so that random weights are evaluated
    on the same images. Without a checkpoint it is the paper's (Sec. 4.1), 224 px.
    """
    return PretrainedCfg(**{
        'architecture': architecture,
        'num_classes': 0,
        'pool_size': (7, 7),
        'interpolation': 'bilinear',
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **{name: images[name] for name in _OF_IMAGES if name in images},
        **kwargs,
    })


def published(name: str = '') -> List[str]:
    """Checkpoints that `pretrained=True` can load, of one entry point or all; an architecture's default first."""
    keys = [key for key in dict.fromkeys([*CHECKPOINTS, *_folders()]) if name in ('', key.split('.')[0])]
    return sorted(keys, key=lambda key: '.' in key)


# timm lists these (timm.list_pretrained('cgh_*')); registering replaces 'architecture' by the entry point's own name
default_cfgs = generate_default_cfgs({
    'cgh_resnet18': _cfg('resnet18', {}),
    'cgh_resnet50': _cfg('resnet50', {}),
    **{key: _cfg('', _read_images(path), file=str(path / 'model.safetensors')) for key, path in _folders().items()},
    **{key: _cfg('', row, hf_hub_id=row['hf_hub_id']) for key, row in CHECKPOINTS.items()},
})


def _load_published(name: str, key: str, **kwargs: Any) -> nn.Module:
    """The model of a checkpoint in the repository or on the Hub."""
    if not key:
        hint = '' if (REPOSITORY / 'hubconf.py').is_file() else (
            " An installed package comes without the repository's weights: torch.hub.load or pip install -e has them.")
        raise InputError(
            f"{name}: no CGH checkpoint is published yet (available: {', '.join(published()) or 'none'}).{hint} Train "
            f"one with train.py and load it by timm.create_model('local-dir:RUN/export', pretrained=True); "
            f'pretrained=False builds random weights')
    row, folder = CHECKPOINTS.get(key, {}), _folders().get(key)
    if folder is None:
        with checking(key, None, RuntimeError):
            folder = Path(fetch_folder(row['hf_hub_id'], row['sha256'], kwargs.get('cache_dir')))
    elif 'sha256' in row:
        with checking(str(folder / 'model.safetensors'), None, RuntimeError):
            verify(folder / 'model.safetensors', row['sha256'])
    return load_folder(folder, name.removeprefix('cgh_'), **kwargs)


def _create(
        name: str,
        pretrained: bool,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """The stock architecture, if `pretrained` with published weights, or those of a configuration of the caller's.

    Raises:
        InputError: no such checkpoint, or its download or verification failed
    """
    architecture, overlay = name.removeprefix('cgh_'), pretrained_cfg_overlay or {}
    kwargs.setdefault('num_classes', 0)
    key, cfg = '', pretrained_cfg
    if not cfg or isinstance(cfg, str):
        keys = published(name)
        key = f'{name}.{pretrained_cfg}' if pretrained_cfg else next(iter(keys), '')
        if pretrained_cfg and key not in keys:
            available = ', '.join(keys) or 'none'
            raise InputError(f"{name}: no checkpoint tagged '{pretrained_cfg}' (available: {available})")
        folder = _folders().get(key)
        images = CHECKPOINTS.get(key, {}) if folder is None else _read_images(folder)
        cfg = _cfg(architecture, images, tag=key.partition('.')[2] or None)
    cfg = resolve_pretrained_cfg(name, cfg, {'architecture': architecture, **overlay})
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        return _load_published(name, key, pretrained_cfg_overlay=overlay, **kwargs)
    return timm.models.model_entrypoint(architecture)(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)


@register_model
def cgh_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-18, if `pretrained` with weights trained by CGH; no classifier unless `num_classes` is given."""
    return _create('cgh_resnet18', pretrained, **kwargs)


@register_model
def cgh_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-50, if `pretrained` with weights trained by CGH; no classifier unless `num_classes` is given."""
    return _create('cgh_resnet50', pretrained, **kwargs)

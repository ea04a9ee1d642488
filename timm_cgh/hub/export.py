"""Trained backbones in timm's own hub format: `config.json` + `model.safetensors`."""
import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import torch
import torch.nn as nn
from timm.models import save_for_hf

from timm_cgh.models import create_backbone, is_features_only

__all__ = ['export_backbone', 'plain_backbone']

# what timm records of the architecture's ImageNet checkpoint and what is not true of ours
_FOREIGN_KEYS = (
    'url', 'file', 'hf_hub_id', 'origin_url', 'paper_ids', 'paper_name', 'license', 'notes', 'source', 'tag',
    'label_names', 'label_descriptions', 'test_input_size', 'test_crop_pct', 'min_input_size',
)


def plain_backbone(backbone: nn.Module, img_size: Optional[int] = None, **model_kwargs: Any) -> nn.Module:
    """The plain timm model that a backbone's weights belong to.

    A plain model is returned as it is. The weights of a `features_only` wrapper are put under their plain names in a
    new model of the same architecture; `untrained_keys` of the result lists the parameters that the wrapper lacks
    (layers behind the last map), which are at their initial values.

    Args:
        backbone: timm model or `features_only` wrapper
        img_size: side of the images that the wrapper was built for, px, for models that depend on it
        **model_kwargs: arguments that the wrapper was built with, `features_only` and `out_indices` aside

    Raises:
        RuntimeError: a tensor of the wrapper has no place in the plain model
    """
    if not is_features_only(backbone):
        return backbone
    model = create_backbone(backbone.pretrained_cfg['architecture'], img_size=img_size, **model_kwargs)
    found = backbone.state_dict()
    state, untrained = {}, []
    for key, value in model.state_dict().items():
        # timm's wrappers either hold the model as `model`, or its children with nested names joined by `_`
        names = [f'model.{key}', *(key.replace('.', '_', joints) for joints in range(key.count('.')))]
        name = next((n for n in names if n in found and found[n].shape == value.shape), None)
        if name is None:
            untrained.append(key)
        else:
            state[key] = found.pop(name)
    if found:
        raise RuntimeError(f'{next(iter(found))} of the features_only backbone has no place in the plain model')
    model.load_state_dict(state, strict=False)
    model.untrained_keys = untrained
    return model


def export_backbone(
        backbone: nn.Module,
        folder: Union[str, Path],
        input_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        tag: str = 'cgh',
        interpolation: str = 'bilinear',
        crop_pct: float = 1.0,
        extra: Optional[Mapping[str, Any]] = None,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> Path:
    """Write a backbone so that `timm.create_model('local-dir:<folder>', pretrained=True)` gives it back.

    timm writes both files; of the configuration, what speaks of the architecture's ImageNet checkpoint (tag, address,
    paper, licence, test size) is replaced by this run's own. Files are written beside and renamed into place.

    Args:
        backbone: timm model with `num_classes=0`, or a `features_only` wrapper (see `plain_backbone`)
        folder: where to write, made if absent
        input_size: (C, H, W) of the training images
        mean, std: normalisation, one value per channel, of pixels in [0, 1]
        tag: pretrained tag
        interpolation, crop_pct: test-time resize and centre crop
        extra: further entries of the pretrained configuration
        model_kwargs: see `plain_backbone`

    Returns:
        the folder
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # a copy on the CPU in the plain layout: safetensors takes no channels-last tensors
    model = copy.deepcopy(plain_backbone(backbone, **(model_kwargs or {}))).cpu()
    model.to(memory_format=torch.contiguous_format)
    data_config = dict(
        input_size=tuple(input_size),
        mean=tuple(mean),
        std=tuple(std),
        interpolation=interpolation,
        crop_pct=crop_pct,
    )
    # in the destination's own parent: a rename must not cross file systems
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.export-') as scratch:
        save_for_hf(model, scratch, safe_serialization=True, data_config=data_config)
        config_path = Path(scratch) / 'config.json'
        config = json.loads(config_path.read_text())
        cfg = {k: v for k, v in config['pretrained_cfg'].items() if k not in _FOREIGN_KEYS}
        config['pretrained_cfg'] = {'tag': tag, **cfg, **(extra or {})}
        config_path.write_text(json.dumps(config, indent=2) + '\n')
        shutil.copymode(config_path, Path(scratch) / 'model.safetensors')  # safetensors' own is its owner's alone
        for name in ('model.safetensors', 'config.json'):
            os.replace(Path(scratch) / name, folder / name)
    return folder

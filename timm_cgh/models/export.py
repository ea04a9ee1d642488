"""Trained backbones in timm's own hub format: `config.json` + `model.safetensors`."""
import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import torch
import torch.nn as nn
from timm.models import save_for_hf

from timm_cgh.files import sync

from .backbone import plain_backbone

__all__ = ['export_backbone']

# what timm keeps about the architecture's ImageNet checkpoint and is not true of ours
_STOCK_KEYS = (
    'origin_url', 'paper_ids', 'paper_name', 'license', 'notes', 'tag', 'label_names', 'label_descriptions',
    'min_input_size',
)


def export_backbone(
        backbone: nn.Module,
        folder: Union[str, Path],
        input_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        tag: str = 'cgh',
        interpolation: str = 'bilinear',
        crop_pct: float = 1.0,
        label_names: Optional[Sequence[str]] = None,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> Path:
    """Write a backbone so that `timm.create_model('local-dir:<folder>', pretrained=True)` and transformers load it.

    timm writes both files; what its configuration says about the architecture's ImageNet checkpoint is removed. Files
    are renamed into place when complete.

    Args:
        backbone: timm model, or a `features_only` wrapper (see `plain_backbone`)
        folder: to write to, created if absent; it is returned
        input_size: (C, H, W) of the training images
        mean, std: normalisation, one value per channel, of pixels in [0, 1]
        tag: timm's name for this set of weights
        interpolation, crop_pct: test-time resize and centre crop
        label_names: of a classifier's classes
        model_kwargs: see `plain_backbone`

    Raises:
        OSError: the folder cannot be written
        RuntimeError: see `plain_backbone`
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # a copy on the CPU in the plain layout: safetensors takes no channels-last tensors
    model = copy.deepcopy(plain_backbone(backbone, **(model_kwargs or {}))).cpu()
    model.to(memory_format=torch.contiguous_format)
    data_config = dict(
        input_size=tuple(input_size), mean=tuple(mean), std=tuple(std), interpolation=interpolation, crop_pct=crop_pct)
    # in the destination's own parent: a rename must not cross file systems
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.export-') as scratch:
        save_for_hf(model, scratch, safe_serialization=True, data_config=data_config)
        config_path = Path(scratch) / 'config.json'
        config = json.loads(config_path.read_text())
        cfg = {k: v for k, v in config['pretrained_cfg'].items() if k not in _STOCK_KEYS}
        config['pretrained_cfg'] = {'tag': tag, **cfg}
        config['model_args'].pop('num_classes', None)  # a second one, which transformers refuses
        if label_names:
            config['label_names'] = list(label_names)
        config_path.write_text(json.dumps(config, indent=2) + '\n')
        shutil.copymode(config_path, Path(scratch) / 'model.safetensors')  # safetensors' is readable by its owner only
        for name in ('model.safetensors', 'config.json'):
            sync(Path(scratch) / name)
        for name in ('model.safetensors', 'config.json'):
            os.replace(Path(scratch) / name, folder / name)
    return folder

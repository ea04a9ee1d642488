"""torch.hub entry points: plain timm models, with weights that CGH has trained.

    import torch
    model = torch.hub.load('<owner>/timm-cgh', 'cgh', checkpoint='output/train/my-run/export')
"""
import json as _json
from pathlib import Path as _Path

import timm as _timm

import timm_cgh as _timm_cgh  # noqa: F401  registers cgh_* and the small-image ResNets with timm
from timm_cgh.models import pretrained as _pretrained  # noqa: F401
from timm_cgh.models import small_resnets as _small_resnets  # noqa: F401

dependencies = ['torch', 'torchvision', 'timm', 'safetensors', 'huggingface_hub']


def cgh_resnet18(pretrained=False, **kwargs):
    """ResNet-18 of timm, without classifier: (B, 3, H, W) images -> (B, 512) features.

    Args:
        pretrained: load the weights that CGH has trained
        **kwargs: whatever timm.create_model('resnet18', ...) takes, such as num_classes=10 or features_only=True

    Raises:
        RuntimeError: pretrained=True, and no checkpoint is published yet
    """
    return _timm.create_model('cgh_resnet18', pretrained=pretrained, **kwargs)


def cgh_resnet50(pretrained=False, **kwargs):
    """ResNet-50 of timm, without classifier: (B, 3, H, W) images -> (B, 2048) features.

    Args:
        pretrained: load the weights that CGH has trained
        **kwargs: whatever timm.create_model('resnet50', ...) takes, such as num_classes=10 or features_only=True

    Raises:
        RuntimeError: pretrained=True, and no checkpoint is published yet
    """
    return _timm.create_model('cgh_resnet50', pretrained=pretrained, **kwargs)


def cgh(backbone=None, checkpoint=None, **kwargs):
    """Any timm model, with weights from wherever a CGH backbone is kept; no classifier unless num_classes asks for one.

    Args:
        backbone: timm model name; by default the one that the checkpoint's config.json names, else 'resnet50'
        checkpoint: None for random weights; or the export/ folder of a run; or a .safetensors file, or a PyTorch file
            of tensors alone, with the keys of the timm model; or 'hf-hub:owner/name'
        **kwargs: whatever timm.create_model(backbone, ...) takes

    Raises:
        FileNotFoundError: the checkpoint does not exist, or its folder has no config.json
        ValueError: the folder holds another architecture than the backbone asked for
        RuntimeError: the file's keys or shapes are not the model's
    """
    kwargs.setdefault('num_classes', 0)
    if checkpoint is None:
        return _timm.create_model(backbone or 'resnet50', **kwargs)

    checkpoint = str(checkpoint)
    if checkpoint.startswith('hf-hub:'):
        model = _timm.create_model(checkpoint, pretrained=True, **kwargs)
        _check_architecture(backbone, model.pretrained_cfg['architecture'], checkpoint)
        return model

    path = _Path(checkpoint).expanduser()
    if path.is_dir():
        config = path / 'config.json'
        if not config.is_file():
            raise FileNotFoundError(f"checkpoint '{path}' has no config.json: give the export folder of a run")
        _check_architecture(backbone, _json.loads(config.read_text(encoding='utf-8'))['architecture'], path)
        return _timm.create_model(f'local-dir:{path}', pretrained=True, **kwargs)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist: give a file, a folder or hf-hub:owner/name")
    model = _timm.create_model(backbone or 'resnet50', **kwargs)
    _timm.models.load_checkpoint(model, str(path))  # safetensors, or torch.load(weights_only=True)
    return model


def _check_architecture(backbone, found, checkpoint):
    if backbone is not None and backbone.split('.')[0] != found:
        raise ValueError(f"checkpoint '{checkpoint}' holds a {found}: ask for backbone='{found}', not '{backbone}'")

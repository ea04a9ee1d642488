"""torch.hub entry points: plain timm models, with weights that CGH has trained.

    import torch
    model = torch.hub.load('<owner>/timm-cgh', 'cgh_resnet18')
    model = torch.hub.load('<owner>/timm-cgh', 'cgh', checkpoint='hf-hub:<owner>/<name>')
"""
from pathlib import Path as _Path

import timm as _timm

import timm_cgh as _timm_cgh  # noqa: F401  registers cgh_* and the small-image ResNets with timm
from timm_cgh.download import HUB_PREFIX as _HUB_PREFIX, fetch_folder as _fetch_folder
from timm_cgh.models.weights import load_folder as _load_folder, load_weights as _load_weights

dependencies = ['torch', 'torchvision', 'timm', 'safetensors', 'huggingface_hub']


def cgh_resnet18(pretrained=True, **kwargs):
    """ResNet-18 of timm, without classifier: (B, 3, H, W) images -> (B, 512) features.

    Args:
        pretrained: load the weights that CGH has trained, those in the repository's weights/, else from the Hub; False
            gives random weights
        **kwargs: whatever timm.create_model('resnet18', ...) takes, such as num_classes=10, in_chans=1 or
            features_only=True

    Raises:
        RuntimeError: `pretrained`, and no checkpoint is published yet, or it cannot be had
    """
    return _timm.create_model('cgh_resnet18', pretrained=pretrained, **kwargs)


def cgh_resnet50(pretrained=True, **kwargs):
    """ResNet-50 of timm, without classifier: (B, 3, H, W) images -> (B, 2048) features.

    Args:
        pretrained: load the weights that CGH has trained, those in the repository's weights/, else from the Hub; False
            gives random weights
        **kwargs: whatever timm.create_model('resnet50', ...) takes, such as num_classes=10, in_chans=1 or
            features_only=True

    Raises:
        RuntimeError: `pretrained`, and no checkpoint is published yet, or it cannot be had
    """
    return _timm.create_model('cgh_resnet50', pretrained=pretrained, **kwargs)


def cgh(backbone=None, checkpoint=None, **kwargs):
    """Any timm model, with weights from wherever a CGH backbone is kept; no classifier unless num_classes asks for one.

    Args:
        backbone: timm model name; by default the one that the checkpoint's config.json names, else 'resnet50'
        checkpoint: None for random weights; or the export/ folder of a run; or 'hf-hub:owner/name'; or a .safetensors
            file, or a PyTorch file of tensors alone, with the keys of the timm model
        **kwargs: whatever timm.create_model(backbone, ...) takes; a single file must have its in_chans

    Raises:
        FileNotFoundError: the checkpoint does not exist, or is a folder without config.json or model.safetensors
        RuntimeError: the weights are another architecture's, broken, or cannot be had
    """
    kwargs.setdefault('num_classes', 0)
    if checkpoint is None:
        return _timm.create_model(backbone or 'resnet50', **kwargs)
    kwargs.pop('pretrained', None)  # a checkpoint says as much
    checkpoint = str(checkpoint)
    if checkpoint.startswith(_HUB_PREFIX):
        checkpoint = _fetch_folder(checkpoint, cache_dir=kwargs.get('cache_dir'))
    path = _Path(checkpoint).expanduser()
    if path.is_dir():
        return _load_folder(path, backbone and backbone.split('.')[0], **kwargs)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist: give a file, a folder or hf-hub:owner/name")
    num_classes = kwargs.pop('num_classes')
    model = _timm.create_model(backbone or 'resnet50', num_classes=0, **kwargs)
    _load_weights(model, str(path))
    if num_classes:
        model.reset_classifier(num_classes)
    return model

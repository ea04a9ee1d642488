"""torch.hub entry points: plain timm models with weights trained by CGH.

    import torch
    model = torch.hub.load('<owner>/timm-cgh', 'cgh_resnet18')
    model = torch.hub.load('<owner>/timm-cgh', 'cgh', checkpoint='hf-hub:<owner>/<name>')
"""
import timm as _timm

# importing timm_cgh registers cgh_* and the small-image ResNets with timm
from timm_cgh.models.checkpoints import (
    find_source as _find_source, load_folder as _load_folder, load_weights as _load_weights)

dependencies = ['torch', 'torchvision', 'timm', 'safetensors', 'huggingface_hub']


def _entry_point(architecture, num_features):
    def create(pretrained=True, **kwargs):
        return _timm.create_model(f'cgh_{architecture}', pretrained=pretrained, **kwargs)

    create.__doc__ = f"""timm's {architecture} without a classifier: (B, 3, H, W) images -> (B, {num_features}).

    Args:
        pretrained: load weights trained by CGH, from the repository's weights/ or the Hub; False builds random weights
        **kwargs: arguments of timm.create_model('{architecture}', ...), such as num_classes, in_chans, features_only

    Raises:
        ValueError: `pretrained`, and no checkpoint is published, or it cannot be downloaded
    """
    return create


cgh_resnet18 = _entry_point('resnet18', 512)
cgh_resnet50 = _entry_point('resnet50', 2048)


def cgh(backbone=None, checkpoint=None, **kwargs):
    """Any timm model, with the weights of a CGH run or of any checkpoint; no classifier unless num_classes is given.

    Args:
        backbone: timm model name; default the one in the checkpoint's config.json, else 'resnet50'
        checkpoint: None for random weights; a run's folder or its export/; 'hf-hub:owner/name'; or a checkpoint file of
            the backbone (safetensors or PyTorch; of this package, timm, torchvision, MoCo, DINO, ...)
        **kwargs: arguments of timm.create_model(backbone, ...); weights for colour images fit any in_chans

    Raises:
        ValueError: no such checkpoint, unreadable, another architecture's, or its download failed
    """
    kwargs.setdefault('num_classes', 0)
    if checkpoint is None:
        return _timm.create_model(backbone or 'resnet50', **kwargs)
    kwargs.pop('pretrained', None)  # implied by a checkpoint
    path = _find_source(checkpoint, cache_dir=kwargs.get('cache_dir'))
    if path.is_dir():
        return _load_folder(path, backbone and backbone.split('.')[0], **kwargs)
    num_classes = kwargs.pop('num_classes')
    model = _timm.create_model(backbone or 'resnet50', num_classes=0, **kwargs)
    _load_weights(model, path)
    if num_classes:
        model.reset_classifier(num_classes)
    return model

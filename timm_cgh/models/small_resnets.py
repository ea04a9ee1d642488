"""ResNets for 32 px (`*_s1`) and 64 px (`*_s2`) images, registered with timm as ordinary architectures.

timm's ResNets reduce the image by 4 before their first stage and by 32 in all, to a single position for a 32 px image.
The usual form for small images starts with a 3x3 convolution of stride 1; `s1` also drops the max-pool (total stride
8), `s2` keeps it (total stride 16). Everything else is timm's ResNet, parameter for parameter.
"""
from typing import Any, Dict, Optional

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ['SmallResNet']


class SmallResNet(ResNet):
    """timm's ResNet behind a 3x3 stride-1 first convolution, for small images.

    Args:
        block: `BasicBlock` or `Bottleneck`
        layers: blocks of each of the four stages
        stem_pool: keep timm's stride-2 max-pool after the stem
        in_chans: channels of the images
        output_stride: upper bound on the total stride, kept by dilation: 8, 4 or 2; with stem pool 16, 8 or 4
        **kwargs: arguments of timm's ResNet

    Raises:
        ValueError: an output stride that the four stages cannot have
    """

    def __init__(
            self,
            block: type,
            layers: tuple,
            stem_pool: bool = False,
            in_chans: int = 3,
            output_stride: Optional[int] = None,
            **kwargs: Any,
    ):
        shrink = 2 if stem_pool else 4  # stride of timm's ResNet over that of this network
        output_stride = 32 // shrink if output_stride is None else output_stride
        if output_stride not in (2, 4, 8, 16, 32) or output_stride < 8 // shrink:
            natural = 32 // shrink
            raise ValueError(f'output_stride={output_stride}: must be {natural}, {natural // 2} or {natural // 4}')
        super().__init__(block, layers, in_chans=in_chans, output_stride=min(32, output_stride * shrink), **kwargs)

        width = self.feature_info[0]['num_chs']
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=3, stride=1, padding=1, bias=False, **dd)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')  # as init_weights() does
        if not stem_pool:
            self.maxpool = nn.Identity()
        self.feature_info[0]['reduction'] = 1
        for info in self.feature_info[1:]:
            info['reduction'] //= shrink


def _cfg(img_size: int, **kwargs: Any) -> Dict[str, Any]:
    """Default configuration of an architecture without published weights."""
    reduction = 8 if img_size == 32 else 16
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, img_size, img_size),
        'pool_size': (img_size // reduction, img_size // reduction),
        'crop_pct': 1.0,  # images of native size are not resized
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'resnet18_s1.untrained': _cfg(32),
    'resnet34_s1.untrained': _cfg(32),
    'resnet50_s1.untrained': _cfg(32),
    'resnet18_s2.untrained': _cfg(64),
    'resnet34_s2.untrained': _cfg(64),
    'resnet50_s2.untrained': _cfg(64),
})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SmallResNet:
    return build_model_with_cfg(SmallResNet, variant, pretrained, **kwargs)


@register_model
def resnet18_s1(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-18 for 32 px images: 3x3 stride-1 first convolution, no max-pool."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), stem_pool=False)
    return _create('resnet18_s1', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_s1(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-34 for 32 px images: 3x3 stride-1 first convolution, no max-pool."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3), stem_pool=False)
    return _create('resnet34_s1', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_s1(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-50 for 32 px images: 3x3 stride-1 first convolution, no max-pool."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), stem_pool=False)
    return _create('resnet50_s1', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_s2(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-18 for 64 px images: 3x3 stride-1 first convolution, max-pool kept."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), stem_pool=True)
    return _create('resnet18_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_s2(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-34 for 64 px images: 3x3 stride-1 first convolution, max-pool kept."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3), stem_pool=True)
    return _create('resnet34_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_s2(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-50 for 64 px images: 3x3 stride-1 first convolution, max-pool kept."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), stem_pool=True)
    return _create('resnet50_s2', pretrained, **dict(model_args, **kwargs))

"""ResNets for 32 px (`*_s1`) and 64 px (`*_s2`) images, registered with timm as ordinary architectures.

timm's ResNets reduce the image by 4 before their first stage and by 32 in all, to a single position for a 32 px image.
The usual form for small images starts with a 3x3 convolution of stride 1; `s1` also drops the max-pool (total stride
8), `s2` keeps it (total stride 16). Everything else is timm's ResNet, parameter for parameter.
"""
from typing import Any, Callable, Optional

import torch.nn as nn
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
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
        natural = 32 // shrink
        output_stride = natural if output_stride is None else output_stride
        if output_stride not in (2, 4, 8, 16, 32) or output_stride < natural // 4:
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


_BLOCKS = {
    'resnet18': dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    'resnet34': dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    'resnet50': dict(block=Bottleneck, layers=(3, 4, 6, 3)),
}


def _cfg(img_size: int) -> PretrainedCfg:
    return PretrainedCfg(
        input_size=(3, img_size, img_size),
        pool_size=(4, 4),
        crop_pct=1.0,  # images of native size are not resized
        interpolation='bilinear',
        first_conv='conv1',
        classifier='fc',
        license='apache-2.0',
    )


default_cfgs = generate_default_cfgs({
    f'{name}_{form}.untrained': _cfg(img_size) for form, img_size in (('s1', 32), ('s2', 64)) for name in _BLOCKS
})


def _entry_point(variant: str) -> Callable[..., SmallResNet]:
    def create(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
        name, form = variant.split('_')
        model_args = {**_BLOCKS[name], 'stem_pool': form == 's2', **kwargs}
        return build_model_with_cfg(SmallResNet, variant, pretrained, **model_args)

    create.__name__ = create.__qualname__ = variant  # timm registers it under its name
    return register_model(create)


resnet18_s1 = _entry_point('resnet18_s1')
resnet34_s1 = _entry_point('resnet34_s1')
resnet50_s1 = _entry_point('resnet50_s1')
resnet18_s2 = _entry_point('resnet18_s2')
resnet34_s2 = _entry_point('resnet34_s2')
resnet50_s2 = _entry_point('resnet50_s2')

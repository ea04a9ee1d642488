"""Backbones in the formats of neighbours: torchvision, detectron2, ONNX.

The names of detectron2's ResNet are those that its own tools/convert-torchvision-to-d2.py and MoCo's
detection/convert-pretrain-to-detectron2.py write: `stem.conv1.weight`, `stem.conv1.norm.*`, `res2.0.conv1.weight`,
`res2.0.conv1.norm.*`, `res2.0.shortcut.*`. Its checkpointer matches them as suffixes (`matching_heuristics`), so that
one file serves FPN models (`backbone.bottom_up.res5...`) and C4 models (`backbone.res4...`, `roi_heads.res5...`).
"""
import json
import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Union

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torchvision import models as torchvision_models

from timm_cgh.download import HUB_PREFIX, fetch_folder
from timm_cgh.errors import InputError, blame
from timm_cgh.files import atomic_path
from timm_cgh.models.weights import check_fits, load_folder

__all__ = ['FORMATS', 'as_torchvision', 'convert', 'find_folder']

_logger = logging.getLogger('hub')


def find_folder(source: str) -> str:
    """The folder in timm's hub format that a user names.

    Args:
        source: folder of a run, its `export/`, any such folder, or `hf-hub:owner/name[@revision]`

    Raises:
        InputError: nothing of that kind, or not to be had
    """
    if source.startswith(HUB_PREFIX):
        with blame(source):
            return fetch_folder(source)
    for folder in (os.path.join(source, 'export'), source):
        if os.path.isfile(os.path.join(folder, 'config.json')):
            return folder
    raise InputError(f"{source}: no config.json there; give a run's folder, its export/, or hf-hub:OWNER/NAME")


def input_config(model: nn.Module) -> Dict[str, Any]:
    """What a model wants of its images, and which it is; the values that matter to whoever feeds it."""
    names = ('architecture', 'tag', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct')
    return {name: model.pretrained_cfg[name] for name in names if name in model.pretrained_cfg}


@torch.no_grad()
def as_torchvision(model: nn.Module) -> nn.Module:
    """torchvision's own ResNet with a backbone's weights, once it is known to give the same features."""
    name = model.pretrained_cfg['architecture']
    build = getattr(torchvision_models.resnet, name, None)
    if not callable(build):
        raise InputError(f'--to: torchvision has no {name}, only its ResNets go there (and to detectron2)')
    other = build(weights=None)
    other.fc = nn.Identity()
    state = model.state_dict()
    with blame(f"--to: not torchvision's {name}"):
        check_fits({k: v.shape for k, v in state.items()}, {k: v.shape for k, v in other.state_dict().items()})
    other.load_state_dict(state)
    other.eval()
    images = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    wanted = model(images)
    if not torch.allclose(other(images), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item()):
        raise InputError(f"--to: torchvision's {name} gives other features than this variant of it")
    return other


def to_torchvision(model: nn.Module, path: Path) -> str:
    """safetensors with the names of torchvision's ResNet, no `fc`."""
    metadata = {'format': 'pt', **{k: json.dumps(v) for k, v in input_config(model).items()}}
    save_file(as_torchvision(model).state_dict(), path, metadata=metadata)
    name = model.pretrained_cfg['architecture']
    return (
        f'model = torchvision.models.{name}(); model.fc = torch.nn.Identity(); '
        f'model.load_state_dict(safetensors.torch.load_file(...))')


def detectron2_name(name: str) -> str:
    """Name of a tensor of torchvision's ResNet in detectron2's."""
    if not name.startswith('layer'):
        name = f'stem.{name}'
    name = re.sub(r'^layer(\d)', lambda found: f'res{int(found[1]) + 1}', name)
    name = re.sub(r'\bbn(\d)', r'conv\1.norm', name)
    return name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')


def to_detectron2(model: nn.Module, path: Path) -> str:
    """A `.pth` of tensors that detectron2's checkpointer and `torch.load(weights_only=True)` read: no free pickle."""
    state = as_torchvision(model).state_dict()
    tensors = {detectron2_name(k): v for k, v in state.items() if not k.endswith('num_batches_tracked')}
    torch.save({'model': tensors, '__author__': 'timm-cgh', 'matching_heuristics': True}, path)
    config, block = input_config(model), model.layer1[0]
    mean, std = ([round(255 * value, 3) for value in config[key]] for key in ('mean', 'std'))
    resnet = {'DEPTH': int(re.search(r'resnex?t(\d+)', config['architecture'])[1]), 'STRIDE_IN_1X1': 'false'}
    if resnet['DEPTH'] < 50:
        resnet['RES2_OUT_CHANNELS'] = 64
    elif block.conv2.in_channels != 64:  # ResNeXt, wide ResNet
        groups = block.conv2.groups
        resnet.update(NUM_GROUPS=groups, WIDTH_PER_GROUP=block.conv2.in_channels // groups)
    # the defaults there are for Caffe2's weights: BGR, the stride in the 1x1 convolution, no division by the deviation
    resnet = ', '.join(f'{key}: {value}' for key, value in resnet.items())
    return f'INPUT: {{FORMAT: RGB}}, MODEL: {{PIXEL_MEAN: {mean}, PIXEL_STD: {std}, RESNETS: {{{resnet}}}}}'


def to_onnx(model: nn.Module, path: Path) -> str:
    """ONNX by torch's exporter, any batch size, with the input configuration as JSON under `input_config`."""
    if find_spec('onnxscript') is None:
        raise InputError('--to onnx: needs two packages, pip install onnx onnxscript')
    images = torch.zeros(2, *model.pretrained_cfg['input_size'])
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=['images'],
        output_names=['features'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
    )
    program.model.metadata_props['input_config'] = json.dumps(input_config(model))
    program.save(path)
    return 'onnxruntime.InferenceSession(...).run(None, {"images": ...}); its metadata has the input configuration'


class Format(NamedTuple):
    """Where a backbone can go."""
    suffix: str
    write: Callable[[nn.Module, Path], str]  # gives how it is used


FORMATS = {
    'torchvision': Format('.safetensors', to_torchvision),
    'detectron2': Format('.pth', to_detectron2),
    'onnx': Format('.onnx', to_onnx),
}


def convert(source: str, to: str, path: Union[str, Path]) -> None:
    """Write a backbone for another program, whole or not at all, and say how it is used there.

    Args:
        source: see `find_folder`
        to: a key of `FORMATS`
        path: file to write

    Raises:
        InputError: no such backbone, one that the format does not take, or a file that cannot be written
    """
    suffix, write = FORMATS[to]
    if Path(path).suffix != suffix:
        raise InputError(f'--output {path}: must end in {suffix} for --to {to}')
    folder = find_folder(source)
    with blame(source):
        model = load_folder(folder, num_classes=0).eval()
    with blame('--to', to):
        with blame('--output', path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temp:
            use = write(model, temp)
    _logger.info(f'{path}: {use}')

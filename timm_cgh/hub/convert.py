"""Backbones in the formats of other libraries: torchvision, detectron2, ONNX.

detectron2's names for a ResNet are those that its own tools/convert-torchvision-to-d2.py and MoCo's
detection/convert-pretrain-to-detectron2.py write: `stem.conv1.weight`, `stem.conv1.norm.*`, `res2.0.conv1.weight`,
`res2.0.conv1.norm.*`, `res2.0.shortcut.*`. Its checkpointer matches them as suffixes (`matching_heuristics`), so one
file serves FPN models (`backbone.bottom_up.res5...`) and C4 models (`backbone.res4...`, `roi_heads.res5...`).
"""
import json
import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Union

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torchvision import models as torchvision_models

from timm_cgh.errors import InputError, checking
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.eval.loader import eval_crop_pct
from timm_cgh.files import atomic_path
from timm_cgh.models.checkpoints import find_source, load_folder, read_file, run_arguments
from timm_cgh.models.matching import misfits

__all__ = ['FORMATS', 'as_torchvision', 'convert']

_logger = logging.getLogger('hub')
_MAX_ONNX = 1536 * 2 ** 20  # bytes; torch writes larger weights into a second file


def _load(source: str, **kwargs: Any) -> nn.Module:
    """The plain timm model in a folder, a checkpoint of a run, or on the Hub, in eval mode; `kwargs` for a folder's."""
    path = find_source(source, 'source')
    if path.is_dir():
        return load_folder(path, **kwargs).eval()
    if not run_arguments(read_file(path, 'source', mmap=True)):
        raise InputError(f'source={source}: weights of an unknown model; give a run, its export/ or its checkpoint')
    backbone = load_backbone(checkpoint=str(path))
    crop_pct = eval_crop_pct(min(backbone.data_config['input_size'][1:]))
    backbone.model.pretrained_cfg.update(backbone.data_config, crop_pct=crop_pct, tag=None)  # not the stock weights'
    return backbone.model


def _input_config(model: nn.Module) -> Dict[str, Any]:
    """Which model it is, and how its images are prepared."""
    names = ('architecture', 'tag', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'label_names')
    return {name: value for name, value in model.pretrained_cfg.items() if name in names and value is not None}


@torch.no_grad()
def as_torchvision(model: nn.Module) -> nn.Module:
    """torchvision's ResNet with the weights of a timm model with `num_classes=0`, both in eval mode; same features.

    Raises:
        InputError: torchvision has no such model, or a variant that differs
    """
    name = model.pretrained_cfg['architecture']
    build = getattr(torchvision_models.resnet, name, None)
    if not callable(build):
        raise InputError(f'to: torchvision has no {name}; only its ResNets can be converted for it and for detectron2')
    other = build(weights=None)
    other.fc = nn.Identity()
    if words := misfits(model.state_dict(), other.state_dict()):
        raise InputError(f"to: differs from torchvision's {name}: {words}")
    other.load_state_dict(model.state_dict())
    other.eval()
    images = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    features = model(images)
    if not torch.allclose(other(images), features, rtol=1e-4, atol=1e-4 * features.abs().max().item()):
        raise InputError(f"to: torchvision's {name} computes other features than this variant of it")
    return other


def _write_torchvision(model: nn.Module, path: Path) -> str:
    """safetensors with the names of torchvision's ResNet, without `fc`."""
    config = _input_config(model)
    metadata = {'format': 'pt', **{k: json.dumps(v) for k, v in config.items()}}
    save_file(as_torchvision(model).state_dict(), path, metadata=metadata)
    return (
        f"model = torchvision.models.{config['architecture']}(); model.fc = torch.nn.Identity(); "
        f'model.load_state_dict(safetensors.torch.load_file(...))')


def _detectron2_name(name: str) -> str:
    """detectron2's name for a tensor of torchvision's ResNet."""
    if not name.startswith('layer'):
        name = f'stem.{name}'
    name = re.sub(r'^layer(\d)', lambda found: f'res{int(found[1]) + 1}', name)
    name = re.sub(r'\bbn(\d)', r'conv\1.norm', name)
    return name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')


def _write_detectron2(model: nn.Module, path: Path) -> str:
    """A `.pth` of tensors for detectron2's checkpointer, readable by `torch.load(weights_only=True)`."""
    state = as_torchvision(model).state_dict()
    tensors = {_detectron2_name(k): v for k, v in state.items() if not k.endswith('num_batches_tracked')}
    torch.save({'model': tensors, '__author__': 'timm-cgh', 'matching_heuristics': True}, path)
    config, block = _input_config(model), model.layer1[0]
    mean, std = ([round(255 * value, 3) for value in config[key]] for key in ('mean', 'std'))
    depth = int(re.sub(r'.*resnex?t(\d+).*', r'\1', config['architecture']))
    resnet = {'DEPTH': depth, 'STRIDE_IN_1X1': 'false'}
    if depth < 50:
        resnet['RES2_OUT_CHANNELS'] = 64
    elif block.conv2.in_channels != 64:  # ResNeXt, wide ResNet
        groups = block.conv2.groups
        resnet.update(NUM_GROUPS=groups, WIDTH_PER_GROUP=block.conv2.in_channels // groups)
    # detectron2's defaults are for Caffe2 weights: BGR, the stride in the 1x1 convolution, no division by the deviation
    settings = ', '.join(f'{key}: {value}' for key, value in resnet.items())
    return f'INPUT: {{FORMAT: RGB}}, MODEL: {{PIXEL_MEAN: {mean}, PIXEL_STD: {std}, RESNETS: {{{settings}}}}}'


def _write_onnx(model: nn.Module, path: Path) -> str:
    """ONNX from torch's exporter, for any batch size, with the input configuration as JSON under `input_config`; a
    classifier's outputs are its logits.
    """
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > _MAX_ONNX:
        raise InputError(f'to=onnx: the weights have {size / 1e9:.2f} GB, one file holds {_MAX_ONNX / 1e9:.2f}')
    if find_spec('onnxscript') is None:
        raise InputError('to=onnx: needs two packages, pip install onnx onnxscript')
    images = torch.zeros(2, *model.pretrained_cfg['input_size'])
    with checking('to', 'onnx', RuntimeError):
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=['images'],
            output_names=['logits' if model.num_classes else 'features'],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
        )
    program.model.metadata_props['input_config'] = json.dumps(_input_config(model))
    program.save(path)
    return 'onnxruntime.InferenceSession(...).run(None, {"images": ...}); the input configuration is in its metadata'


FORMATS = {  # suffix of the file, and a function that writes a model and returns how the file is used
    'torchvision': ('.safetensors', _write_torchvision),
    'detectron2': ('.pth', _write_detectron2),
    'onnx': ('.onnx', _write_onnx),
}


def convert(source: str, to: str, output: Union[str, Path]) -> None:
    """Write a model (see `find_source`; a file must be a run's checkpoint) in one of `FORMATS`, and log its use.

    A classifier keeps its head in ONNX; the other formats hold backbones.

    Raises:
        InputError: no such backbone, one that the format does not support, or a file that cannot be written
    """
    suffix, write = FORMATS[to]
    if Path(output).suffix != suffix:
        raise InputError(f'output={output}: must end in {suffix} for `to` {to}')
    model = _load(source) if to == 'onnx' else _load(source, num_classes=0)
    with checking('output', output, OSError, SafetensorError):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(output) as temp:
            use = write(model, temp)
    _logger.info(f'{output}: {use}')

"""timm backbones: create one, recognise a features_only wrapper, turn it back into the plain model."""
import difflib
import math
import os
import reprlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch.nn as nn

from timm_cgh.download import HUB_PREFIX, fetch_folder
from timm_cgh.errors import InputError, checking
from timm_cgh.files import read_json

__all__ = [
    'ImageSize', 'as_image_size', 'check_model', 'create_backbone', 'is_features_only', 'plain_backbone', 'plain_names',
    'read_config', 'resolve_data_config']

ImageSize = Union[int, Sequence[int]]
_LOCAL_PREFIX = 'local-dir:'  # timm's
_OWN_PARAMETERS = {'features_only', 'img_size', 'in_chans', 'num_classes', 'out_indices', 'pretrained'}


def as_image_size(img_size: Optional[ImageSize]) -> Optional[Union[int, Tuple[int, int]]]:
    """Side of square images, px, else (H, W); of a side, or a sequence of one or two.

    Raises:
        InputError: more sides
    """
    if img_size is None or isinstance(img_size, int):
        return img_size
    if len(img_size) not in (1, 2):
        raise InputError(f"img_size={' '.join(map(str, img_size))}: must be one side, or height and width")
    return img_size[0] if img_size[0] == img_size[-1] else (img_size[0], img_size[1])


def check_model(model: str, model_kwargs: Optional[Mapping[str, Any]] = None) -> None:
    """Check that timm has a model of this name, or that it is a folder (`local-dir:`); the Hub is not asked.

    Raises:
        InputError: unknown to timm, with the most similar names; a folder without a `config.json`; arguments that have
            a parameter of their own
    """
    if taken := sorted(_OWN_PARAMETERS & (model_kwargs or {}).keys()):
        instead = '' if taken[0] == 'num_classes' else f', `{taken[0]}` sets it'
        raise InputError(f'model_kwargs: must not hold {taken[0]}{instead}')
    if model.startswith(_LOCAL_PREFIX):
        folder = model.removeprefix(_LOCAL_PREFIX)
        if not os.path.isfile(os.path.join(folder, 'config.json')):
            raise InputError(f"model={model}: no config.json in {folder}; a run's folder has it in export/")
    elif ':' not in model and not timm.is_model(model):
        similar = difflib.get_close_matches(model.split('.')[0], timm.list_models(), n=3)
        hint = f", did you mean {', '.join(similar)}?" if similar else ''
        for folder in (model, os.path.join(model, 'export')):
            if os.path.isfile(os.path.join(folder, 'config.json')):
                hint = f'; did you mean {_LOCAL_PREFIX}{folder}?'
        raise InputError(f'model={model}: timm has no such model{hint}')


def read_config(path: Union[str, Path]) -> Dict[str, Any]:
    """A `config.json` in timm's hub format.

    Raises:
        InputError: no such file, or values that no timm model has; starts with the path
    """
    config = read_json(path)
    cfg = config.get('pretrained_cfg', {})
    if not isinstance(config.get('architecture'), str) or not isinstance(cfg, dict):
        raise InputError(f'{path}: not the configuration of a timm model')
    cfg = {**config, **cfg}  # old versions of timm wrote one level

    def check(name: str, valid: Callable[[Any], bool]) -> None:
        if name in cfg and not valid(cfg[name]):
            raise InputError(f'{path}: its {name} is {reprlib.repr(cfg[name])}')

    def numbers(values: Any, accept: Callable[[float], bool]) -> bool:
        return isinstance(values, list) and all(type(value) in (int, float) and accept(value) for value in values)

    check('input_size', lambda v: numbers(v, lambda n: n in range(1, 2 ** 16)) and len(v) == 3)
    lengths = (1, 3, cfg.get('input_size', [3])[0])  # timm's models for other numbers of channels may keep three
    check('mean', lambda v: numbers(v, math.isfinite) and len(v) in lengths)
    check('std', lambda v: numbers(v, lambda n: 0 < n < math.inf) and len(v) in lengths)
    check('num_classes', lambda v: type(v) is int and v in range(2 ** 31))
    return config


def create_backbone(name: str, img_size: Optional[ImageSize] = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model(name, num_classes=0)`, with `img_size` passed on to the models that take one.

    Models with positional embeddings or windows are built for one input size; the others take any size and refuse the
    argument. Weights from the Hub are downloaded by `timm_cgh.download`: safetensors only, verified against their hash.

    Args:
        name: timm model name, also `hf-hub:` and `local-dir:`
        img_size: side of the training images, px, or (H, W)

    Raises:
        InputError: `hf-hub:` weights that cannot be downloaded, or do not have the published hash
        RuntimeError: from timm: unknown model, or one without pretrained weights
    """
    if not kwargs.get('features_only'):
        kwargs.setdefault('num_classes', 0)
    if kwargs.get('pretrained') and name.startswith(HUB_PREFIX):
        with checking('model', name, RuntimeError):
            name = f"{_LOCAL_PREFIX}{fetch_folder(name, cache_dir=kwargs.get('cache_dir'))}"
    if name.startswith(_LOCAL_PREFIX):
        read_config(Path(name.removeprefix(_LOCAL_PREFIX), 'config.json'))
    if img_size is not None:
        try:
            return timm.create_model(name, img_size=as_image_size(img_size), **kwargs)
        except TypeError as error:
            if 'img_size' not in str(error):
                raise
    return timm.create_model(name, **kwargs)


def resolve_data_config(
        pretrained_cfg: Mapping[str, Any],
        *,
        in_chans: Optional[int] = None,
        img_size: Optional[ImageSize] = None,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
        interpolation: Optional[str] = None,
) -> Dict[str, Any]:
    """Size and normalisation of a model's images: the given values, else the model's own.

    Args:
        pretrained_cfg: the model's
        in_chans: channels of the images
        img_size: side, px, or (H, W)
        mean, std: of pixels in [0, 1]; one value per channel, or one for all of them. The model's own are averaged for
            images with another number of channels
        interpolation: for resizing

    Returns:
        `input_size` (C, H, W), `mean`, `std` (one value per channel) and `interpolation`

    Raises:
        InputError: `mean` or `std` with another number of values
    """
    chans = in_chans or pretrained_cfg['input_size'][0]
    size = as_image_size(img_size) or pretrained_cfg['input_size'][1:]
    height, width = (size, size) if isinstance(size, int) else size
    interpolation = interpolation or pretrained_cfg.get('interpolation') or 'bilinear'
    config: Dict[str, Any] = dict(input_size=(chans, height, width), interpolation=interpolation)
    for name, given in (('mean', mean), ('std', std)):
        values = list(given or pretrained_cfg[name])
        if len(values) != chans:
            if given and len(values) > 1:
                raise InputError(f'{name}: {len(values)} values for {chans} channels')
            values = [sum(values) / len(values)] * chans
        config[name] = tuple(values)
    return config


def is_features_only(backbone: nn.Module) -> bool:
    """Whether a timm module returns a list of maps (built with `features_only=True`) rather than a pooled feature."""
    return hasattr(getattr(backbone, 'feature_info', None), 'channels')  # plain models hold a list of dicts there


def plain_names(wrapper: Iterable[str], plain: Iterable[str]) -> Dict[str, str]:
    """Names of a plain timm model's tensors -> their names in its `features_only` wrapper, where it has them."""
    own, names = set(wrapper), {}
    for key in plain:
        # timm's wrappers hold either the whole model as `model`, or its children, with nested names joined by `_`
        candidates = [f'model.{key}', *(key.replace('.', '_', joints) for joints in range(key.count('.')))]
        if found := [candidate for candidate in candidates if candidate in own]:
            names[key] = found[0]
    return names


def plain_backbone(backbone: nn.Module, img_size: Optional[ImageSize] = None, **model_kwargs: Any) -> nn.Module:
    """The plain timm model that a backbone's weights belong to; a plain model is returned as it is.

    The weights of a `features_only` wrapper are copied into a new model of the same architecture; its attribute
    `untrained_keys` lists the tensors that the wrapper lacks (layers behind the last map) and that stay as they are.

    Args:
        backbone: timm model or `features_only` wrapper
        img_size: side of the images that the wrapper was built for, px, or (H, W), for models that depend on it
        **model_kwargs: arguments that the wrapper was built with, `features_only` and `out_indices` aside

    Raises:
        RuntimeError: a tensor of the wrapper has no place in the plain model
    """
    if not is_features_only(backbone):
        return backbone
    model = create_backbone(backbone.pretrained_cfg['architecture'], img_size=img_size, **model_kwargs)
    trained, plain = backbone.state_dict(), model.state_dict()
    names = {k: n for k, n in plain_names(trained, plain).items() if trained[n].shape == plain[k].shape}
    lost = trained.keys() - names.values()
    if lost:
        raise RuntimeError(f'{min(lost)} of the features_only backbone has no place in the plain model')
    model.load_state_dict({key: trained[name] for key, name in names.items()}, strict=False)
    model.untrained_keys = [key for key in plain if key not in names]
    return model

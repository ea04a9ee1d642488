"""Weights into timm models: nothing is unpickled freely, and a file fits or is refused in one line."""
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from timm.models import load_state_dict

__all__ = ['check_fits', 'check_folder', 'load_folder', 'load_weights', 'weights_digest']


def check_fits(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Compare the tensors of a file with those of a model.

    Args:
        found, wanted: name -> shape

    Raises:
        RuntimeError: names the first tensor that is missing, unexpected or of another shape
    """
    both = wanted.keys() & found.keys()
    for kind, names in (
            ('the file lacks', wanted.keys() - both),
            ('the model has no place for', found.keys() - both),
            ('the file has another shape for', [name for name in both if tuple(wanted[name]) != tuple(found[name])]),
    ):
        if names:
            raise RuntimeError(f'{kind} {sorted(names)[0]} ({len(names)} such tensors)')


def _shapes(state: Mapping[str, torch.Tensor]) -> Dict[str, Sequence[int]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _shapes_in_file(path: Path) -> Dict[str, Sequence[int]]:
    """name -> shape of a safetensors file, from its header; the reader compares it with the length of the file."""
    if not path.is_file():
        raise FileNotFoundError(f'{path.parent} has no {path.name}')
    try:
        with safe_open(path, framework='pt') as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise RuntimeError(f'{path} is not a whole safetensors file ({error})') from error


def check_folder(folder: Union[str, Path], architecture: Optional[str] = None) -> Dict[str, Any]:
    """Configuration of a folder in timm's hub format, once its weights are known to be whole and its model's own.

    Args:
        folder: holds `config.json` and `model.safetensors`
        architecture: what it must hold; default any that timm knows

    Raises:
        FileNotFoundError: one of the two is absent
        RuntimeError: broken, or not the weights of that architecture; one line
    """
    folder = Path(folder)
    path = folder / 'config.json'
    if not path.is_file():
        raise FileNotFoundError(f'{folder} has no config.json: give the export folder of a run')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        found = config['architecture']
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f'{path} is not the configuration of a timm model ({error})') from error
    if architecture is not None and found != architecture:
        raise RuntimeError(f'{folder} holds a {found}, not a {architecture}')
    shapes = _shapes_in_file(folder / 'model.safetensors')
    try:
        with torch.device('meta'):
            wanted = _shapes(timm.create_model(f'local-dir:{folder}').state_dict())
    except Exception as error:  # whatever arguments in the file make a constructor raise
        raise RuntimeError(f'{path} describes no model that timm can build ({" ".join(str(error).split())})') from error
    try:
        check_fits(shapes, wanted)
    except RuntimeError as error:
        raise RuntimeError(f'{folder / "model.safetensors"} are no weights of a {found}: {error}') from error
    return config


def load_folder(folder: Union[str, Path], architecture: Optional[str] = None, **kwargs: Any) -> nn.Module:
    """The model in a folder in timm's hub format, by timm's own loader.

    Args:
        folder, architecture: see `check_folder`
        **kwargs: what `timm.create_model` takes, such as `num_classes`, `in_chans`, `features_only`

    Raises:
        FileNotFoundError, RuntimeError: see `check_folder`
    """
    check_folder(folder, architecture)
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)


def load_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint file into a backbone; the classifier of the file, if any, is left out.

    Args:
        model: timm model with `num_classes=0`, or a `features_only` wrapper with a checkpoint under its own names
        path: safetensors, or a torch file that `weights_only=True` reads

    Raises:
        FileNotFoundError: no such file
        RuntimeError: not readable, or tensors that do not fit; names the first of them
    """
    if not os.path.isfile(path):
        raise FileNotFoundError('no such file')
    try:
        state = load_state_dict(path)
    except SafetensorError as error:
        raise RuntimeError(f'not a whole safetensors file ({error})') from error
    classifiers = model.pretrained_cfg.get('classifier') or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    wanted = model.state_dict()
    state = {k: v for k, v in state.items() if k in wanted or not k.startswith(tuple(f'{c}.' for c in classifiers))}
    check_fits(_shapes(state), _shapes(wanted))
    model.load_state_dict(state)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer: equal for bit-identical weights, whatever device they are on."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

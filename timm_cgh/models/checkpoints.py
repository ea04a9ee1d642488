"""Reading weights: files, folders in timm's hub format, models of the Hub. Nothing is unpickled freely."""
import argparse
import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from timm_cgh.download import HUB_PREFIX, fetch_folder
from timm_cgh.errors import InputError, checking, reason
from timm_cgh.files import read_yaml

from .backbone import read_config
from .matching import backbone_state, misfits

__all__ = [
    'check_folder', 'find_run_arguments', 'find_source', 'load_folder', 'load_weights', 'read_file', 'run_arguments',
    'weights_digest']


def read_file(path: Union[str, Path], parameter: str = 'checkpoint', mmap: bool = False) -> Dict[str, Any]:
    """Content of a checkpoint file: safetensors, or whatever `torch.load(weights_only=True)` reads.

    Args:
        parameter: name of the path in messages
        mmap: read tensors when they are used, where the file's format allows it

    Raises:
        InputError: no such file, unreadable, or not a dictionary
    """
    path = str(path)
    if not os.path.isfile(path):
        raise InputError(f'{parameter}={path}: no such file')
    try:
        if path.endswith('.safetensors'):
            return load_file(path)
        mmap = mmap and zipfile.is_zipfile(path)  # not the format before torch 1.6
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's, timm's and ours hold their arguments
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as error:  # of broken pickles, torch.load raises nearly every type there is
        pickled = re.search(r'GLOBAL (\S+) was not an allowed global', str(error))
        why = f'it holds a pickled {pickled[1]}' if pickled else reason(error, 160).removeprefix('Weights only load ')
        raise InputError(
            f'{parameter}={path}: not a readable safetensors or weights-only torch file ({why})') from error
    if not isinstance(content, dict):
        raise InputError(f'{parameter}={path}: holds a {type(content).__name__}, must hold a dictionary')
    return content


def run_arguments(content: Mapping[str, Any]) -> Dict[str, Any]:
    """Arguments of the training run that a checkpoint is from; empty for checkpoints of other programs."""
    args = content.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else args  # as timm stores them
    return dict(args) if 'task_state' in content and isinstance(args, Mapping) else {}


def find_run_arguments(model: Optional[str], checkpoint: Optional[str]) -> Tuple[Mapping[str, Any], str]:
    """Arguments of the run that the weights to load are from, and the file that holds them; empty if there is none.

    Args:
        model: `local-dir:FOLDER` with the run's `args.yaml` beside the folder, or another name
        checkpoint: of the run, or its folder; it comes before `model`
    """
    source = Path(checkpoint or str(model or '').partition('local-dir:')[2] or os.devnull).expanduser()
    if source.is_file():
        return run_arguments(read_file(source, mmap=True)), str(source)
    for folder in (source, source.parent):
        if source.is_dir() and (folder / 'args.yaml').is_file():
            return read_yaml(folder / 'args.yaml'), str(folder / 'args.yaml')
    return {}, ''


def find_source(
        source: Union[str, Path],
        parameter: str = 'checkpoint',
        cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """The file, or the folder in timm's hub format, that holds the weights that a user names.

    Args:
        source: file; folder of a run, its `export/` or another in timm's hub format; or `hf-hub:owner/name[@revision]`
        parameter: its name in messages
        cache_dir: of downloads; default the Hub client's

    Raises:
        InputError: no such file, no model in the folder, or a failed download
    """
    if str(source).startswith(HUB_PREFIX):
        with checking(parameter, source, RuntimeError):
            return Path(fetch_folder(str(source), cache_dir=cache_dir))
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f'{parameter}={source}: no such file')
    for folder in (path / 'export', path):
        if (folder / 'config.json').is_file():
            return folder
    raise InputError(f"{parameter}={source}: no config.json there; give a run's folder, its export/, or a file")


def load_weights(
        model: nn.Module,
        source: Union[str, Path],
        teacher: bool = False,
        parameter: str = 'checkpoint',
) -> str:
    """Load a backbone's weights from a checkpoint of any origin (see `backbone_state`).

    Args:
        model: plain timm model with `num_classes=0`; or a `features_only` wrapper, by its own names or a plain model's
        source, parameter: see `find_source`
        teacher: take the averaged network

    Returns:
        where in the file the weights were, '' for the top level

    Raises:
        InputError: nothing readable there, or weights that do not fit
    """
    path = find_source(source, parameter)
    content = read_file(path / 'model.safetensors' if path.is_dir() else path, parameter)
    state, where = backbone_state(content, model, f'{parameter}={source}', teacher)
    for name, value in state.items():
        if not value.float().isfinite().all():
            raise InputError(f'{parameter}={source}: {name} is not finite')
    model.load_state_dict(state)
    return where


def check_folder(folder: Union[str, Path], architecture: Optional[str] = None) -> Dict[str, Any]:
    """Check that a folder in timm's hub format is complete, and that its weights fit the model that it describes.

    It must hold the `architecture`, where one is given. Returns the content of `config.json`.

    Raises:
        InputError: a file is missing or broken, or the weights are another architecture's
    """
    config_path, weights_path = Path(folder, 'config.json'), Path(folder, 'model.safetensors')
    if absent := [path.name for path in (config_path, weights_path) if not path.is_file()]:
        raise InputError(f"{folder}: has no {absent[0]}; give a run's export folder")
    config = read_config(config_path)
    name = config['architecture']
    if architecture not in (None, name):
        raise InputError(f'{folder}: holds a {name}, not a {architecture}')
    try:
        with safe_open(weights_path, framework='pt') as file:  # compares the header with the length of the file
            found = {k: torch.empty(file.get_slice(k).get_shape(), device='meta') for k in sorted(file.keys())}
    except SafetensorError as error:
        raise InputError(f'{weights_path}: not a complete safetensors file ({reason(error)})') from error
    # the file's own arguments go to the constructor
    refusals = (AssertionError, KeyError, RuntimeError, TypeError, ValueError)
    with checking(str(config_path), None, *refusals), torch.device('meta'):
        model = timm.create_model(f'local-dir:{folder}')
    if words := misfits(found, model.state_dict()):
        raise InputError(f'{weights_path}: {words}')
    return config


def load_folder(folder: Union[str, Path], architecture: Optional[str] = None, **kwargs: Any) -> nn.Module:
    """The model in a folder in timm's hub format, by timm's own loader; `kwargs` are those of `timm.create_model`.

    Raises:
        InputError: see `check_folder`
    """
    check_folder(folder, architecture)
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: equal for bit-identical weights on any device."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

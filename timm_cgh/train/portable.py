"""A run's checkpoint as one safetensors file for the Hub: tensors by name, everything else as JSON in the header."""
import json
from pathlib import Path
from typing import Any, Dict, Mapping, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from timm_cgh.errors import checking
from timm_cgh.files import atomic_path

__all__ = ['TASK_FILE', 'read_portable', 'write_portable']

TASK_FILE = 'task.safetensors'  # its name in a repository on the Hub
_LOCAL_ENTRIES = ('args', 'saver')  # paths of this machine, and the ranking of files that stay behind


def _pack(value: Any, name: str, tensors: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """JSON for a nest of dictionaries, lists, plain values and tensors; the tensors go to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {'tensor': name}
    if isinstance(value, Mapping):  # as pairs: an optimiser's keys are integers
        return {'dict': [[key, _pack(item, f'{name}.{key}', tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {'list': [_pack(item, f'{name}.{i}', tensors) for i, item in enumerate(value)]}
    return {'value': value}


def _unpack(node: Dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    (kind, content), = node.items()
    if kind == 'tensor':
        return tensors[content]
    if kind == 'dict':
        return {key: _unpack(item, tensors) for key, item in content}
    if kind == 'list':
        return [_unpack(item, tensors) for item in content]
    return content


def write_portable(state: Mapping[str, Any], path: Union[str, Path]) -> None:
    """Write what `read_checkpoint` returned, without the run's arguments, which name its machine."""
    tensors: Dict[str, torch.Tensor] = {}
    kept = {key: value for key, value in state.items() if key not in _LOCAL_ENTRIES}
    layout = json.dumps({key: _pack(value, key, tensors) for key, value in kept.items()})
    with atomic_path(path) as temp:
        save_file(tensors, temp, metadata={'format': 'pt', 'layout': layout})


def read_portable(path: Union[str, Path]) -> Dict[str, Any]:
    """Content of a file of `write_portable`; tuples come back as lists.

    Raises:
        InputError: another or a broken file
    """
    with checking('resume', path, KeyError, OSError, TypeError, ValueError, SafetensorError):
        with safe_open(path, framework='pt') as file:
            layout = json.loads((file.metadata() or {}).get('layout', '{}'))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {key: _unpack(node, tensors) for key, node in layout.items()}

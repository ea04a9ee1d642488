"""Checkpoint files of many origins -> the state dict of a plain timm backbone."""
import argparse
import os
import sys
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from safetensors.torch import load_file

from timm_cgh.errors import InputError

__all__ = ['backbone_state', 'read_weights', 'run_arguments']

# where a checkpoint keeps its weights, in order of preference; DINO judges its teacher
_CONTAINERS = ('state_dict', 'model', 'teacher', 'student', 'model_state_dict', 'model_state', 'net')
# wrappers and encoders whose weights are an average over the training, and not the network that was trained
_AVERAGED = ('encoder_k', 'momentum', 'teacher', 'target', 'ema')
# first part of a name behind the backbone's prefix: what is no part of the backbone
_HEADS = (
    'fc', 'head', 'heads', 'classifier', 'last_linear', 'projector', 'projection_head', 'predictor', 'prototypes',
    'mlp_head', 'mlp', 'contrastive_head', 'queue', 'queue_ptr', 'linear', 'last_layer', 'mask_token', 'decoder',
)


def read_weights(path: str) -> Dict[str, Any]:
    """Content of a checkpoint file: safetensors, or what `torch.load(weights_only=True)` reads.

    Raises:
        InputError: no such file, or not readable in this way
    """
    if not os.path.isfile(path):
        raise InputError(f'--checkpoint {path}: no such file')
    try:
        if path.endswith('.safetensors'):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's, timm's and ours hold their arguments
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a broken or foreign file may make the readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f'--checkpoint {path}: not a readable safetensors or weights-only torch file ({reason[:160]})') from error
    if not isinstance(content, dict):
        raise InputError(f'--checkpoint {path}: holds a {type(content).__name__}, must hold a state dict')
    return content


def run_arguments(content: Mapping[str, Any]) -> Dict[str, Any]:
    """Arguments of the CGH run that a checkpoint is from; empty for any other."""
    args = content.get('args')
    return dict(vars(args)) if 'task_state' in content and isinstance(args, argparse.Namespace) else {}


def _tensors(content: Mapping[str, Any], path: str, teacher: bool) -> Tuple[Dict[str, torch.Tensor], str]:
    """The named tensors of a checkpoint and the name of the part that they are taken from."""
    if 'task_state' in content and teacher:
        return content['task_state']['teacher'], 'task_state.teacher'
    names = ('teacher', 'model_ema', 'state_dict_ema', *_CONTAINERS) if teacher else _CONTAINERS
    for name in names:
        if isinstance(content.get(name), Mapping):
            return dict(content[name]), name
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        found = ', '.join(sorted(map(str, content))[:6]) or 'nothing'
        raise InputError(f'--checkpoint {path}: no weights, only {found}')
    return dict(content), ''


def _prefixes(state: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], teacher: bool) -> List[str]:
    """What stands before the backbone's names in a file: the prefix under which most of them are found first.

    Of two networks with the same names (MoCo's query and key encoders), the trained one; for a teacher the averaged.
    """
    anchors = list(wanted)[:3]  # a file may lack one of them
    prefixes = {key[:len(key) - len(a)] for a in anchors for key in state if key == a or key.endswith(f'.{a}')}

    def rank(prefix: str) -> Tuple[int, bool, int, str]:
        found = sum(prefix + name in state for name in wanted)
        averaged = any(word in part for part in prefix.split('.') for word in _AVERAGED)
        return -found, averaged != teacher, len(prefix), prefix

    return sorted(prefixes, key=rank)


def _misfits(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> List[str]:
    """What keeps a state dict from being the wanted one, in words."""
    lacking = [k for k in wanted if k not in state and not k.endswith('num_batches_tracked')]  # old files lack those
    foreign = [k for k in state if k not in wanted]
    shapes = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]

    def some(names: List[str]) -> str:
        return ', '.join(names[:2]) + (f' ({len(names)} such)' if len(names) > 1 else '')

    words = []
    if lacking:
        words.append(f'the file lacks {some(lacking)}')
    if foreign:
        words.append(f'the model has no place for {some(foreign)}')
    if shapes:
        key = shapes[0]
        file, place = tuple(state[key].shape), tuple(wanted[key].shape)
        words.append(f'{some(shapes)} is {file} in the file, {place} in the model')
    return words


def _timm_filter(model: nn.Module) -> Optional[Callable]:
    """timm's conversion of the names that an architecture's authors use, and of position embeddings to its size."""
    return getattr(sys.modules.get(type(model).__module__), 'checkpoint_filter_fn', None)


def backbone_state(
        content: Mapping[str, Any],
        model: nn.Module,
        path: str,
        teacher: bool = False,
        model_name: str = '',
) -> Tuple[Dict[str, torch.Tensor], str]:
    """Weights of a backbone in a checkpoint of another program.

    Recognised: ours (student and teacher), timm's, MoCo's (`module.encoder_q.`), DINO's (`teacher`,
    `module.backbone.`), torchvision's, and whatever other prefix stands before the backbone's own names; wrappers of
    DDP and torch.compile.
    Classifiers, projectors and the like are left out; what else does not fit is refused.

    Args:
        content: of the file
        model: timm model with `num_classes=0` (its names and shapes are what is looked for)
        path, model_name: for messages
        teacher: take the averaged network

    Returns:
        state dict of `model`, and where in the file it was

    Raises:
        InputError: the tensors do not fit the model; names the first of them and how many there are
    """
    tensors, container = _tensors(content, path, teacher)
    tensors = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    wanted = model.state_dict()
    prefixes = _prefixes(tensors, wanted, teacher)
    if teacher and container not in ('task_state.teacher', 'teacher', 'model_ema', 'state_dict_ema') and not (
            prefixes and any(word in prefixes[0] for word in _AVERAGED)):
        raise InputError(f'--teacher: {path} holds no teacher')
    classifiers = model.pretrained_cfg.get('classifier') or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    # no anchor: names of the architecture's authors, which timm may know
    prefix = prefixes[0] if prefixes else next((p for p in ('module.',) if any(k.startswith(p) for k in tensors)), '')
    state = {k[len(prefix):].replace('_orig_mod.', ''): v for k, v in tensors.items() if k.startswith(prefix)}
    state = {
        k: v for k, v in state.items()
        if k in wanted or not (k.split('.')[0] in _HEADS or k.startswith(tuple(f'{c}.' for c in classifiers)))}
    words = _misfits(state, wanted)
    if words and (convert := _timm_filter(model)) is not None:
        try:
            converted = convert(dict(state), model)
            converted = {k: v for k, v in converted.items() if k in wanted or k.split('.')[0] not in _HEADS}
        except Exception:  # made for other files than this one
            converted = state
        if not _misfits(converted, wanted):
            state, words = converted, []
    if words:
        raise InputError(f"--checkpoint {path}: does not fit --model {model_name}: {'; '.join(words)}")
    return {k: state.get(k, v) for k, v in wanted.items()}, '.'.join(filter(None, (container, prefix.rstrip('.'))))

"""Which tensors of a checkpoint, of this program or another, are those of a backbone."""
import contextlib
import sys
from typing import Any, Collection, Dict, List, Mapping, Tuple

import timm
import torch
import torch.nn as nn

from timm_cgh.errors import InputError

from .backbone import is_features_only, plain_names, timm_config

__all__ = ['backbone_state', 'misfits']

# entries of a checkpoint that hold weights, in order of preference; of DINO's two networks the teacher is evaluated
_CONTAINERS = ('state_dict', 'model', 'teacher', 'student', 'model_state_dict', 'model_state', 'net')
_TEACHER_CONTAINERS = ('teacher', 'model_ema', 'state_dict_ema')
# parts of a name that mark a moving average of the trained network
_AVERAGED = ('encoder_k', 'momentum', 'teacher', 'target', 'ema')
# first part of a name, behind the backbone's prefix, of what does not belong to the backbone
_HEADS = (
    'fc', 'head', 'heads', 'head_dist', 'classifier', 'last_linear', 'projector', 'projection_head', 'predictor',
    'prototypes', 'mlp_head', 'mlp', 'contrastive_head', 'queue', 'queue_ptr', 'linear', 'last_layer', 'mask_token',
    'decoder',
)


def misfits(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """How the tensors of a file differ from those of a model in name and shape, in words; empty where they agree."""
    def some(names: List[str]) -> str:
        return ', '.join(names[:2]) + (f' ({len(names)} such)' if len(names) > 1 else '')

    words = []
    if lacking := [name for name in wanted if name not in found]:
        words.append(f'the file lacks {some(lacking)}')
    if unknown := [name for name in found if name not in wanted]:
        words.append(f'the model has no place for {some(unknown)}')
    if reshaped := [name for name in wanted if name in found and found[name].shape != wanted[name].shape]:
        in_file, in_model = (tuple(tensors[reshaped[0]].shape) for tensors in (found, wanted))
        words.append(f'{some(reshaped)} is {in_file} in the file, {in_model} in the model')
    return '; '.join(words)


def _tensors(content: Mapping[str, Any], at_fault: str, teacher: bool) -> Tuple[Dict[str, torch.Tensor], str]:
    """The named tensors of a checkpoint and the entry that holds them, '' for the checkpoint itself."""
    if 'task_state' in content and teacher:
        tensors, entry = content['task_state']['teacher'], 'task_state.teacher'
    else:
        entries = (*_TEACHER_CONTAINERS, *_CONTAINERS) if teacher else _CONTAINERS
        entry = next((name for name in entries if isinstance(content.get(name), Mapping)), '')
        tensors = content[entry] if entry else content
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if not tensors and not entry:
        found = ', '.join(sorted(map(str, content))[:6]) or 'nothing'
        raise InputError(f'{at_fault}: no weights, only {found}')
    return tensors, entry


def _is_averaged(prefix: str) -> bool:
    return any(word in prefix for word in _AVERAGED)


def _find_prefix(tensors: Collection[str], wanted: Collection[str], teacher: bool) -> str:
    """What stands before the backbone's names in a file: the prefix under which most of them are found.

    Of two networks with the same names (MoCo's query and key encoders) that is the trained one, for a teacher the
    averaged one.
    """
    anchors = list(wanted)[:3]  # a file may lack one of them
    prefixes = {name[:-len(a)] for a in anchors for name in tensors if name == a or name.endswith(f'.{a}')}
    if prefixes:
        counts = {prefix: sum(prefix + name in tensors for name in wanted) for prefix in prefixes}
        return min((-count, _is_averaged(p) != teacher, len(p), p) for p, count in counts.items())[-1]
    # the names may be those that the architecture's authors use, which timm converts
    return 'module.' if any(name.startswith('module.') for name in tensors) else ''


def _namings(model: nn.Module) -> List[Tuple[Dict[str, str], Collection[str]]]:
    """Names that a model's tensors may have in a file -> in the model; and names there that the model does not need.

    A `features_only` wrapper has its own names and those of the plain model.
    """
    own = model.state_dict()
    namings: List[Tuple[Dict[str, str], Collection[str]]] = [({name: name for name in own}, ())]
    if is_features_only(model):
        with torch.device('meta'):
            plain = timm.create_model(timm_config(model)['architecture'], num_classes=0).state_dict()
        names = plain_names(own, plain)
        if len(names) == len(own):
            namings.append((names, plain.keys() - names.keys()))
    return namings


def _select(
        state: Mapping[str, torch.Tensor],
        wanted: Mapping[str, torch.Tensor],
        heads: Tuple[str, ...],
) -> Tuple[Dict[str, torch.Tensor], str]:
    """A state dict without the tensors of `heads`, and how it differs from the wanted one (see `misfits`)."""
    kept = {k: v for k, v in wanted.items() if k.endswith('num_batches_tracked')}  # which old files lack
    kept.update({k: v for k, v in state.items() if k in wanted or not f'{k}.'.startswith(heads)})
    return kept, misfits(kept, wanted)


def backbone_state(
        content: Mapping[str, Any],
        model: nn.Module,
        at_fault: str,
        teacher: bool = False,
) -> Tuple[Dict[str, torch.Tensor], str]:
    """The weights of a backbone in a checkpoint.

    Recognised are the checkpoints of this package (student and teacher), timm, MoCo (`module.encoder_q.`), DINO
    (`teacher`, `module.backbone.`), torchvision, and any other prefix before the backbone's own names; also the
    wrappers of DDP and torch.compile. Classifiers and projectors are left out; what else does not fit is refused.

    Args:
        content: of the file
        model: plain timm model with `num_classes=0`, or `features_only` wrapper: its names and shapes are looked for
        at_fault: parameter and file, for messages
        teacher: take the averaged network

    Returns:
        state dict of `model`, and where in the file it was

    Raises:
        InputError: the tensors do not fit the model, or there is no averaged network
    """
    tensors, entry = _tensors(content, at_fault, teacher)
    network = getattr(model, 'model', model) if is_features_only(model) else model
    # timm's conversion of the names that an architecture's authors use, and of position embeddings to the model's size
    convert = getattr(sys.modules[type(network).__module__], 'checkpoint_filter_fn', None)
    classifiers = timm_config(model).get('classifier') or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    own, words = model.state_dict(), ''
    for names, ignored in _namings(model):
        prefix = _find_prefix(tensors, names, teacher)
        state = {k[len(prefix):].replace('_orig_mod.', ''): v for k, v in tensors.items() if k.startswith(prefix)}
        wanted = {name: own[of_model] for name, of_model in names.items()}
        heads = tuple(f'{name}.' for name in (*_HEADS, *classifiers, *ignored))
        kept, words = _select(state, wanted, heads)
        if words and convert is not None:
            with contextlib.suppress(Exception):  # the conversion is for other files than this one
                converted, misfit = _select(convert(dict(state), network), wanted, heads)
                kept, words = (kept, words) if misfit else (converted, '')
        if not words:
            if teacher and not (entry in ('task_state.teacher', *_TEACHER_CONTAINERS) or _is_averaged(prefix)):
                raise InputError(f'{at_fault}: holds no teacher')
            where = '.'.join(filter(None, (entry, prefix.rstrip('.'))))
            return {names[name]: value for name, value in kept.items()}, where
    raise InputError(f"{at_fault}: does not fit {timm_config(model)['architecture']}: {words}")

"""Which tensors of a checkpoint, of this program or another, are those of a backbone."""
import contextlib
import sys
from typing import Any, Collection, Dict, List, Mapping, NamedTuple, Tuple

import timm
import torch
import torch.nn as nn
from timm.models import adapt_input_conv

from timm_cgh.errors import InputError

from .backbone import is_features_only, plain_names

__all__ = ['backbone_state', 'misfits']

# entries of a checkpoint that hold weights, in order of preference; of DINO's two networks the teacher is evaluated;
# VISSL nests four of them
_CONTAINERS = (
    'state_dict', 'model', 'teacher', 'student', 'model_state_dict', 'model_state', 'net', 'classy_state_dict',
    'base_model', 'trunk',
)
_TEACHER_CONTAINERS = ('teacher', 'model_ema', 'state_dict_ema')
# parts of a name that mark a moving average of the trained network
_AVERAGED = ('encoder_k', 'momentum', 'teacher', 'target', 'ema')
# first part of a name, behind the backbone's prefix, of what does not belong to the backbone
_HEADS = (
    'fc', 'head', 'heads', 'head_dist', 'classifier', 'last_linear', 'projector', 'projection_head', 'predictor',
    'prototypes', 'mlp_head', 'mlp', 'contrastive_head', 'queue', 'queue_ptr', 'linear', 'last_layer', 'mask_token',
    'decoder',
)


def _as_tuple(value: Any) -> Tuple[str, ...]:
    """Names in an entry of timm's configuration: one, several or None."""
    return (value,) if isinstance(value, str) else tuple(value or ())


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
    elif other := [
            name for name, value in wanted.items()
            if value.is_floating_point() and name in found and not found[name].is_floating_point()]:
        words.append(f'{some(other)} is {found[other[0]].dtype} in the file, {wanted[other[0]].dtype} in the model')
    return '; '.join(words)


def _tensors(content: Any, at_fault: str, teacher: bool) -> Tuple[Dict[str, torch.Tensor], str]:
    """The named tensors of a checkpoint and the entry that holds them, '' for the checkpoint itself."""
    path: List[str] = []
    entries: Tuple[str, ...] = (_TEACHER_CONTAINERS if teacher else ()) + _CONTAINERS
    if 'task_state' in content and teacher:
        content, path, entries = content['task_state'], ['task_state'], ('teacher',)
    while isinstance(content, Mapping) and (
            found := [name for name in entries if isinstance(content.get(name), Mapping)]):
        path.append(found[0])
        content = content[found[0]]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, torch.Tensor)}
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise InputError(f'{at_fault}: {name} is not a dense tensor')
    if not tensors:
        keys = ', '.join(sorted(str(name)[:40] for name, _ in named)[:6]) or 'nothing'
        raise InputError(f'{at_fault}: no weights, only {keys}')
    return tensors, '.'.join(path)


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


class _Naming(NamedTuple):
    """Names that the tensors of a model may have in a file."""
    names: Dict[str, str]  # in the file -> in the model
    ignored: Collection[str] = ()  # in the file, of what the model lacks
    first_conv: Collection[str] = ()  # weights that read the image


def _namings(model: nn.Module) -> List[_Naming]:
    """A model's names and, for a `features_only` wrapper, those of the plain model; both may be numbered: in
    `Sequential(*model.children())`, as users of lightly write it, numbers stand for the names of the children.
    """
    own, plain = model.state_dict(), model
    namings = []
    if is_features_only(model):
        namings.append(_Naming({name: name for name in own}))
        with torch.device('meta'):
            plain = timm.create_model(model.pretrained_cfg['architecture'], num_classes=0)
    names = plain_names(own, plain.state_dict()) if namings else {name: name for name in own}
    if len(names) < len(own):
        return namings
    naming = _Naming(
        names, plain.state_dict().keys() - names.keys(),
        [f'{name}.weight' for name in _as_tuple(model.pretrained_cfg.get('first_conv'))])
    numbers = {name: str(i) for i, (name, _) in enumerate(plain.named_children())}

    def numbered(name: str) -> str:
        child, *rest = name.split('.')
        return '.'.join((numbers.get(child, child), *rest))

    return [*namings, naming, _Naming(
        {numbered(k): v for k, v in names.items()}, *(list(map(numbered, part)) for part in naming[1:]))]


def _adapt_channels(
        state: Dict[str, torch.Tensor],
        wanted: Mapping[str, torch.Tensor],
        first_conv: Collection[str],
) -> None:
    """Turn first convolutions for colour images into those for the model's number of channels, as timm does."""
    for name in first_conv:
        if name in state and name in wanted and state[name].ndim == wanted[name].ndim == 4:
            in_file, in_model = state[name].shape[1], wanted[name].shape[1]
            if in_file != in_model and in_file % 3 == 0:  # a multiple where the stem folds pixels into channels
                state[name] = adapt_input_conv(3 * in_model // in_file, state[name])


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
    (`teacher`, `module.backbone.`), torchvision, VISSL, lightly's numbered layers, and any other prefix before the
    backbone's own names; also the wrappers of DDP and torch.compile. Weights for colour images become those for other
    channels as in timm. Classifiers and projectors are left out; what else does not fit is refused.

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
    own, best, words = model.state_dict(), -1, ''
    for names, ignored, first_conv in _namings(model):
        prefix = _find_prefix(tensors, names, teacher)
        state = {k[len(prefix):].replace('_orig_mod.', ''): v for k, v in tensors.items() if k.startswith(prefix)}
        wanted = {name: own[of_model] for name, of_model in names.items()}
        _adapt_channels(state, wanted, first_conv)
        heads = tuple(f'{name}.' for name in (*_HEADS, *_as_tuple(model.pretrained_cfg.get('classifier')), *ignored))
        kept, misfit = _select(state, wanted, heads)
        if misfit and convert is not None:
            with contextlib.suppress(Exception):  # the conversion is for other files than this one
                converted, still = _select(convert(dict(state), network), wanted, heads)
                kept, misfit = (kept, misfit) if still else (converted, '')
        if not misfit:
            if teacher and not (entry.startswith(('task_state', *_TEACHER_CONTAINERS)) or _is_averaged(prefix)):
                raise InputError(f'{at_fault}: holds no teacher')
            where = '.'.join(filter(None, (entry, prefix.rstrip('.'))))
            return {names[name]: value for name, value in kept.items()}, where
        found = sum(name in state for name in names)
        if found > best:  # the naming that the file most likely follows
            best, words = found, misfit
    raise InputError(f"{at_fault}: does not fit {model.pretrained_cfg['architecture']}: {words}")

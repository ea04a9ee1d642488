"""What linear evaluation and fine-tuning share: the timm classifier, its accuracy, the checkpoint of a run."""
import copy
import logging
import os
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import accuracy
from torch.utils.data import Dataset, Subset

from timm_cgh.data import class_numbers
from timm_cgh.errors import InputError
from timm_cgh.files import atomic_write
from timm_cgh.hub import export_backbone

from .features import eval_crop_pct

__all__ = ['as_classifier', 'class_names', 'export_classifier', 'find_state', 'save_state', 'top_accuracy']

_logger = logging.getLogger('eval')


def as_classifier(
        backbone: nn.Module,
        weight: torch.Tensor,
        bias: torch.Tensor,
        data_config: Mapping[str, Any],
) -> nn.Module:
    """Copy of a backbone, on the CPU, with timm's own classifier layer holding a linear head.

    Args:
        backbone: plain timm model with `num_classes=0`
        weight, bias: (N, D), (N,)
        data_config: `input_size` for the trial image

    Returns:
        the timm model with `num_classes=N`, in eval mode

    Raises:
        ValueError: the architecture's classifier is more than a linear layer on the pooled feature
    """
    weight, bias = weight.detach().cpu(), bias.detach().cpu()
    backbone = copy.deepcopy(backbone).cpu().eval()
    backbone.to(memory_format=torch.contiguous_format)
    model = copy.deepcopy(backbone)
    model.reset_classifier(len(bias))
    layers = model.get_classifier()
    for layer in layers if isinstance(layers, (tuple, list, nn.ModuleList)) else [layers]:  # DeiT has two, averaged
        linear = next((m for m in layer.modules() if isinstance(m, (nn.Linear, nn.Conv2d))), None)
        if linear is None or linear.weight.numel() != weight.numel() or linear.bias is None:
            raise ValueError(f'{type(model).__name__} has no place for a linear classifier')
        with torch.no_grad():
            linear.weight.copy_(weight.view_as(linear.weight))
            linear.bias.copy_(bias)
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        image = torch.randn(2, *data_config['input_size'])
        wanted = F.linear(backbone(image).float(), weight, bias)
        if not torch.allclose(model(image).float(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item() + 1e-6):
            raise ValueError(
                f'the classifier of {type(model).__name__} is more than a linear layer on the pooled feature')
    return model


def export_classifier(
        model: nn.Module,
        folder: str,
        data_config: Mapping[str, Any],
        tag: str,
        names: Optional[List[str]] = None,
) -> None:
    """Write a classifier in timm's hub format and say how it is loaded.

    Args:
        model: timm model with `num_classes=N`
        folder: see `timm_cgh.hub.export_backbone`
        data_config: `input_size`, `mean`, `std`, `interpolation` that it was judged with
        tag: pretrained tag
        names: of the classes, in the order of their labels
    """
    export_backbone(
        model,
        folder,
        **{k: data_config[k] for k in ('input_size', 'mean', 'std', 'interpolation')},
        crop_pct=eval_crop_pct(min(data_config['input_size'][1:])),
        tag=tag,
        extra=dict(label_names=names) if names else None,
    )
    _logger.info(f"Load the classifier: timm.create_model('local-dir:{folder}', pretrained=True)")


def top_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> Tuple[float, float]:
    """Top-1 and top-5 in percent of (N, C) logits; of fewer than five classes all count."""
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    return top1.item(), top5.item()


def class_names(dataset: Dataset, num_classes: int) -> Optional[List[str]]:
    """Names of the classes in the order of their labels, where the data set knows them all."""
    numbers = class_numbers(dataset)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = sorted(numbers, key=numbers.get) or getattr(getattr(dataset, 'reader', dataset), 'classes', None)
    return [str(name) for name in names] if names and len(names) == num_classes else None


def save_state(path: str, settings: Mapping[str, Any], **state: Any) -> None:
    """Write a checkpoint whole: the settings that it holds for, and the state."""
    with atomic_write(path, 'wb') as file:
        torch.save({'settings': dict(settings), **state}, file)


def find_state(
        output: Optional[str],
        resume: Optional[str],
        settings: Mapping[str, Any],
        name: str = 'last.pth.tar',
) -> Optional[Dict[str, Any]]:
    """The checkpoint to go on from, if any.

    Args:
        output: folder of the run
        resume: `auto` (the one in the folder, where there is one), a file, or None
        settings: what the run must have in common with the checkpoint
        name: of the checkpoint in the folder

    Raises:
        InputError: the folder holds a run that is not resumed, or the file is not a checkpoint of such a run
    """
    last = os.path.join(output, name) if output else None
    if resume is None:
        if last and os.path.exists(last):
            raise InputError(f'--output {output}: holds a run; --resume auto continues it, or take another folder')
        return None
    if resume == 'auto':
        if not last:
            raise InputError('--resume auto: say which run with --output DIR')
        if not os.path.exists(last):
            return None
        resume = last
    if not os.path.isfile(resume):
        raise InputError(f'--resume {resume}: no such file')
    try:
        state = torch.load(resume, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a broken or foreign file may make the reader raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'--resume {resume}: not a readable checkpoint ({reason[:200]})') from error
    if not isinstance(state, dict) or not isinstance(state.get('settings'), dict):
        raise InputError(f'--resume {resume}: not a checkpoint of such a run')
    for key, value in settings.items():
        if state['settings'].get(key) != value:
            raise InputError(f"--resume {resume}: was made with another {key.replace('_', ' ')}")
    _logger.info(f"Resumed {resume} at epoch {state['epoch']}")
    return state

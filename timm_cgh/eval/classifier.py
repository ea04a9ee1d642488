"""A backbone with a linear classifier as one timm model."""
import copy
from typing import Any, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_cgh.models.export import export_backbone

from .loader import eval_crop_pct

__all__ = ['as_classifier', 'classifier_layers', 'export_classifier', 'top_accuracy']


def classifier_layers(model: nn.Module) -> List[nn.Module]:
    """Classifier layers of a timm model; distilled ones have two, whose outputs are averaged."""
    layers = model.get_classifier()
    return list(layers) if isinstance(layers, (tuple, list, nn.ModuleList)) else [layers]


@torch.no_grad()
def as_classifier(
        backbone: nn.Module, weight: torch.Tensor, bias: torch.Tensor, data_config: Mapping[str, Any]) -> nn.Module:
    """Copy of a backbone as a timm model with `num_classes=N`, in eval mode on the CPU.

    Args:
        backbone: plain timm model with `num_classes=0`
        weight, bias: of the classifier, (N, D), (N,)
        data_config: its `input_size` is that of the image that the copy is checked with

    Raises:
        ValueError: the architecture's classifier is more than a linear layer on the pooled feature
    """
    weight, bias = weight.cpu(), bias.cpu()
    model = copy.deepcopy(backbone).cpu().eval().to(memory_format=torch.contiguous_format)
    image = torch.randn(2, *data_config['input_size'], generator=torch.Generator().manual_seed(0))
    features = model(image).float()
    model.reset_classifier(len(bias))
    for layer in classifier_layers(model):
        linear = next((m for m in layer.modules() if isinstance(m, (nn.Linear, nn.Conv2d))), None)
        if linear is None or linear.weight.numel() != weight.numel() or linear.bias is None:
            raise ValueError(f'{type(model).__name__} has no place for a linear classifier')
        linear.weight.copy_(weight.view_as(linear.weight))
        linear.bias.copy_(bias)
    model.eval()
    expected = F.linear(features, weight, bias)
    tolerance = 1e-3 * expected.abs().max().item() + 1e-6
    if not torch.allclose(model(image).float(), expected, rtol=1e-3, atol=tolerance):
        raise ValueError(f'the classifier of {type(model).__name__} is more than a linear layer on the pooled feature')
    return model


def export_classifier(
        model: nn.Module,
        folder: str,
        data_config: Mapping[str, Any],
        tag: str,
        names: Optional[List[str]] = None,
) -> None:
    """Write a timm model with a classifier in timm's hub format.

    Args:
        folder, tag: see `timm_cgh.models.export.export_backbone`
        data_config: `input_size`, `mean`, `std`, `interpolation` that it was evaluated with
        names: of the classes, in the order of their labels
    """
    crop_pct = eval_crop_pct(min(data_config['input_size'][1:]))
    export_backbone(model, folder, **data_config, crop_pct=crop_pct, tag=tag, label_names=names)


def top_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> Tuple[float, float]:
    """Top-1 and top-5 in percent of (N, C) logits, (N,) labels; with fewer than five classes, top-5 counts all."""
    correct = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (N, 5)
    return 100 * correct[:, 0].double().mean().item(), 100 * correct.any(dim=1).double().mean().item()

"""Create a training task from names and numbers."""
from typing import Any, Callable, Optional, Sequence, Union

import torch
import torch.nn as nn

from timm_cgh.loss import CrossContextLoss, InfoNCELoss
from timm_cgh.models.encoder import ContextEncoder

from .cgh import CGHTask

__all__ = ['BASELINES', 'create_task']

BASELINES = ('simclr', 'byol', 'simsiam', 'swav', 'nnclr', 'dino')  # in `timm_cgh.task.baselines`, an optional extra


def create_task(
        backbone: Union[str, nn.Module] = 'resnet50',
        context: str = 'cross',
        method: str = 'cgh',
        bank_size: int = 131072,
        momentum: float = 0.999,
        contrast_warmup: int = 0,
        shuffle_bn: bool = False,
        bn_splits: int = 1,
        bank_labels: bool = False,
        out_indices: Optional[Sequence[int]] = None,
        hidden_dim: int = 4096,
        embed_dim: int = 512,
        predictor: bool = False,
        hyper_norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        temp_student: float = 0.1,
        temp_teacher: float = 0.04,
        temp_hyper: float = 0.08,
        temp_hyper_teacher: Optional[float] = None,
        relation_weight: Optional[float] = None,
        contrast_temp: float = 0.2,
        device: Optional[torch.device] = None,
        **backbone_kwargs: Any,
) -> CGHTask:
    """Create a `CGHTask` from a backbone's name (or module); the hypercolumn is built where the context needs it.

    Options are those of `ContextEncoder`, `CrossContextLoss` and `CGHTask`; `backbone_kwargs` go to timm.
    With the method `moco` the loss is `InfoNCELoss` (MoCo-v2), which uses `contrast_temp` alone. `contrast_warmup` is
    in optimiser updates: cross-context training needs it (five epochs in the authors' code, the default of `train.py`).

    Raises:
        ValueError: another method; and see those three
    """
    if method not in ('cgh', 'moco'):
        raise ValueError(f'method must be cgh or moco, got {method!r}')
    loss = InfoNCELoss(contrast_temp) if method == 'moco' else CrossContextLoss(
        context=context,
        temp_student=temp_student,
        temp_teacher=temp_teacher,
        temp_hyper=temp_hyper,
        temp_hyper_teacher=temp_hyper_teacher,
        relation_weight=relation_weight,
        contrast_temp=contrast_temp,
    )
    student = ContextEncoder(
        backbone,
        out_indices=out_indices,
        hidden_dim=hidden_dim,
        embed_dim=embed_dim,
        predictor=predictor,
        hyper_norm_layer=hyper_norm_layer,
        hypercolumn=loss.uses_hypercolumn,
        **backbone_kwargs,
    )
    return CGHTask(
        student,
        loss,
        bank_size=bank_size,
        momentum=momentum,
        contrast_warmup=contrast_warmup,
        shuffle_bn=shuffle_bn,
        bn_splits=bn_splits,
        bank_labels=bank_labels,
        device=device,
    )

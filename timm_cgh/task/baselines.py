"""Other self-supervised methods as baselines: heads and losses of the `lightly` library in our training loop.

Backbone, views, optimiser, schedule, teacher momentum and head widths are the same for all. Each of these methods sees
two contrastive views of an image and backpropagates through both, CGH through one. Needs `timm-cgh[baselines]`:
importing this module without the library raises ImportError.
"""
import copy
from functools import partial
from typing import Any, Dict, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from lightly import loss as losses
from lightly.models.modules import NNMemoryBankModule, heads

from timm_cgh.distributed import is_distributed

from .baseline_task import BaselineEncoder, BaselineTask, Outputs

__all__ = ['create_baseline_task']


class _Options(NamedTuple):
    """See `create_baseline_task`."""
    hidden_dim: int
    embed_dim: int
    bank_size: int
    prototypes: int
    temperature: Optional[float]


def _symmetric_distance(outputs: Outputs, targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Negative cosine similarity of each view's prediction and the other view's target (BYOL, SimSiam)."""
    distance = losses.NegativeCosineSimilarity()
    (_, first), (_, second) = outputs
    return 0.5 * (distance(first, targets[1].detach()) + distance(second, targets[0].detach()))


def _simclr(backbone: nn.Module, options: _Options) -> Dict[str, Any]:
    contrast = losses.NTXentLoss(options.temperature or 0.5, gather_distributed=is_distributed())
    projector = heads.SimCLRProjectionHead(backbone.head_hidden_size, options.hidden_dim, options.embed_dim)
    return dict(
        student=BaselineEncoder(backbone, projector),
        criterion=lambda outputs, _: contrast(outputs[0][0], outputs[1][0]),
    )


def _byol(backbone: nn.Module, options: _Options) -> Dict[str, Any]:
    hidden, width = options.hidden_dim, options.embed_dim
    student = BaselineEncoder(backbone, heads.BYOLProjectionHead(backbone.head_hidden_size, hidden, width))
    teacher = copy.deepcopy(student)
    student.predictor = heads.BYOLPredictionHead(width, hidden, width)
    return dict(student=student, teacher=teacher, criterion=_symmetric_distance)


def _simsiam(backbone: nn.Module, options: _Options) -> Dict[str, Any]:
    hidden = options.hidden_dim  # the projection is as wide, and the predictor narrows to a quarter
    projector = heads.SimSiamProjectionHead(backbone.head_hidden_size, hidden, hidden)
    return dict(
        student=BaselineEncoder(backbone, projector, heads.SimSiamPredictionHead(hidden, hidden // 4, hidden)),
        criterion=lambda outputs, _: _symmetric_distance(outputs, [projection for projection, _ in outputs]),
    )


class _UnitRows(nn.Module):

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1)


def _swav(backbone: nn.Module, options: _Options) -> Dict[str, Any]:
    swapped = losses.SwaVLoss(options.temperature or 0.1, sinkhorn_gather_distributed=is_distributed())
    projector = heads.SwaVProjectionHead(backbone.head_hidden_size, options.hidden_dim, options.embed_dim)
    prototypes = heads.SwaVPrototypes(options.embed_dim, options.prototypes)
    for layer in prototypes.heads:
        layer.bias = None  # cosine similarities, as in the paper
    student = BaselineEncoder(backbone, nn.Sequential(projector, _UnitRows()), prototypes)
    student.register_forward_pre_hook(lambda *_: prototypes.normalize())  # once a step: both views use them
    return dict(
        student=student,
        criterion=lambda outputs, _: swapped([scores for _, scores in outputs], []).squeeze(),
    )


def _nnclr(backbone: nn.Module, options: _Options) -> Dict[str, Any]:
    hidden, width = options.hidden_dim, options.embed_dim
    contrast = losses.NTXentLoss(options.temperature or 0.1, gather_distributed=is_distributed())
    neighbour = NNMemoryBankModule(size=(options.bank_size, width))
    neighbour.gather_distributed = is_distributed()

    def criterion(outputs: Outputs, _: Any) -> torch.Tensor:
        (first, first_prediction), (second, second_prediction) = outputs
        near_first, near_second = neighbour(first.detach(), update=False), neighbour(second.detach(), update=True)
        return 0.5 * (contrast(near_first, second_prediction) + contrast(near_second, first_prediction))

    projector = heads.NNCLRProjectionHead(backbone.head_hidden_size, hidden, width)
    student = BaselineEncoder(backbone, projector, heads.NNCLRPredictionHead(width, hidden, width))
    return dict(student=student, criterion=criterion, state=[neighbour])


def _dino(backbone: nn.Module, options: _Options) -> Dict[str, Any]:
    centred = losses.DINOLoss(options.prototypes)
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())  # not with a ViT
    projector = partial(
        heads.DINOProjectionHead, backbone.head_hidden_size, options.hidden_dim, options.embed_dim, options.prototypes,
        batch_norm)
    student = BaselineEncoder(backbone, projector())
    teacher = BaselineEncoder(copy.deepcopy(backbone), projector())  # torch cannot copy a weight norm
    teacher.load_state_dict(student.state_dict())
    return dict(
        student=student,
        teacher=teacher,
        criterion=lambda outputs, targets: centred(targets, [projection for projection, _ in outputs]),
        state=[centred],
    )


_METHODS = dict(simclr=_simclr, byol=_byol, simsiam=_simsiam, swav=_swav, nnclr=_nnclr, dino=_dino)


def create_baseline_task(
        method: str,
        backbone: nn.Module,
        hidden_dim: int = 2048,
        embed_dim: int = 256,
        bank_size: int = 65536,
        momentum: float = 0.996,
        prototypes: Optional[int] = None,
        temperature: Optional[float] = None,
        device: Optional[torch.device] = None,
) -> BaselineTask:
    """SimCLR, BYOL, SimSiam, SwAV, NNCLR or DINO (two full-size views) around a timm backbone.

    Parts of the papers' recipes that are left out: SimSiam's constant learning rate of the predictor, SwAV's queue and
    initially frozen prototypes, DINO's initially frozen last layer.

    Args:
        method: `simclr`, `byol`, `simsiam`, `swav`, `nnclr` or `dino`
        backbone: plain timm model (`num_classes=0`)
        hidden_dim, embed_dim: widths of the heads; SimSiam's projection is as wide as its hidden layer
        bank_size: NNCLR's support set
        momentum: of the teacher of BYOL and DINO, constant (their papers raise it to 1 during training)
        prototypes: SwAV's (default an eighth of the bank, at most 3000), or the width of DINO's output (default half of
            the bank, at most 65536)
        temperature: of SimCLR (default 0.5), NNCLR (0.1) and SwAV (0.1); DINO's are 0.1 and 0.04
        device: see `timm.task.TrainingTask`

    Raises:
        ValueError: no such method
    """
    if method not in _METHODS:
        raise ValueError(f'method must be one of {", ".join(_METHODS)}, got {method!r}')
    if prototypes is None:
        prototypes = min(65536, bank_size // 2) if method == 'dino' else min(3000, max(2, bank_size // 8))
    options = _Options(hidden_dim, embed_dim, bank_size, prototypes, temperature)
    return BaselineTask(**_METHODS[method](backbone, options), momentum=momentum, device=device)

"""The objective of MoCo-v2."""
from typing import Dict

import torch
import torch.nn as nn

from timm_cgh.layers import MemoryBank
from timm_cgh.models.encoder import Contexts

from .relation import info_nce

__all__ = ['InfoNCELoss']


class InfoNCELoss(nn.Module):
    """InfoNCE on the global context alone (MoCo-v2), with the bank of the teacher's embeddings as negatives.

    Args:
        contrast_temp: temperature

    Raises:
        ValueError: a temperature that is not positive
    """

    context = 'global'
    uses_hypercolumn = False

    def __init__(self, contrast_temp: float = 0.2):
        super().__init__()
        if not contrast_temp > 0:
            raise ValueError(f'contrast_temp must be positive, got {contrast_temp}')
        self.contrast_temp = contrast_temp

    def forward(
            self,
            student: Contexts,
            teacher: Contexts,
            banks: Dict[str, MemoryBank],
            progress: float = 1.0,
    ) -> Dict[str, torch.Tensor]:
        """`loss`, nats, of two contrastive views; see `CrossContextLoss.forward`. No warm-up: `progress` is ignored."""
        return {'loss': info_nce(
            student.global_embed, teacher.global_embed, banks['global'].embeddings, self.contrast_temp)}

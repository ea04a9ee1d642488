"""The relation loss and a lower bound of its cost."""
import argparse
from functools import partial
from typing import Callable, Dict, Tuple

import torch
import torch.nn.functional as F

from timm_cgh.layers import MemoryBank
from timm_cgh.loss import CrossContextLoss
from timm_cgh.models import Contexts

__all__ = ['relation_loss']


def _loss(embeddings: torch.Tensor, teacher: Contexts, banks: Dict[str, MemoryBank]) -> None:
    """Both terms of Eq. 6 with their gradients."""
    student = Contexts(*(embeddings.clone().requires_grad_() for _ in range(2)))
    CrossContextLoss()(student, teacher, banks)['loss'].backward()


def _products(embeddings: torch.Tensor, banks: Dict[str, MemoryBank], logits: torch.Tensor) -> None:
    """The six matrix products that the loss needs, by tiles of the size of `logits`, which is overwritten."""
    rows, columns = logits.shape
    for bank in banks.values():
        for part in embeddings.split(rows):
            gradient = torch.zeros_like(part)
            for tile in bank.embeddings.split(columns):
                out = logits[:len(part), :len(tile)]
                torch.mm(part, tile.T, out=out)
                torch.mm(part, tile.T, out=out)
                gradient.addmm_(out, tile)


def _unit_rows(rows: int, dim: int, device: torch.device) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, device=device), dim=1)


def relation_loss(args: argparse.Namespace, bank_size: int, batch_size: int) -> Tuple[Callable, Callable]:
    """Calls that compute the loss of Eq. 6 with its gradients, and the matrix products it needs."""
    device, dim = torch.device(args.device), args.embed_dim
    banks = {name: MemoryBank(bank_size, dim).to(device) for name in ('global', 'hyper')}
    teacher = Contexts(*(_unit_rows(batch_size, dim, device) for _ in range(2)))
    embeddings = _unit_rows(batch_size, dim, device)
    # on a CPU by tiles whose result stays in the cache
    rows, columns = (min(batch_size, 256), min(bank_size, 2048)) if device.type == 'cpu' else (batch_size, bank_size)
    logits = torch.zeros(rows, columns, device=device)
    return partial(_loss, embeddings, teacher, banks), partial(_products, embeddings, banks, logits)

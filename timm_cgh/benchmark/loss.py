"""The relation loss and what it cannot do without."""
import argparse
from typing import Callable, Tuple

import torch
import torch.nn.functional as F

from timm_cgh.layers import MemoryBank
from timm_cgh.loss import Contexts, CrossContextLoss

__all__ = ['relation_loss']


def relation_loss(args: argparse.Namespace, bank_size: int, batch_size: int) -> Tuple[Callable, Callable]:
    """The two terms of Eq. 6 with their gradients, and the six matrix products that they must make."""
    device = torch.device(args.device)

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, args.embed_dim, device=device), dim=1)

    banks = {name: MemoryBank(bank_size, args.embed_dim).to(device) for name in ('global', 'hyper')}
    teacher, embeddings, criterion = Contexts(unit(batch_size), unit(batch_size)), unit(batch_size), CrossContextLoss()
    # on a CPU in parts whose result stays in the cache
    rows, tile = (min(batch_size, 256), 2048) if device.type == 'cpu' else (batch_size, bank_size)
    logits = torch.zeros(rows, min(tile, bank_size), device=device)

    def loss():
        student = Contexts(*(embeddings.clone().requires_grad_() for _ in range(2)))
        criterion(student, teacher, banks)['loss'].backward()

    def products():
        for bank in banks.values():
            for part in embeddings.split(rows):
                gradient = torch.zeros_like(part)
                for some in bank.embeddings.split(tile):
                    out = logits[:len(part), :len(some)]
                    torch.mm(part, some.T, out=out)
                    torch.mm(part, some.T, out=out)
                    gradient.addmm_(out, some)

    return loss, products

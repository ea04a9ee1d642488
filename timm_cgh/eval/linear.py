"""Linear classification of frozen features (evaluation protocol of Sec. 4.2)."""
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_cgh.distributed import Process

from .classifier import top_accuracy
from .crops import BlockSampler

__all__ = ['FeatureLoader', 'HeadResult', 'LinearHeads', 'best_head', 'evaluate_heads', 'head_losses']


class LinearHeads(nn.Module):
    """One linear classifier per learning rate on the same features, computed as one matrix product.

    The heads are independent: each learns what it would alone at its rate. All start equal: weights with standard
    deviation 0.01, biases 0 (the authors' code).

    Args:
        in_features: width D of the features
        num_classes: N
        lrs: learning rates, one head each
        seed: of the initial weights
    """

    def __init__(self, in_features: int, num_classes: int, lrs: Sequence[float], seed: int = 42):
        super().__init__()
        start = torch.empty(num_classes, in_features).normal_(
            std=0.01, generator=torch.Generator().manual_seed(hash((seed, 7))))
        self.lrs = list(lrs)
        self.num_classes = num_classes
        self.weights = nn.ParameterList(nn.Parameter(start.clone()) for _ in self.lrs)  # (N, D) each
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_classes)) for _ in self.lrs)

    def param_groups(self) -> List[Dict[str, Any]]:
        """Parameter groups for an optimiser: each head with its own learning rate."""
        return [dict(params=[w, b], lr=lr) for w, b, lr in zip(self.weights, self.biases, self.lrs)]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, heads, N) logits."""
        logits = F.linear(features, torch.cat(list(self.weights)), torch.cat(list(self.biases)))
        return logits.view(len(features), len(self.lrs), self.num_classes)


def head_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, heads, N) logits, (B,) labels -> (heads,) cross-entropies, summed over the batch."""
    heads = logits.shape[1]
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(heads), reduction='none')
    return each.view(-1, heads).sum(dim=0)


class FeatureLoader:
    """Batches of features that were extracted once, in the order in which `CropLoader` gives the images.

    Args:
        features, labels: (M, D), (M,)
        process: this process; its device, if a GPU, keeps all features that fit into half of its free memory
        batch_size: per process
        seed: of the order
    """

    def __init__(
            self, features: torch.Tensor, labels: torch.Tensor, process: Process = Process(), *, batch_size: int,
            seed: int = 42):
        self.device = process.device
        if self.device.type == 'cuda' and features.nbytes < torch.cuda.mem_get_info(self.device)[0] / 2:
            features, labels = features.to(self.device), labels.to(self.device)
        self.features, self.labels = features, labels
        self.sampler = BlockSampler(len(features), batch_size, seed, process.rank, process.world_size)

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, epoch: int) -> Iterator[Tuple[torch.Tensor, torch.Tensor, int]]:
        """Batches of an epoch: (B, D) features, (B,) labels, number of images in the batch over all processes."""
        self.sampler.set_epoch(epoch)
        for batch, index in enumerate(self.sampler.blocks()):
            index = index.to(self.features.device)
            features, labels = self.features[index], self.labels[index]
            yield features.to(self.device), labels.to(self.device), self.sampler.block_size(batch)


class HeadResult(NamedTuple):
    """Top-1 and top-5 of a head in percent, and its predictions (M,) on the CPU; 0 and -1 where it has diverged."""
    lr: float
    top1: float
    top5: float
    predictions: torch.Tensor

    @property
    def diverged(self) -> bool:
        return bool((self.predictions < 0).all())


@torch.no_grad()
def evaluate_heads(
        heads: LinearHeads, features: torch.Tensor, labels: torch.Tensor, chunk: int = 8192) -> List[HeadResult]:
    """Accuracy of every head on (M, D) features with (M,) labels on the CPU, `chunk` images at a time."""
    results = []
    for lr, weight, bias in zip(heads.lrs, heads.weights, heads.biases):
        if weight.isfinite().all() and bias.isfinite().all():
            logits = torch.cat([F.linear(part.to(weight.device), weight, bias).cpu() for part in features.split(chunk)])
            results.append(HeadResult(lr, *top_accuracy(logits, labels), logits.argmax(dim=1)))
        else:
            results.append(HeadResult(lr, 0.0, 0.0, torch.full_like(labels, -1)))
    return results


def best_head(results: Sequence[HeadResult]) -> int:
    """Index of the most accurate head; of equals the one with the smallest learning rate."""
    return max(range(len(results)), key=lambda i: (results[i].top1, -results[i].lr))

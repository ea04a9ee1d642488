"""Linear classification of frozen features (evaluation protocol of Sec. 4.2)."""
from typing import Any, Dict, Iterator, List, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from .classifier import top_accuracy
from .crops import BlockSampler

__all__ = ['FeatureLoader', 'LinearHeads', 'best_head', 'evaluate_heads', 'losses_of']


class LinearHeads(nn.Module):
    """One linear classifier per learning rate on the same features, computed as one matrix product.

    The heads know nothing of each other: each learns what it would alone at its rate. All start equal: weights
    N(0, 0.01), biases 0 (the authors' code).

    Args:
        in_features: width D of the features
        num_classes: N
        lrs: learning rates, one head each
        seed: of the start
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
        """For an optimiser: each head at its own rate."""
        return [dict(params=[w, b], lr=lr) for w, b, lr in zip(self.weights, self.biases, self.lrs)]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, heads, N) logits."""
        logits = F.linear(features, torch.cat(list(self.weights)), torch.cat(list(self.biases)))
        return logits.view(len(features), len(self.lrs), self.num_classes)


def losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, heads, N) logits, (B,) labels -> (heads,) cross-entropy, summed over the batch."""
    heads = logits.shape[1]
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(heads), reduction='none')
    return each.view(-1, heads).sum(dim=0)


class FeatureLoader:
    """Features that were taken once, in the order that the augmented images would come in.

    Args:
        features, labels: (M, D), (M,)
        batch_size: per process
        device: where batches are wanted; where they fit into half of its free memory, all features are kept there
        seed, rank, world_size: see `BlockSampler`
    """

    def __init__(
            self,
            features: torch.Tensor,
            labels: torch.Tensor,
            batch_size: int,
            device: Union[str, torch.device] = 'cpu',
            seed: int = 42,
            rank: int = 0,
            world_size: int = 1,
    ):
        self.device = torch.device(device)
        if self.device.type == 'cuda' and features.nbytes < torch.cuda.mem_get_info(self.device)[0] / 2:
            features, labels = features.to(self.device), labels.to(self.device)
        self.features, self.labels = features, labels
        self.sampler = BlockSampler(len(features), batch_size, seed, rank, world_size)

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, epoch: int) -> Iterator[Tuple[torch.Tensor, torch.Tensor, int]]:
        """Batches of an epoch: (B, D) features, (B,) labels, images of the batch over all processes."""
        self.sampler.set_epoch(epoch)
        for batch, index in enumerate(self.sampler.blocks()):
            index = index.to(self.features.device)
            features, labels = self.features[index], self.labels[index]
            yield features.to(self.device), labels.to(self.device), self.sampler.block_size(batch)


@torch.no_grad()
def evaluate_heads(
        heads: LinearHeads,
        features: torch.Tensor,
        labels: torch.Tensor,
        chunk: int = 8192,
) -> List[Dict[str, Any]]:
    """Accuracy of every head.

    Args:
        heads: on the device where the work is to be done
        features, labels: (M, D), (M,)
        chunk: images at a time

    Returns:
        per head `lr`, `top1` and `top5` in percent, `predictions` (M,) on the CPU; of a head that has diverged, 0
    """
    results = []
    device = heads.weights[0].device
    for lr, weight, bias in zip(heads.lrs, heads.weights, heads.biases):
        if not (weight.isfinite().all() and bias.isfinite().all()):
            results.append(dict(lr=lr, top1=0.0, top5=0.0, predictions=torch.full_like(labels.cpu(), -1)))
            continue
        right1 = right5 = 0.0
        predictions = []
        for part, truth in zip(features.split(chunk), labels.split(chunk)):
            logits = F.linear(part.to(device), weight, bias)
            top1, top5 = top_accuracy(logits, truth.to(device))
            right1, right5 = right1 + round(top1 * len(part) / 100), right5 + round(top5 * len(part) / 100)
            predictions.append(logits.argmax(dim=1).cpu())
        scale = 100 / len(labels)
        results.append(
            dict(lr=lr, top1=right1 * scale, top5=right5 * scale, predictions=torch.cat(predictions)))
    return results


def best_head(results: Sequence[Dict[str, Any]]) -> int:
    """Place of the most accurate head; of equals the one with the smallest rate."""
    return max(range(len(results)), key=lambda i: (results[i]['top1'], -results[i]['lr']))

"""Nearest neighbours, near-duplicates and outliers among embeddings, without labels."""
from typing import List, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from timm_cgh.errors import InputError

__all__ = ['Neighbours', 'cluster_pairs', 'find_neighbours']

_MAX_PAIRS = 10_000_000


class Neighbours(NamedTuple):
    """indices: (N, k) of the nearest other images, nearest first; cosines: (N, k); pairs: (P, 2) indices i < j of
    images at least as similar as a threshold; pair_cosines: (P,), descending; distances: (N,) mean Euclidean distance
    to the k nearest by that distance, large for outliers (Ramaswamy et al., "Efficient Algorithms for Mining Outliers
    from Large Data Sets", SIGMOD 2000; they take the k-th).

    Outliers are not found by cosine: features behind a ReLU are positive and lie in a narrow cone, and an image that no
    filter knows differs from the others in the length of its features rather than in their direction.
    """
    indices: torch.Tensor
    cosines: torch.Tensor
    pairs: torch.Tensor
    pair_cosines: torch.Tensor
    distances: torch.Tensor


@torch.no_grad()
def find_neighbours(features: torch.Tensor, k: int = 10, threshold: float = 0.95, chunk: int = 512) -> Neighbours:
    """Exact search by cosine, and by distance for outliers, in blocks of `chunk` rows: memory grows with N, not N^2.

    Args:
        features: (N, D), N > 1, not normalised; the search runs on their device
        k: nearest images, at most N - 1
        threshold: cosine of near-duplicates
        chunk: rows at a time

    Raises:
        InputError: features that are not finite, or so low a threshold that the pairs do not fit into memory
    """
    if not features.isfinite().all():
        raise InputError('model: its features are not finite, the network has diverged')
    unit, norms = F.normalize(features.float(), dim=1), features.float().norm(dim=1)
    k = min(k, len(unit) - 1)
    indices, cosines, pairs, pair_cosines, distances, count = [], [], [], [], [], 0
    for start in range(0, len(unit), chunk):
        similarity = unit[start:start + chunk] @ unit.T  # (chunk, D) @ (D, N) -> (chunk, N)
        rows = torch.arange(len(similarity), device=unit.device)
        own = norms[start:start + chunk, None]
        squared = (own - norms) ** 2 + 2 * own * norms * (1 - similarity).clamp_(min=0)
        squared[rows, start + rows] = torch.inf  # an image is not its own neighbour
        distances.append(squared.topk(k, dim=1, largest=False).values.sqrt().mean(dim=1).cpu())
        similarity[rows, start + rows] = -2
        top = similarity.topk(k, dim=1)
        indices.append(top.indices.cpu())
        cosines.append(top.values.cpu())
        found = (similarity >= threshold).nonzero()
        found = found[found[:, 0] + start < found[:, 1]]
        pair_cosines.append(similarity[found[:, 0], found[:, 1]].cpu())
        found[:, 0] += start
        pairs.append(found.cpu())
        count += len(found)
        if count > _MAX_PAIRS:
            raise InputError(f'threshold={threshold:g}: more than {_MAX_PAIRS} pairs of images are as similar')
    order = torch.cat(pair_cosines).argsort(descending=True, stable=True)
    return Neighbours(
        torch.cat(indices), torch.cat(cosines), torch.cat(pairs)[order], torch.cat(pair_cosines)[order],
        torch.cat(distances))


def cluster_pairs(pairs: torch.Tensor, count: int) -> List[List[int]]:
    """Clusters of images that pairs connect, largest first: lists of ascending indices.

    Args:
        pairs: (P, 2) indices
        count: of all images
    """
    first, second = pairs.numpy().T
    labels = np.arange(count)  # of each image the smallest index that it is known to be connected with
    while (labels[first] != labels[second]).any():
        smaller = np.minimum(labels[first], labels[second])
        np.minimum.at(labels, labels[first], smaller)
        np.minimum.at(labels, labels[second], smaller)
        while (labels != labels[labels]).any():
            labels = labels[labels]
    paired = np.unique(pairs.numpy())
    order = paired[np.argsort(labels[paired], kind='stable')]
    clusters = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []
    return sorted((cluster.tolist() for cluster in clusters), key=len, reverse=True)

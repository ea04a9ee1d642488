"""Nearest neighbours, near-duplicates and outliers among embeddings, without labels."""
from typing import List, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from timm_cgh.errors import InputError

__all__ = ['Neighbours', 'cluster_pairs', 'find_neighbours', 'mahalanobis_distances']

_MAX_PAIRS = 10_000_000


class Neighbours(NamedTuple):
    """indices: (N, k) of the nearest other images, nearest first; cosines: (N, k); pairs: (P, 2) indices i < j of
    images at least as similar as a threshold; pair_cosines: (P,), descending.
    """
    indices: torch.Tensor
    cosines: torch.Tensor
    pairs: torch.Tensor
    pair_cosines: torch.Tensor


def _check_finite(features: torch.Tensor) -> None:
    if not features.isfinite().all():
        raise ValueError('its features are not finite, the network has diverged')


@torch.no_grad()
def find_neighbours(features: torch.Tensor, k: int = 10, threshold: float = 0.95, chunk: int = 512) -> Neighbours:
    """Exact search by cosine, in blocks of `chunk` rows: memory grows with N, not N^2.

    Args:
        features: (N, D), N > 1; the search runs on their device
        k: nearest images, at most N - 1
        threshold: cosine of near-duplicates
        chunk: rows at a time

    Raises:
        InputError: so low a threshold that the pairs do not fit into memory
        ValueError: features that are not finite
    """
    _check_finite(features)
    unit = F.normalize(features.float(), dim=1)
    k = min(k, len(unit) - 1)
    indices, cosines, pairs, pair_cosines, count = [], [], [], [], 0
    for start in range(0, len(unit), chunk):
        similarity = unit[start:start + chunk] @ unit.T  # (chunk, D) @ (D, N) -> (chunk, N)
        rows = torch.arange(len(similarity), device=unit.device)
        similarity[rows, start + rows] = -2  # an image is not its own neighbour
        top = similarity.topk(k, dim=1)
        indices.append(top.indices.cpu())
        cosines.append(top.values.cpu())
        # each pair once; by rounding, a cosine of 1 may be 0.99999994
        close = (similarity >= threshold - 1e-6).triu(start + 1)
        count += int(close.sum())
        if count > _MAX_PAIRS:
            raise InputError(f'threshold={threshold:g}: more than {_MAX_PAIRS} pairs of images are as similar')
        pair_cosines.append(similarity[close].cpu())
        pairs.append((close.nonzero() + torch.tensor([start, 0], device=unit.device)).cpu())
    order = torch.cat(pair_cosines).argsort(descending=True, stable=True)
    return Neighbours(
        torch.cat(indices), torch.cat(cosines), torch.cat(pairs)[order], torch.cat(pair_cosines)[order])


@torch.no_grad()
def mahalanobis_distances(features: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    """Distance of each image from the mean of all, in units of their spread in its direction: large for outliers.

    As Lee et al. ("A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
    NeurIPS 2018) for a single class. The covariance is that of Ledoit and Wolf ("A well-conditioned estimator for
    large-dimensional covariance matrices", 2004), which has an inverse for fewer images than features too.

    Args:
        features: (N, D), N > 1, not normalised: unlike images often differ in the length of their features
        chunk: rows at a time

    Returns:
        (N,) float64, on the CPU

    Raises:
        ValueError: features that are not finite
    """
    _check_finite(features)
    count, dim = features.shape
    blocks = features.split(chunk)
    mean = sum(block.double().sum(dim=0) for block in blocks) / count
    covariance, fourth = torch.zeros(dim, dim, dtype=torch.float64, device=features.device), 0.0
    for block in blocks:
        centred = block - mean
        covariance += centred.T @ centred / count
        fourth += float(centred.square().sum(dim=1).square().sum()) / count
    scale, squares = float(covariance.trace()) / dim, float(covariance.square().sum())
    if not scale:
        return torch.zeros(count, dtype=torch.float64)
    identity = scale * torch.eye(dim, dtype=torch.float64, device=features.device)
    noise, spread = (fourth - squares) / count, float((covariance - identity).square().sum())
    shrinkage = min(1.0, max(noise / spread, 1e-6)) if spread else 0.0  # at least what makes it invertible
    factor = torch.linalg.cholesky(torch.lerp(covariance, identity, shrinkage))
    return torch.cat([
        torch.linalg.solve_triangular(factor, (block - mean).T, upper=False).norm(dim=0).cpu() for block in blocks])


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

"""Weighted k-nearest-neighbour classification of frozen features (evaluation protocol of Sec. 4)."""
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from timm_cgh.distributed import Process, block_indices, gather_rows

__all__ = [
    'best_knn', 'knn_accuracy', 'knn_predict', 'knn_predict_distributed', 'nearest_neighbors', 'one_shot_accuracy']


def _unit_rows(features: torch.Tensor, name: str) -> torch.Tensor:
    features = features.float()
    if not features.norm(dim=1).isfinite().all():
        raise ValueError(f'{name} are not finite: the network has diverged')
    return F.normalize(features, dim=1)


def _chunk_size(count: int) -> int:
    """Test images at a time against `count` training images: about 100 MB of similarities, but 64 to 1024 images."""
    return max(64, min(1024, 25_600_000 // count))


def _nearest(train: torch.Tensor, query: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """(M, k) similarities and indices of the nearest rows of `train` (N, D), nearest first, equals by index."""
    similarity = query @ train.T  # (M, D) @ (D, N) -> (M, N)
    # topk returns equals in any order: sort what it finds by index, then by value, which keeps the order of equals
    index = similarity.topk(min(k + 1, len(train)), dim=1).indices.sort(dim=1).values
    values, order = similarity.gather(1, index).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    cut = (values[:, k - 1:k] == values[:, k:]).any(dim=1)  # equals beyond the k-th place, which may be earlier ones
    if cut.any():
        index[cut] = similarity[cut].sort(dim=1, descending=True, stable=True).indices[:, :index.shape[1]]
    return values[:, :k], index[:, :k]


@torch.no_grad()
def nearest_neighbors(train_features: torch.Tensor, test_features: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (M, k) of the k (at most N) training images most similar to each of a few test images, nearest first.

    Args:
        train_features, test_features: (N, D), (M, D), normalised here
    """
    train = _unit_rows(train_features, 'training features')
    return _nearest(train, _unit_rows(test_features, 'test features').to(train.device), k)[1].cpu()


@torch.no_grad()
def knn_predict(
        train_features: torch.Tensor,
        train_labels: torch.Tensor,
        test_features: torch.Tensor,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        chunk: Optional[int] = None,
) -> Dict[int, torch.Tensor]:
    """Vote of the k nearest training images by cosine similarity, weighted by exp(similarity / temperature).

    Exact. Of equally similar images the earlier is the nearer, of classes with equal votes the smaller label wins.

    Args:
        train_features: (N, D), normalised here; the search runs on their device
        train_labels: (N,), any integers
        test_features: (M, D)
        ks: numbers of neighbours; those above N are left out, and N itself is taken where none is left
        temperature: of the vote
        chunk: test images at a time, which bounds memory to about chunk * N similarities; default by N

    Returns:
        k -> (M,) predicted labels, on the CPU

    Raises:
        ValueError: no training image, features that are not finite, sizes that do not match, a k below 1, a temperature
            that is not positive
    """
    if temperature <= 0:
        raise ValueError(f'temperature must be positive, got {temperature}')
    if not len(train_features):
        raise ValueError('no training features to search')
    if len(train_features) != len(train_labels):
        raise ValueError(f'{len(train_features)} training features, but {len(train_labels)} labels')
    if not ks or min(ks) < 1:
        raise ValueError(f'k must be at least 1, got {tuple(ks)}')
    count = len(train_features)
    ks = sorted({k for k in ks if k <= count}) or [count]
    train = _unit_rows(train_features, 'training features')
    test = _unit_rows(test_features, 'test features').to(train.device)
    classes, class_index = train_labels.cpu().unique(return_inverse=True)

    predictions: Dict[int, List[torch.Tensor]] = {k: [] for k in ks}
    for query in test.split(chunk or _chunk_size(count)):
        similarity, index = _nearest(train, query, ks[-1])
        # votes are counted on the CPU in float64: a GPU adds them in any order, and a tie would fall either way
        similarity, voter = similarity.cpu().double(), class_index[index.cpu()]
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
        votes = weight.new_zeros(len(query), len(classes))
        for done, k in zip([0, *ks], ks):
            votes.scatter_add_(1, voter[:, done:k], weight[:, done:k])
            predictions[k].append(classes[votes.argmax(dim=1)])  # argmax gives the first maximum
    return {k: torch.cat(v) for k, v in predictions.items()}


def knn_predict_distributed(
        train_features: torch.Tensor,
        train_labels: torch.Tensor,
        test_features: torch.Tensor,
        process: Process,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
) -> Dict[int, torch.Tensor]:
    """`knn_predict` with the test images divided among the processes. Collective: every rank must call.

    Every rank has all features and gets all predictions; the search runs on the process's device. The ranks take whole
    chunks, so that the predictions do not depend on their number.
    """
    count, chunk = len(test_features), _chunk_size(len(train_features))
    share = block_indices(count, chunk, process.rank, process.world_size)
    predictions = knn_predict(
        train_features.to(process.device), train_labels, test_features[share], ks, temperature, chunk)
    return {k: gather_rows(rows, share, count, process.device) for k, rows in predictions.items()}


def knn_accuracy(
        train_features: torch.Tensor,
        train_labels: torch.Tensor,
        test_features: torch.Tensor,
        test_labels: torch.Tensor,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        chunk: Optional[int] = None,
) -> Dict[int, float]:
    """Top-1 accuracy of `knn_predict` in percent, by k. Images without a label (below 0) are left out, on both sides.

    Args:
        train_features, train_labels: (N, D), (N,)
        test_features, test_labels: (M, D), (M,)
        ks, temperature, chunk: see `knn_predict`

    Raises:
        ValueError: see `knn_predict`; no labelled image on one of the sides
    """
    if len(test_features) != len(test_labels):
        raise ValueError(f'{len(test_features)} test features, but {len(test_labels)} labels')
    known, scored = train_labels.cpu() >= 0, test_labels.cpu() >= 0
    if not scored.any():
        raise ValueError('no labelled test image')
    labels, truth = train_labels.cpu()[known], test_labels.cpu()[scored]
    predictions = knn_predict(
        train_features[known.to(train_features.device)], labels, test_features[scored.to(test_features.device)], ks,
        temperature, chunk)
    return {k: 100 * (predicted == truth).sum().item() / len(truth) for k, predicted in predictions.items()}


def one_shot_accuracy(
        train_features: torch.Tensor,
        train_labels: torch.Tensor,
        test_features: torch.Tensor,
        test_labels: torch.Tensor,
        draws: int = 20,
        seed: int = 42,
) -> float:
    """Top-1 in percent of the nearest of one labelled image per class, averaged over random draws of these images.

    Args:
        train_features, train_labels: (N, D), (N,), to draw from
        test_features, test_labels: (M, D), (M,)
        draws: how many
        seed: of the draws

    Raises:
        ValueError: no labelled image on one of the sides, or features that are not finite
    """
    generator, labels, scored = torch.Generator().manual_seed(seed), train_labels.cpu(), test_labels.cpu() >= 0
    if not scored.any() or not (labels >= 0).any():
        raise ValueError(f"no labelled {'training' if scored.any() else 'test'} image")
    chosen = []
    for _ in range(draws):
        order = torch.randperm(len(labels), generator=generator)
        first = order[np.unique(labels[order].numpy(), return_index=True)[1]]  # of each class in this order
        chosen.append(first[labels[first] >= 0])
    shots = _unit_rows(train_features[torch.cat(chosen).to(train_features.device)], 'training features')
    test = _unit_rows(test_features[scored.to(test_features.device)], 'test features').to(shots.device)
    classes, truth, chunk = labels[chosen[0]], test_labels.cpu()[scored], _chunk_size(len(shots))
    correct = 0
    for query, label in zip(test.split(chunk), truth.split(chunk)):
        nearest = (query @ shots.T).view(len(query), draws, -1).argmax(dim=2)  # (M, draws), of the classes
        correct += int((classes[nearest.cpu()] == label[:, None]).sum())
    return 100 * correct / (draws * len(truth))


def best_knn(accuracy: Dict[int, float]) -> Tuple[int, float]:
    """The smallest k of the best accuracy, and that accuracy: the number that is reported (Sec. 4)."""
    return max(sorted(accuracy.items()), key=lambda item: item[1])

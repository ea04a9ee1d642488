"""Weighted k-nearest-neighbour classification of frozen features (evaluation protocol of Sec. 4)."""
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

__all__ = ['best_knn', 'chunk_size', 'knn_accuracy', 'knn_predict', 'nearest_neighbors']


def _rank_key(similarity: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """int64 keys, all different in a row, ordered like the float32 similarities; the lower index wins a tie."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0: one zero instead of two
    bits = bits ^ ((bits >> 31) & 0x7fffffff)  # IEEE floats, read as integers, run backwards below zero
    return (bits.long() << 32) | (0x7fffffff - index)


def _is_intel() -> bool:
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return 'GenuineIntel' in file.read()
    except OSError:  # no Linux
        return False


# The library behind torch.mm on x86 is Intel's, and takes twice the time of oneDNN on other processors.
_ONEDNN = torch.backends.mkldnn.is_available() and not _is_intel()


def _similarities(train: torch.Tensor, chunk: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """(M, D) -> (M, N) inner products with the rows of `train`, M at most `chunk`; the next call overwrites them."""
    if train.device.type != 'cpu':
        return lambda query: query @ train.T
    if _ONEDNN:
        packed = train.to_mkldnn()
        return lambda query: F.linear(query.to_mkldnn(), packed).to_dense()
    memory = train.new_empty(chunk, len(train))  # pages that are fetched once
    return lambda query: torch.mm(query, train.T, out=memory[:len(query)])


def _topk(
        similarity: torch.Tensor, k: int, group: int = 8, ordered: bool = True) -> Tuple[torch.Tensor, torch.Tensor]:
    """`topk` of long rows: the k greatest are in the k groups of greatest maxima, so only those are looked through."""
    count = similarity.shape[1]
    size = count // group
    if size < 4 * k:
        return similarity.topk(k, dim=1, sorted=ordered)
    whole = size * group
    maxima = similarity[:, :whole].unflatten(1, (group, size)).amax(dim=1)  # (M, size), members `size` apart
    first = _topk(maxima, k, group=4, ordered=False)[1]
    members = first[:, None, :] + torch.arange(0, whole, size, device=first.device)[:, None]  # (M, group, k)
    rest = torch.arange(whole, count, device=first.device).expand(len(first), -1)
    members = torch.cat((members.flatten(1), rest), dim=1)
    values, place = similarity.gather(1, members).topk(k, dim=1, sorted=ordered)
    return values, members.gather(1, place)


def _nearest(similarity: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The k greatest of each row and their places (M, k), greatest first, lower place first among equals.

    Args:
        similarity: (M, N)
        k: at most N
    """
    # one more than asked for tells whether values are level at the k-th place, of which topk would take any
    values, index = _topk(similarity, min(k + 1, similarity.shape[1]))
    level = values[:, 1:] == values[:, :-1]
    rows = level.any(dim=1).nonzero().squeeze(1)  # where the lower place has to be looked for
    tied = level[:, k - 1:].any(dim=1)
    values, index = values[:, :k].contiguous(), index[:, :k].contiguous()
    if tied.any():
        every = torch.arange(similarity.shape[1], device=similarity.device)
        index[tied] = _rank_key(similarity[tied], every).topk(k, dim=1).indices
    if len(rows):
        found = index[rows]
        order = _rank_key(similarity[rows].gather(1, found), found).argsort(dim=1, descending=True)
        index[rows] = found.gather(1, order)
    return values, index


def _unit_rows(features: torch.Tensor, name: str) -> torch.Tensor:
    features = features.float()
    norm = features.norm(dim=1, keepdim=True)
    if not norm.isfinite().all():
        raise ValueError(f'{name} are not finite: the network has diverged')
    return features / norm.clamp(min=1e-12)


def chunk_size(count: int) -> int:
    """Test images at a time against `count` training images: 26 to 102 MB of similarities, but 64 to 1024 images.

    oneDNN's come in new memory, which the C library has at hand below 32 MiB.
    """
    return max(64, min(1024, (6_400_000 if _ONEDNN else 25_600_000) // count))


def _fitting(ks: Sequence[int], count: int) -> Tuple[int, ...]:
    if not ks or min(ks) < 1:
        raise ValueError(f'k must be at least 1, got {tuple(ks)}')
    return tuple(sorted({k for k in ks if k <= count})) or (count,)


@torch.no_grad()
def nearest_neighbors(train_features: torch.Tensor, test_features: torch.Tensor, k: int) -> torch.Tensor:
    """Places (M, k) of the training images most similar to each of a few test images, nearest first.

    Args:
        train_features: (N, D), normalised here
        test_features: (M, D)
        k: at most N
    """
    train = _unit_rows(train_features, 'training features')
    return _nearest(_unit_rows(test_features, 'test features').to(train.device) @ train.T, k)[1].cpu()


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
        train_features: (N, D) features, normalised here; where they are is where the work is done
        train_labels: (N,) labels, any integers
        test_features: (M, D) features
        ks: numbers of neighbours; those above N are left out, and N itself is taken where none is left
        temperature: of the vote
        chunk: test images at a time, which bounds memory to about chunk * N similarities; default `chunk_size(N)`

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
    ks = _fitting(ks, len(train_features))
    train = _unit_rows(train_features, 'training features')
    test = _unit_rows(test_features, 'test features').to(train.device)
    classes, class_index = train_labels.cpu().unique(return_inverse=True)

    predictions = {k: [] for k in ks}
    chunk = chunk or chunk_size(len(train))
    similarities = _similarities(train, min(chunk, len(test)))
    for query in test.split(chunk):
        similarity, index = _nearest(similarities(query), ks[-1])
        # votes are counted on the CPU in float64: a GPU adds them in any order, and a tie would fall either way
        similarity, voter = similarity.cpu().double(), class_index[index.cpu()]
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
        votes = weight.new_zeros(len(query), len(classes))
        done = 0
        for k in ks:
            votes.scatter_add_(1, voter[:, done:k], weight[:, done:k])
            predictions[k].append(classes[votes.argmax(dim=1)])  # argmax gives the first maximum
            done = k
    return {k: torch.cat(v) if v else classes.new_empty(0) for k, v in predictions.items()}


def knn_accuracy(
        train_features: torch.Tensor,
        train_labels: torch.Tensor,
        test_features: torch.Tensor,
        test_labels: torch.Tensor,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        chunk: Optional[int] = None,
) -> Dict[int, float]:
    """Top-1 accuracy of `knn_predict`. Images without a label (below 0) are left out, on both sides.

    Args:
        train_features, train_labels: (N, D), (N,)
        test_features, test_labels: (M, D), (M,)
        ks, temperature, chunk: see `knn_predict`

    Returns:
        k -> top-1 accuracy in percent

    Raises:
        ValueError: see `knn_predict`; no labelled image on one of the sides
    """
    if len(test_features) != len(test_labels):
        raise ValueError(f'{len(test_features)} test features, but {len(test_labels)} labels')
    if (train_labels < 0).any():
        labelled = train_labels >= 0
        train_features, train_labels = train_features[labelled.to(train_features.device)], train_labels[labelled]
    if (test_labels < 0).any():
        labelled = test_labels >= 0
        test_features, test_labels = test_features[labelled.to(test_features.device)], test_labels[labelled]
    if not len(test_labels):
        raise ValueError('no labelled test image')
    predictions = knn_predict(train_features, train_labels, test_features, ks, temperature, chunk)
    truth = test_labels.cpu()
    return {k: 100 * (predicted == truth).sum().item() / len(truth) for k, predicted in predictions.items()}


def best_knn(accuracy: Dict[int, float]) -> Tuple[int, float]:
    """The k of the best accuracy (the smallest such) and that accuracy: the figure that is reported (Sec. 4)."""
    return max(sorted(accuracy.items()), key=lambda item: item[1])

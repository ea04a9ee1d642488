"""kNN relative to faiss."""
import argparse
import statistics
import time
from functools import partial
from typing import Any, Dict, Sequence

import torch
import torch.nn.functional as F

from timm_cgh.eval import knn_predict

from .timing import median_ratio

__all__ = ['benchmark_knn']


def _predict_with_faiss(
        train: torch.Tensor,
        labels: torch.Tensor,
        test: torch.Tensor,
        ks: Sequence[int],
        temperature: float,
) -> Dict[int, torch.Tensor]:
    import faiss
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(F.normalize(train).numpy())
    similarity, found = index.search(F.normalize(test).numpy(), max(ks))
    similarity, voter = torch.from_numpy(similarity).double(), labels[torch.from_numpy(found)]
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes, done, predictions = weight.new_zeros(len(test), int(labels.max()) + 1), 0, {}
    for k in ks:
        votes.scatter_add_(1, voter[:, done:k], weight[:, done:k])
        predictions[k], done = votes.argmax(dim=1), k
    return predictions


def benchmark_knn(
        args: argparse.Namespace,
        queries: int = 10000,
        images: int = 50000,
        width: int = 512,
        classes: int = 1000,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
) -> Dict[str, Any]:
    """Seconds of `knn_predict` and of faiss-cpu's exact search followed by the same vote, in turn, from raw features.

    Returns:
        the medians, the median of the ratios, and how many of the predictions differ (ties in float32)
    """
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    labels, truth = (torch.randint(classes, (n,), generator=generator) for n in (images, queries))
    train, test = (centres[y] + 4 * torch.randn(len(y), width, generator=generator) for y in (labels, truth))
    searches = {
        name: partial(function, train, labels, test, ks, temperature)
        for name, function in (('ours', knn_predict), ('faiss', _predict_with_faiss))}
    seconds, predictions = {name: [] for name in searches}, {}
    for _ in range(args.turns):
        for name, search in searches.items():
            began = time.perf_counter()
            predictions[name] = search()
            seconds[name].append(time.perf_counter() - began)
    result = dict(
        knn_s=statistics.median(seconds['ours']),
        faiss_s=statistics.median(seconds['faiss']),
        ratio=median_ratio(seconds['ours'], seconds['faiss']),
        differing={k: int((predictions['ours'][k] != predictions['faiss'][k]).sum()) for k in ks},
        seconds=seconds,
        threads=torch.get_num_threads(),
        faiss=faiss.__version__,
    )
    print(f"kNN {result['knn_s']:.2f} s, faiss {result['faiss_s']:.2f} s, ratio {result['ratio']:.2f}")
    return result

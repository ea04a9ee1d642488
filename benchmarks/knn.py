"""kNN relative to faiss."""
import argparse
import statistics
from functools import partial
from typing import Any, Dict

import torch
import torch.nn.functional as F

from timm_cgh.eval import knn_predict

from .timing import in_turn, median_ratio

__all__ = ['benchmark_knn']

_QUERIES, _IMAGES, _WIDTH, _CLASSES = 10000, 50000, 512, 1000
_KS = (10, 20, 100, 200)
_TEMPERATURE = 0.07


def _predict_with_faiss(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor) -> Dict[int, torch.Tensor]:
    import faiss
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(F.normalize(train).numpy())
    similarity, found = index.search(F.normalize(test).numpy(), max(_KS))
    similarity, voter = torch.from_numpy(similarity).double(), labels[torch.from_numpy(found)]
    weight = ((similarity - similarity[:, :1]) / _TEMPERATURE).exp()
    votes, done, predictions = weight.new_zeros(len(test), int(labels.max()) + 1), 0, {}
    for k in _KS:
        votes.scatter_add_(1, voter[:, done:k], weight[:, done:k])
        predictions[k], done = votes.argmax(dim=1), k
    return predictions


def benchmark_knn(args: argparse.Namespace) -> Dict[str, Any]:
    """Seconds of `knn_predict` and of faiss-cpu's exact search followed by the same vote, in turn, from raw features.

    The predictions that differ are ties in float32.
    """
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(_CLASSES, _WIDTH, generator=generator)
    labels, truth = (torch.randint(_CLASSES, (n,), generator=generator) for n in (_IMAGES, _QUERIES))
    train, test = (centres[y] + 4 * torch.randn(len(y), _WIDTH, generator=generator) for y in (labels, truth))
    ours = partial(knn_predict, train, labels, test, _KS, _TEMPERATURE)
    faiss_search = partial(_predict_with_faiss, train, labels, test)
    args.device, args.repeats = 'cpu', 1
    seconds = in_turn(args, {'ours': ours, 'faiss': faiss_search})
    predictions, others = ours(), faiss_search()
    result = dict(
        seconds=seconds,
        medians={name: statistics.median(values) for name, values in seconds.items()},
        ratio=median_ratio(seconds['ours'], seconds['faiss']),
        differing={k: int((predictions[k] != others[k]).sum()) for k in _KS},
        faiss=faiss.__version__,
    )
    print('kNN {ours:.2f} s, faiss {faiss:.2f} s, '.format(**result['medians']) + f"ratio {result['ratio']:.2f}")
    return result

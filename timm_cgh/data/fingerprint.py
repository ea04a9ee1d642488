"""Which images a data set holds: a checkpoint in the middle of an epoch is good for the same ones alone."""
import hashlib
from typing import Any, Iterable

from torch.utils.data import Dataset, Subset

from .labels import read_labels
from .sources import is_stream

__all__ = ['fingerprint']


def _digest(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f'{item}\n'.encode())
    return digest.hexdigest()[:16]


def fingerprint(dataset: Dataset) -> str:
    """Digest of the file names and their order; where a data set has none, of its labels and their number.

    No image is read. Of a `Subset`, the whole data set and the indices count. Streams have no order: ''.
    """
    if is_stream(dataset):
        return ''
    if isinstance(dataset, Subset):
        return _digest((fingerprint(dataset.dataset), *dataset.indices))
    source: Any = getattr(dataset, 'reader', dataset)
    samples = getattr(source, 'samples', None)
    if samples is not None:  # ours and torchvision's: the path comes first
        return _digest(str(sample[0]).removeprefix(str(source.root)) for sample in samples)
    labels = read_labels(dataset)
    return _digest((len(dataset), *(() if labels is None else labels)))

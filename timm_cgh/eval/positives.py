"""Which bank entries the teacher's relation distribution selects as positives, and how many rightly (Sec. 4.6).

The paper does not say how it thresholds. Here an entry of the bank is selected where its probability (Eq. 1, 4) is at
least a multiple of the uniform one, `10/K` unless asked otherwise, or where it is among the most probable, `top20`.
An image's own embedding of an epoch ago, where the bank still holds it, is an entry of its class like any other.
"""
import argparse
import math
import re
from typing import Dict, Iterable, Mapping, NamedTuple, Optional, Union

import torch

__all__ = ['RelationCounts', 'RelationTracker', 'Selection', 'count_relations', 'relation_columns', 'selection_text']

_CHUNK_VALUES = 2 ** 22  # of one (chunk, bank) matrix


class Selection(NamedTuple):
    """Which entries of a bank of K count as predicted positives: p >= multiple / K, or the `top` most probable."""
    multiple: Optional[float] = 10.0
    top: Optional[int] = None

    @classmethod
    def parse(cls, text: str) -> 'Selection':
        """From `10/K` or `top20`.

        Raises:
            ValueError: neither of the two
        """
        number = r'(\d+(?:\.\d*)?|\.\d+)'
        match = re.fullmatch(rf'\s*(?:{number}\s*/\s*K|top\s*(\d+))\s*', text, re.IGNORECASE)
        if match is None or float(match[1] or match[2]) <= 0:
            raise ValueError(f'must be a multiple of the uniform probability (10/K) or a number (top20), got {text}')
        return cls(float(match[1])) if match[1] else cls(None, int(match[2]))

    def __str__(self) -> str:
        return f'{self.multiple:.10g}/K' if self.top is None else f'top{self.top}'

    def check(self, bank_size: int) -> None:
        """
        Raises:
            ValueError: no bank of that size can be divided so
        """
        if self.top is None and self.multiple >= bank_size:
            raise ValueError(f'{self} is no probability below 1 in a bank of {bank_size}: nothing would be selected')
        if self.top is not None and self.top > bank_size:
            raise ValueError(f'{self} is more than the bank of {bank_size} holds')

    def describe(self) -> str:
        """For a caption."""
        if self.top is None:
            return f'bank entries with a teacher probability of at least {self.multiple:g} / K'
        return f'the {self.top} bank entries that are most probable to the teacher'


def selection_text(text: str) -> str:
    """Type of a command line option: a `Selection` in its short form, which goes into `args.yaml` as it is."""
    try:
        return str(Selection.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class RelationCounts(NamedTuple):
    """True positives, false positives and false negatives over pairs (image, bank entry); numbers or 0-d tensors."""
    tp: Union[float, torch.Tensor] = 0
    fp: Union[float, torch.Tensor] = 0
    fn: Union[float, torch.Tensor] = 0

    def plus(self, other: 'RelationCounts') -> 'RelationCounts':
        return RelationCounts(*(mine + more for mine, more in zip(self, other)))

    @property
    def recall(self) -> float:
        """TP / (TP + FN) in percent; nan where the bank has nothing of the images' classes."""
        positives = float(self.tp) + float(self.fn)
        return 100 * float(self.tp) / positives if positives else math.nan

    @property
    def precision(self) -> float:
        """TP / (TP + FP) in percent; nan where nothing is selected."""
        selected = float(self.tp) + float(self.fp)
        return 100 * float(self.tp) / selected if selected else math.nan


@torch.no_grad()
def count_relations(
        embeddings: torch.Tensor,
        bank: torch.Tensor,
        temperature: float,
        labels: torch.Tensor,
        bank_labels: torch.Tensor,
        selection: Selection = Selection(),
        chunk_values: int = _CHUNK_VALUES,
) -> RelationCounts:
    """Compare what softmax(z Q^T / t) selects in the bank (Eq. 1, 4) with the entries of the image's own class.

    The distribution is the one that the student is trained on: over the whole bank, whatever is labelled. Images and
    entries without a label (below 0; entries that are not yet filled) are then left out of the counts.

    Args:
        embeddings: (B, D) unit rows of the teacher
        bank: (K, D) unit rows
        temperature: t of the teacher in this context
        labels: (B,) integers
        bank_labels: (K,) integers
        selection: the threshold
        chunk_values: at most so many similarities at a time (one row at least)

    Returns:
        0-d int64 tensors on the device of the embeddings, summed over the images

    Raises:
        ValueError: a temperature that is not positive, shapes that do not fit, a selection that does not fit the bank
    """
    if not temperature > 0:
        raise ValueError(f'a temperature must be positive, got {temperature}')
    if embeddings.ndim != 2 or bank.ndim != 2 or embeddings.shape[1] != bank.shape[1]:
        raise ValueError(f'expected (B, D) and (K, D), got {tuple(embeddings.shape)} and {tuple(bank.shape)}')
    if labels.shape != embeddings.shape[:1] or bank_labels.shape != bank.shape[:1]:
        raise ValueError(
            f'{len(embeddings)} images and {len(bank)} bank entries, but labels {tuple(labels.shape)} and '
            f'{tuple(bank_labels.shape)}')
    size, device = len(bank), embeddings.device
    selection.check(size)
    dtype = torch.float64 if embeddings.dtype == bank.dtype == torch.float64 else torch.float32
    bank, labels, bank_labels = bank.to(device, dtype), labels.to(device), bank_labels.to(device)
    tp, fp, fn = torch.zeros(3, dtype=torch.int64, device=device)
    with torch.autocast(device.type, enabled=False):
        rows = max(1, chunk_values // size)
        for z, label in zip(embeddings.to(dtype).split(rows), labels.split(rows)):
            logits = (z / temperature) @ bank.T  # (b, D) @ (D, K) -> (b, K)
            label = label[:, None]
            known = (label >= 0) & (bank_labels >= 0)
            same = known & (label == bank_labels)
            positives = same.sum()
            if selection.top is None:
                floor = logits.logsumexp(dim=1, keepdim=True) + math.log(selection.multiple / size)
                selected = logits >= floor
                hits, taken = (same & selected).sum(), (known & selected).sum()
            else:
                index = logits.topk(selection.top, dim=1).indices
                hits, taken = same.gather(1, index).sum(), known.gather(1, index).sum()
            tp, fp, fn = tp + hits, fp + taken - hits, fn + positives - hits
    return RelationCounts(tp, fp, fn)


class RelationTracker:
    """Measures a training step: the teacher's embeddings of a batch against the banks, before they enter them.

    Args:
        selection: the threshold
        temperatures: context (`global`, `hyper`) -> temperature of the teacher
    """

    def __init__(self, selection: Selection, temperatures: Mapping[str, float]):
        self.selection = selection
        self.temperatures = dict(temperatures)

    def __call__(
            self,
            embeddings: Iterable[torch.Tensor],
            labels: torch.Tensor,
            banks: Mapping[str, torch.nn.Module],
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            embeddings: (B, D) per bank, in the order of the banks
            labels: (B,), -1 unknown
            banks: context -> memory bank with `embeddings` (K, D) and `labels` (K,)

        Returns:
            `tp_<context>`, `fp_<context>`, `fn_<context>`: 0-d float32 tensors for a `Meter`. The ratio of averages
            over steps and processes is that of the sums: averages of ratios would weigh a batch with few positives like
            any
        """
        result = {}
        for (name, bank), z in zip(banks.items(), embeddings):
            counts = count_relations(z, bank.embeddings, self.temperatures[name], labels, bank.labels, self.selection)
            for kind, count in counts._asdict().items():
                result[f'{kind}_{name}'] = count.float()
        return result


def relation_columns(means: Mapping[str, float]) -> Dict[str, float]:
    """An epoch's averages with `recall_<context>` and `precision_<context>` (percent) in place of the tracker's counts.

    What is not defined (nothing selected, no positive in the bank) is left out: a blank in `summary.csv`.
    """
    result = dict(means)
    for name in [key[3:] for key in means if key.startswith('tp_')]:
        counts = RelationCounts(*(result.pop(f'{kind}_{name}') for kind in RelationCounts._fields))
        for column in ('recall', 'precision'):
            value = getattr(counts, column)
            if math.isfinite(value):
                result[f'{column}_{name}'] = value
    return result

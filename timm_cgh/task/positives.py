"""Positives that the teacher's relation distribution selects in the bank, compared with class labels (Sec. 4.6).

The paper does not state its threshold. Here an entry of the bank is selected where its probability (Eq. 1, 4) is at
least a multiple of the uniform one (`10/K`), or where it is among the most probable (`top20`). The embedding of the
same image from the epoch before, where the bank still holds it, counts like any entry of its class.
"""
import math
import re
from typing import Dict, Iterable, Mapping, NamedTuple, Optional, Union

import torch

from timm_cgh.loss.relation import check_inputs, working_dtype

__all__ = ['RelationCounts', 'RelationTracker', 'Selection', 'count_relations', 'relation_columns']

_CHUNK_VALUES = 2 ** 22  # of one (chunk, bank) matrix


class Selection(NamedTuple):
    """Which entries of a bank of K are selected: p >= multiple / K, or the `top` most probable."""
    multiple: Optional[float] = 10.0
    top: Optional[int] = None

    @classmethod
    def parse(cls, text: str) -> 'Selection':
        """Read `10/K` or `top20`.

        Raises:
            ValueError: neither of the two
        """
        number = r'(\d+(?:\.\d*)?|\.\d+)'
        match = re.fullmatch(rf'\s*(?:{number}\s*/\s*K|top\s*(\d+))\s*', text, re.IGNORECASE)
        if match is None or float(match[1] or match[2]) <= 0:
            raise ValueError(f'must be a multiple of the uniform probability (10/K) or a number (top20), got {text}')
        return cls(float(match[1])) if match[1] else cls(None, int(match[2]))

    @staticmethod
    def normalize(text: str) -> str:
        """Short form of a selection, as `args.yaml` holds it: ` 10.0 / k` -> `10/K`.

        Raises:
            ValueError: see `parse`
        """
        return str(Selection.parse(text))

    def __str__(self) -> str:
        return f'top{self.top}' if self.multiple is None else f'{self.multiple:.10g}/K'

    def check(self, bank_size: int) -> None:
        """
        Raises:
            ValueError: it would select nothing, or more than a bank of this size holds
        """
        if self.multiple is not None and self.multiple >= bank_size:
            raise ValueError(f'{self} is at least 1 in a bank of {bank_size}: nothing would be selected')
        if self.top is not None and self.top > bank_size:
            raise ValueError(f'{self} is more than the bank of {bank_size} holds')

    def describe(self) -> str:
        """Phrase for a caption."""
        if self.multiple is None:
            return f"the teacher's {self.top} most probable bank entries"
        return f'bank entries with a teacher probability of at least {self.multiple:g} / K'


class RelationCounts(NamedTuple):
    """True positives, false positives and false negatives over pairs (image, bank entry); numbers or 0-d tensors."""
    tp: Union[float, torch.Tensor] = 0
    fp: Union[float, torch.Tensor] = 0
    fn: Union[float, torch.Tensor] = 0

    @property
    def recall(self) -> float:
        """TP / (TP + FN) in percent; nan where the bank holds no entry of the images' classes."""
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
    """Compare the entries that softmax(z Q^T / t) selects in the bank (Eq. 1, 4) with those of the image's class.

    The distribution is the student's target: over the whole bank, labelled or not. Images and entries without a label
    (below 0; entries not yet filled) are left out of the counts only.

    Args:
        embeddings: (B, D) unit rows of the teacher
        bank: (K, D) unit rows
        temperature: t of the teacher in this context
        labels: (B,) integers
        bank_labels: (K,) integers
        selection: the threshold
        chunk_values: largest number of similarities held at a time (but at least one row)

    Returns:
        0-d int64 tensors on the device of the embeddings, summed over the images

    Raises:
        ValueError: a temperature that is not positive, shapes that do not fit, a selection that does not fit the bank
    """
    check_inputs(temperature, (embeddings, bank))
    if labels.shape != embeddings.shape[:1] or bank_labels.shape != bank.shape[:1]:
        raise ValueError(
            f'{len(embeddings)} images and {len(bank)} bank entries, but labels {tuple(labels.shape)} and '
            f'{tuple(bank_labels.shape)}')
    selection.check(len(bank))
    device, dtype = embeddings.device, working_dtype(embeddings, bank)
    bank, labels, bank_labels = bank.to(device, dtype), labels.to(device), bank_labels.to(device)
    rows = max(1, chunk_values // len(bank))
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    with torch.autocast(device.type, enabled=False):
        for z, label in zip(embeddings.to(dtype).split(rows), labels.unsqueeze(1).split(rows)):
            logits = (z / temperature) @ bank.T  # (b, D) @ (D, K) -> (b, K)
            known = (label >= 0) & (bank_labels >= 0)
            same = known & (label == bank_labels)
            if selection.multiple is None:
                selected = torch.zeros_like(same).scatter_(1, logits.topk(selection.top, dim=1).indices, True)
            else:
                threshold = logits.logsumexp(dim=1, keepdim=True) + math.log(selection.multiple / len(bank))
                selected = logits >= threshold
            tp = (same & selected).sum()
            counts += torch.stack([tp, (known & selected).sum() - tp, same.sum() - tp])
    return RelationCounts(*counts)


class RelationTracker:
    """Measures a training step: the teacher's embeddings of a batch against the banks, before they enter them.

    `temperatures` are the teacher's, by context (`global`, `hyper`).
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
            `tp_<context>`, `fp_<context>`, `fn_<context>`: 0-d float32 tensors for a `Meter`. Recall and precision are
            ratios of their averages over steps and processes: averages of ratios would give each batch the same weight,
            whatever the number of its positives
        """
        result = {}
        for (name, bank), z in zip(banks.items(), embeddings):
            counts = count_relations(z, bank.embeddings, self.temperatures[name], labels, bank.labels, self.selection)
            result.update({f'{kind}_{name}': count.float() for kind, count in counts._asdict().items()})
        return result


def relation_columns(means: Mapping[str, float]) -> Dict[str, float]:
    """An epoch's averages with `recall_<context>` and `precision_<context>` (percent) in place of the tracker's counts.

    Undefined values (nothing selected, no positive in the bank) are left out: a blank in `summary.csv`.
    """
    result = dict(means)
    for name in [key.removeprefix('tp_') for key in means if key.startswith('tp_')]:
        counts = RelationCounts(*(result.pop(f'{kind}_{name}') for kind in RelationCounts._fields))
        columns = {f'recall_{name}': counts.recall, f'precision_{name}': counts.precision}
        result.update({column: value for column, value in columns.items() if math.isfinite(value)})
    return result

"""Reference for the positives of a relation."""
import math


def naive(z, bank, temperature, labels, bank_labels, chosen):
    """Pair by pair in float64; `chosen(p)` returns the selected entries of an image's distribution."""
    tp = fp = fn = 0
    for row, label in zip(z.double(), labels.tolist()):
        similarities = [float(row @ entry) / temperature for entry in bank.double()]
        total = sum(math.exp(s - max(similarities)) for s in similarities)
        picked = chosen([math.exp(s - max(similarities)) / total for s in similarities])
        for entry, other in enumerate(bank_labels.tolist()):
            if label < 0 or other < 0:
                continue
            tp += entry in picked and other == label
            fp += entry in picked and other != label
            fn += entry not in picked and other == label
    return tp, fp, fn

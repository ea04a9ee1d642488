"""Pictures of an evaluation: nearest neighbours, confusion, accuracy of each class."""
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image

from timm_cgh.figure import BLUE, GREEN, GREY, ORANGE, new_figure, open_axes, save_figure

__all__ = ['save_class_accuracy', 'save_confusion', 'save_retrieval_grid']

_RIGHT, _WRONG = GREEN, ORANGE
_LISTED = 30  # classes: beyond, names cannot be read


def _counts(labels: torch.Tensor, predictions: torch.Tensor, num_classes: int) -> np.ndarray:
    """(C, C) numbers of images by true and predicted class; predictions below 0 (none) are left out."""
    labels, predictions = labels.cpu().long(), predictions.cpu().long()
    known = predictions >= 0
    pairs = labels[known] * num_classes + predictions[known]
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes).numpy()


def _named(names: Optional[Sequence[str]], labels: torch.Tensor, predictions: torch.Tensor) -> List[str]:
    """Names of all classes, cut to a readable length; numbers where there are none."""
    count = int(max(labels.max(), predictions.max())) + 1
    names = list(names or [])
    names += [str(i) for i in range(len(names), count)]
    # matplotlib would read mathematics between dollar signs
    return [(name if len(name) <= 26 else f'{name[:25]}…').replace('$', r'\$') for name in names]


def save_confusion(
        labels: torch.Tensor,
        predictions: torch.Tensor,
        path: Union[str, Path],
        names: Optional[Sequence[str]] = None,
) -> bool:
    """Draw the confusion matrix: a row for each true class, its shares of the predicted classes; a whole PNG or none.

    Args:
        labels: (N,) true classes, 0 and up
        predictions: (N,) predicted classes, below 0 for none
        path: PNG file to write
        names: of the classes, by number

    Returns:
        False, and nothing is written, where matplotlib is not installed
    """
    names = _named(names, labels, predictions)
    counts = _counts(labels, predictions, len(names))
    size = min(12.0, max(5.0, 2.4 + 0.34 * len(names)))
    figure = new_figure(size + 0.8, size)
    if figure is None:
        return False
    from matplotlib.colors import Normalize, PowerNorm
    total = torch.bincount(labels.cpu().long(), minlength=len(names)).numpy()
    share = 100 * counts / np.maximum(total, 1)[:, None]
    axes = figure.add_subplot()
    written = len(names) <= 20
    # where no numbers can be written, a root brings out the few per cent that are confused
    shades = Normalize(0, 100) if written else PowerNorm(0.5, 0, 100)
    picture = axes.imshow(share, cmap='Blues', norm=shades, interpolation='nearest')
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label('of the true class, %')
    bar.outline.set_visible(False)
    if len(names) <= _LISTED:
        long = max(map(len, names)) > 3
        axes.set_xticks(range(len(names)), names, rotation=90 if long else 0, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        if written:
            for row, column in zip(*np.nonzero(counts)):
                axes.text(column, row, f'{share[row, column]:.0f}', ha='center', va='center', fontsize=7,
                          color='white' if share[row, column] > 55 else '#222222')
    else:
        axes.tick_params(labelsize=8)
    for side in axes.spines.values():
        side.set_color('#bbbbbb')
    axes.tick_params(length=0)
    axes.set_xlabel('predicted')
    axes.set_ylabel('true')
    right = np.trace(counts)
    axes.set_title(f'Top-1 {100 * right / max(1, len(labels)):.2f} %, {len(labels)} images', fontsize=10, loc='left')
    return save_figure(figure, path)


def save_class_accuracy(
        labels: torch.Tensor,
        predictions: torch.Tensor,
        path: Union[str, Path],
        names: Optional[Sequence[str]] = None,
) -> bool:
    """Draw the accuracy of each class, best first: bars with names, a curve where the classes are many.

    Args:
        labels, predictions, path, names: see `save_confusion`; classes without an image are left out

    Returns:
        False, and nothing is written, where matplotlib is not installed
    """
    names = _named(names, labels, predictions)
    total = torch.bincount(labels.cpu().long(), minlength=len(names)).numpy()
    accuracy = 100 * np.diagonal(_counts(labels, predictions, len(names))) / np.maximum(total, 1)
    present = np.flatnonzero(total)
    order = present[np.argsort(-accuracy[present], kind='stable')]
    listed = len(order) <= _LISTED
    figure = new_figure(7.5, 1.2 + 0.26 * max(4, len(order)) if listed else 4.5)
    if figure is None:
        return False
    mean = accuracy[order].mean()
    axes = figure.add_subplot()
    if listed:
        axes.barh(range(len(order)), accuracy[order], color=BLUE, height=0.72)
        axes.set_yticks(range(len(order)), [names[i] for i in order], fontsize=8)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlim(0, 101)
        axes.set_xticks(range(0, 101, 20))
        for place, i in enumerate(order):
            inside = accuracy[i] > 10
            axes.text(accuracy[i] + (-1 if inside else 1), place, f'{accuracy[i]:.1f}', va='center', fontsize=8,
                      ha='right' if inside else 'left', color='white' if inside else GREY)
        axes.axvline(mean, color=_WRONG, linewidth=1.2, linestyle='--', zorder=0.9)
        axes.set_xlabel('top-1, %')
        axes.tick_params(axis='y', length=0)
    else:
        axes.fill_between(range(1, len(order) + 1), accuracy[order], color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(range(1, len(order) + 1), accuracy[order], color=BLUE, linewidth=1.6)
        axes.axhline(mean, color=_WRONG, linewidth=1.2, linestyle='--')
        axes.set_xlim(1, len(order))
        axes.set_ylim(0, 103)
        axes.set_xlabel(f'classes, from the best to the worst of {len(order)}')
        axes.set_ylabel('top-1, %')
        ends = f'best: {", ".join(names[i] for i in order[:3])}\nworst: {", ".join(names[i] for i in order[:-4:-1])}'
        axes.text(0.01, 0.03, ends, transform=axes.transAxes, fontsize=8, color=GREY)
    open_axes(axes, grid=None if listed else 'both')
    axes.set_title(f'Accuracy of each class, mean {mean:.2f} % (dashed)', fontsize=10, loc='left')
    return save_figure(figure, path)


def save_retrieval_grid(
        rows: Sequence[Sequence[Tuple[Image.Image, str, bool]]],
        path: Union[str, Path],
        title: str = '',
) -> bool:
    """Draw queries and their nearest neighbours, framed by whether their class is the query's.

    Args:
        rows: per query, (image, class name, whether it is the query's class) of the query and then of its neighbours,
            nearest first
        path: PNG file to write
        title: heading

    Returns:
        False, and nothing is written, where matplotlib is not installed
    """
    columns = max(map(len, rows))
    figure = new_figure(0.95 * columns + 0.3, 1.12 * len(rows) + 0.7)
    if figure is None:
        return False
    # a gap between queries and neighbours
    grid = figure.add_gridspec(len(rows), columns + 1, width_ratios=[1, 0.15, *[1] * (columns - 1)])
    for y, row in enumerate(rows):
        for x, (image, name, right) in enumerate(row):
            axes = figure.add_subplot(grid[y, x if x == 0 else x + 1])
            grey = image.mode == 'L'
            small = max(image.size) < 100  # pixels of small images are shown as they are
            axes.imshow(np.asarray(image), cmap='gray' if grey else None, vmin=0, vmax=255,
                        interpolation='nearest' if small else 'antialiased')
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_color(GREY if x == 0 else _RIGHT if right else _WRONG)
                side.set_linewidth(1.2 if x == 0 else 3)
            name = name if len(name) <= 14 else f'{name[:13]}…'
            axes.set_xlabel(name.replace('$', r'\$'), fontsize=7, labelpad=2,
                            color='black' if x == 0 else GREY if right else _WRONG)
            if y == 0 and x < 2:
                axes.set_title('query' if x == 0 else 'nearest →', fontsize=8, loc='left')
    heading = ' · '.join(filter(None, (title, 'green: the class of the query, orange: another')))
    figure.suptitle(heading, fontsize=9)
    return save_figure(figure, path)

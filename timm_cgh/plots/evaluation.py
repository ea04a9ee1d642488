"""Plots of an evaluation: confusion matrix, accuracy of each class; and of images: views, nearest neighbours."""
import logging
from pathlib import Path
from typing import List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image

from timm_cgh.plots.style import BLUE, GREEN, GREY, ORANGE, draw_image, new_figure, plot, save_figure

__all__ = ['save_class_accuracy', 'save_classification', 'save_confusion', 'save_retrieval_grid', 'save_views']

_logger = logging.getLogger('eval')
_RIGHT, _WRONG = GREEN, ORANGE
_MAX_NAMED = 30  # classes; names of more could not be read


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f'{text[:length - 1]}…'


def _class_names(names: Optional[Sequence[str]], labels: torch.Tensor, predictions: torch.Tensor) -> List[str]:
    """Names of all classes in readable length, numbers where there are none."""
    count = int(max(labels.max(), predictions.max())) + 1
    names = list(names or [])
    return [_shorten(name, 26) for name in (*names, *map(str, range(len(names), count)))]


def _confusion(
        labels: torch.Tensor,
        predictions: torch.Tensor,
        num_classes: int,
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C, C) numbers of images by true and predicted class, the same in percent of the true class, (C,) images of each.

    Predictions below 0 (none) are in no column, but count as images of their class.
    """
    labels, predictions, edges = labels.cpu().numpy(), predictions.cpu().numpy(), np.arange(num_classes + 1)
    counts, *_ = np.histogram2d(labels, predictions, bins=(edges, edges))
    images = np.bincount(labels, minlength=num_classes)
    return counts, 100 * counts / np.maximum(images, 1)[:, None], images


@plot
def save_confusion(
        labels: torch.Tensor,
        predictions: torch.Tensor,
        path: Union[str, Path],
        names: Optional[Sequence[str]] = None,
) -> None:
    """Plot the confusion matrix: a row per true class, with its percentages of the predicted classes.

    Args:
        labels: (N,) true classes, 0 and up
        predictions: (N,) predicted classes, below 0 for none
        path: PNG file to write
        names: of the classes, by number
    """
    from matplotlib.colors import Normalize, PowerNorm
    names = _class_names(names, labels, predictions)
    counts, percent, _ = _confusion(labels, predictions, len(names))
    size = min(12.0, max(5.0, 2.4 + 0.34 * len(names)))
    figure = new_figure(size + 0.8, size)
    axes = figure.add_subplot()
    with_numbers = len(names) <= 20
    # without numbers, a root scale brings out confusions of a few percent
    norm = Normalize(0, 100) if with_numbers else PowerNorm(0.5, 0, 100)
    image = axes.imshow(percent, cmap='Blues', norm=norm, interpolation='nearest')
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, label='of the true class, %')
    bar.outline.set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    if len(names) <= _MAX_NAMED:
        long = max(map(len, names)) > 3
        axes.set_xticks(range(len(names)), names, rotation=90 if long else 0)
        axes.set_yticks(range(len(names)), names)
    if with_numbers:
        for row, column in zip(*np.nonzero(counts)):
            axes.text(column, row, f'{percent[row, column]:.0f}', ha='center', va='center', fontsize=7,
                      color='white' if percent[row, column] > 55 else '#222222')
    axes.grid(False)
    axes.spines[:].set(visible=True, color='#bbbbbb')
    accuracy = 100 * np.trace(counts) / max(1, len(labels))
    axes.set(xlabel='predicted', ylabel='true', title=f'Top-1 {accuracy:.2f} %, {len(labels)} images')
    save_figure(figure, path)


@plot
def save_class_accuracy(
        labels: torch.Tensor,
        predictions: torch.Tensor,
        path: Union[str, Path],
        names: Optional[Sequence[str]] = None,
) -> None:
    """Plot the accuracy of each class that has images, best first: bars with names, a curve where the classes are many.

    For the arguments see `save_confusion`.
    """
    names = _class_names(names, labels, predictions)
    _, percent, images = _confusion(labels, predictions, len(names))
    accuracy, present = np.diagonal(percent), np.flatnonzero(images)
    order = present[np.argsort(-accuracy[present], kind='stable')]
    accuracy, names = accuracy[order], [names[i] for i in order]
    with_names = len(order) <= _MAX_NAMED
    figure = new_figure(7.5, 1.2 + 0.26 * max(4, len(order)) if with_names else 4.5)
    axes = figure.add_subplot()
    (_draw_bars if with_names else _draw_ranking)(axes, accuracy, names)
    axes.set_title(f'Accuracy of each class, mean {accuracy.mean():.2f} % (dashed)')
    save_figure(figure, path)


def _draw_bars(axes, accuracy: np.ndarray, names: Sequence[str]) -> None:
    axes.barh(range(len(names)), accuracy, color=BLUE, height=0.72)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel='top-1, %', xlim=(0, 101), xticks=range(0, 101, 20), ylim=(len(names) - 0.4, -0.6))
    for place, value in enumerate(accuracy):
        inside = value > 10
        axes.text(value + (-1 if inside else 1), place, f'{value:.1f}', va='center', fontsize=8,
                  ha='right' if inside else 'left', color='white' if inside else GREY)
    axes.axvline(accuracy.mean(), color=_WRONG, linewidth=1.2, linestyle='dashed', zorder=0.9)
    axes.tick_params(axis='y', length=0)
    axes.grid(False)


def _draw_ranking(axes, accuracy: np.ndarray, names: Sequence[str]) -> None:
    ranks = range(1, len(names) + 1)
    axes.fill_between(ranks, accuracy, color=BLUE, alpha=0.25, linewidth=0)
    axes.plot(ranks, accuracy, color=BLUE)
    axes.axhline(accuracy.mean(), color=_WRONG, linewidth=1.2, linestyle='dashed')
    axes.set(xlabel=f'{len(names)} classes, best first', xlim=(1, len(names)), ylabel='top-1, %', ylim=(0, 103))
    ends = f'best: {", ".join(names[:3])}\nworst: {", ".join(names[:-4:-1])}'
    axes.text(0.01, 0.03, ends, transform=axes.transAxes, fontsize=8, color=GREY)


def save_classification(
        output: Union[str, Path],
        labels: torch.Tensor,
        predictions: torch.Tensor,
        names: Optional[Sequence[str]] = None,
) -> None:
    """Plot `confusion.png` and `classes.png` into a run's folder (see `save_confusion`), and log how the classifier in
    its `export/` is loaded, where there is one.
    """
    save_confusion(labels, predictions, Path(output, 'confusion.png'), names)
    save_class_accuracy(labels, predictions, Path(output, 'classes.png'), names)
    if (export := Path(output, 'export')).exists():
        _logger.info(f"Load the classifier with timm.create_model('local-dir:{export}', pretrained=True)")


@plot
def save_retrieval_grid(
        rows: Sequence[Sequence[Tuple[Image.Image, str, Optional[bool]]]],
        path: Union[str, Path],
        title: str = '',
        titles: Tuple[str, str] = ('query', 'nearest →'),
) -> None:
    """Plot queries and their nearest neighbours; the frame tells whether the class is the query's, where it is known.

    Args:
        rows: per query, (image, caption, whether it is of the query's class or None) of the query and then of its
            neighbours, nearest first
        path: PNG file to write
        title: heading
        titles: above the first two columns
    """
    columns = max(map(len, rows))
    figure = new_figure(0.95 * columns + 0.3, 1.22 * len(rows) + 0.7)
    # a gap between queries and neighbours
    grid = figure.add_gridspec(len(rows), columns + 1, width_ratios=[1, 0.15, *[1] * (columns - 1)])
    for y, row in enumerate(rows):
        for x, (image, name, right) in enumerate(row):
            axes = figure.add_subplot(grid[y, x if x == 0 else x + 1])
            draw_image(axes, np.asarray(image))
            plain = x == 0 or right is None
            color = GREY if plain else _RIGHT if right else _WRONG
            axes.spines[:].set(visible=True, color=color, linewidth=1.2 if plain else 3)
            axes.set_xlabel('\n'.join(_shorten(line, 14) for line in name.split('\n')), fontsize=7, labelpad=2,
                            color='black' if x == 0 else GREY if right is not False else _WRONG)
            if y == 0 and x < 2:
                axes.set_title(titles[x], fontsize=8)
    known = any(right is not None for row in rows for _, _, right in row)
    legend = 'green: the class of the query, orange: another' if known else ''
    figure.suptitle(' · '.join(filter(None, (title, legend))), fontsize=9)
    save_figure(figure, path)


@plot
def save_views(rows: Mapping[str, Sequence[np.ndarray]], path: Union[str, Path]) -> None:
    """Plot images, and below each its views.

    Args:
        rows: name -> (H, W, C) uint8 images; of other than 1 and 3 channels the first is drawn
        path: PNG file to write
    """
    columns = max(map(len, rows.values()))
    figure = new_figure(1.5 * columns + 0.3, 1.5 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, images) in zip(axes, rows.items()):
        row[0].set_ylabel(name)
        for cell, image in zip(row, images):
            draw_image(cell, image if image.shape[2] == 3 else image[:, :, 0])
            cell.spines[:].set_visible(False)
    save_figure(figure, path)

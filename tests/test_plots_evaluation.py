"""Plots of the evaluations."""
import sys

import pytest
import torch
from PIL import Image

from timm_cgh.plots.evaluation import save_class_accuracy, save_confusion, save_retrieval_grid


@pytest.mark.parametrize('classes', [1, 3, 25, 120])
@pytest.mark.parametrize('draw', [save_confusion, save_class_accuracy])
def test_plots_of_any_number_of_classes_are_written(draw, classes, tmp_path):
    labels = torch.arange(classes).repeat(4)
    predictions = labels.clone()
    predictions[::3] = -1  # heads that diverged predict no class
    assert draw(labels, predictions, tmp_path / 'a.png', [f'class ${i}' for i in range(classes)])
    with Image.open(tmp_path / 'a.png') as plot:
        assert min(plot.size) > 200


def test_plots_need_no_class_names_and_leave_no_temporary_files(tmp_path):
    labels = torch.tensor([0, 0, 2])  # no image of class 1
    assert save_confusion(labels, labels, tmp_path / 'a.png')
    assert save_class_accuracy(labels, labels, tmp_path / 'b.png')
    image = Image.new('L', (8, 8), 128)
    assert save_retrieval_grid([[(image, '1', True), (image, '1', True), (image, '2', False)]], tmp_path / 'c.png')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'b.png', 'c.png']


def test_no_plots_are_written_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    labels = torch.tensor([0, 1])
    assert not save_confusion(labels, labels, tmp_path / 'a.png')
    assert not save_class_accuracy(labels, labels, tmp_path / 'a.png')
    assert not list(tmp_path.iterdir())

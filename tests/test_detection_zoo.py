"""A Mask R-CNN with a pyramid on the smallest architecture of each of timm's model modules (`-m slow`)."""
import os
import time
from typing import NamedTuple

import pytest
import torch

from timm_cgh.errors import InputError
from timm_cgh.eval.detection import create_detector
from timm_cgh.eval.detection.maps import last_stage, measure_maps
from timm_cgh.models import create_backbone
from zoo import SMALLEST, write_row

QUICK = ('convnext', 'mobilenetv3', 'regnet', 'resnet', 'vision_transformer', 'vision_transformer_relpos')


class Row(NamedTuple):
    """One line of the table."""
    module: str
    architecture: str
    multiple: str  # px that images are padded to a multiple of, or the one size
    strides: str  # px, of the maps that the pyramid is made from
    unused_percent: float  # of the parameters, behind the last map
    c4: bool  # whether the model splits
    seconds: float


def create_any_size(architecture, img_size):
    try:
        return create_backbone(architecture, img_size=img_size, dynamic_img_size=True)
    except TypeError as error:
        assert 'dynamic_img_size' in str(error)
        return create_backbone(architecture, img_size=img_size)


def check_module(module):
    """One training step and one test with boxes and masks; every trained parameter gets a gradient.

    Raises:
        AssertionError: a promise does not hold
    """
    began = time.perf_counter()
    torch.manual_seed(0)
    architecture, size = SMALLEST[module]
    backbone = create_any_size(architecture, size).eval()
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}  # by timm itself
    config = dict(input_size=(3, size, size), mean=(0.5,) * 3, std=(0.25,) * 3)
    layout = measure_maps(backbone, config['input_size'])
    detector = create_detector(
        backbone, config, ['cat', 'dog'], head='fpn', masks=True, test_size=size, max_size=size, channels=32, rois=16,
        train_proposals=(200, 100), test_proposals=(100, 50))
    images = [torch.rand(3, size, size), torch.rand(3, size - 8, size)]
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[0, 5:size // 2, 5:size // 2] = masks[1, 20:size - 10, 10:30] = 1
    boxes = torch.tensor([[5.0, 5, size // 2, size // 2], [10, 20, 30, size - 10]])
    targets = [dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=masks[:, :i.shape[1]]) for i in images]
    losses = detector.train()(images, targets)
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    missing = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert missing == frozen | set(detector.unused), missing ^ (frozen | set(detector.unused))
    with torch.no_grad():
        found = detector.eval()(images[1:])[0]
    assert all(value.isfinite().all() for value in found.values())
    assert found['masks'].shape == (len(found['boxes']), 1, size - 8, size)
    try:
        last_stage(backbone, layout, 3)
        splits = True
    except InputError:
        splits = False
    total = sum(p.numel() for p in backbone.parameters())
    strides = sorted({layout.maps[i].stride for i in detector.backbone.indices})
    return Row(
        module, architecture, f"{'only ' * layout.fixed}{layout.multiple}", ' '.join(f'{s:g}' for s in strides),
        round(100 * sum(detector.unused.values()) / total, 1), splits, round(time.perf_counter() - began, 1))


@pytest.mark.parametrize('module', QUICK)
def test_family_trains_and_tests_a_mask_rcnn(module):
    check_module(module)


@pytest.mark.slow
@pytest.mark.parametrize('module', SMALLEST)
def test_every_module_trains_and_tests_a_mask_rcnn(module):
    """Writes its line of the table to the file that TIMM_CGH_DETECTION_ZOO_CSV names (results/detection_zoo.csv)."""
    row = check_module(module)
    if os.environ.get('TIMM_CGH_DETECTION_ZOO_CSV'):
        write_row(row, os.environ['TIMM_CGH_DETECTION_ZOO_CSV'])

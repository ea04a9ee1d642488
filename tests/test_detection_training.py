"""Fine-tuning of a detector: it overfits a few images; parameter groups, learning rate, batch statistics."""
from functools import partial

import pytest
import timm
import torch
from torch import nn

from timm_cgh.eval.detection import (
    Annotations, DetectionImages, create_detector, evaluate_detections, find_objects, open_annotations, param_groups,
    rate_factor, recompute_batch_norm, split_steps, training_batches, training_objects, training_transform)

CONFIG = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(scope='module')
def scenes():
    return open_annotations('digits', None, 'validation')


def first(annotations, count):
    """The first images of a data set, and their objects."""
    images = annotations.content['images'][:count]
    numbers = {image['id'] for image in images}
    objects = [a for a in annotations.content['annotations'] if a['image_id'] in numbers]
    return Annotations(dict(annotations.content, images=images, annotations=objects), annotations.read)


def train(annotations, name, steps, batch_size, side, lr=0.02, **options):
    """A detector that has been trained from random weights, its losses by step, and the batches of any steps."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0).eval()
    detector = create_detector(
        backbone, CONFIG, annotations.classes, test_size=side, max_size=2 * side, rois=64, train_proposals=(1000, 500),
        test_proposals=(500, 200), **options)
    images = DetectionImages(annotations, training_objects(annotations)[0], masks=options.get('masks', False))
    batches = partial(training_batches, images, training_transform([side], 2 * side, 0.0), batch_size=batch_size)
    optimizer = torch.optim.SGD(param_groups(detector, 1e-4), lr=lr, momentum=0.9)
    detector.train()
    losses = []
    for step, batch in enumerate(batches(range(steps))):
        for group in optimizer.param_groups:
            group['lr'] = lr * rate_factor(step, [steps * 3 // 4], warmup_iterations=20)
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = sum(detector(*batch).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return detector, losses, batches


def overfit(annotations, steps, **options):
    """AP50 of boxes and masks on the images that the detector was trained on."""
    detector, _, batches = train(annotations, 'resnet10t', steps, batch_size=4, side=96, **options)
    recompute_batch_norm(detector, batches(range(10)))
    detections = find_objects(detector, annotations, list(range(1, 11)))
    precisions = evaluate_detections(annotations, detections, masks=options.get('masks', False))
    return {kind: precision.summary()['AP50'] for kind, precision in precisions.items()}


def test_losses_fall(scenes):
    _, losses, _ = train(first(scenes, 2), 'test_resnet', 15, batch_size=2, side=64, head='fpn', channels=32)
    assert all(loss < 0.7 * losses[0] for loss in losses[-3:])


@pytest.mark.slow
def test_fpn_overfits_eight_scenes(scenes):
    found = overfit(first(scenes, 8), 120, head='fpn', masks=True, channels=64)
    assert found['bbox'] >= 90 and found['segm'] >= 90


@pytest.mark.slow
def test_c4_overfits_four_scenes(scenes):
    assert overfit(first(scenes, 4), 200, head='c4', anchor_sizes=[16, 32, 48, 64, 96])['bbox'] >= 90


def test_weight_decay_spares_norms_alone():
    backbone = timm.create_model('test_convnext', num_classes=0).eval()
    detector = create_detector(backbone, CONFIG, ['cat'], head='c4', test_size=64, max_size=128)
    decayed, spared = param_groups(detector, 1e-4)
    assert (decayed['weight_decay'], spared['weight_decay']) == (1e-4, 0)
    norms = [m for m in detector.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    frozen = set(detector.unused)
    wanted = {
        id(p) for m in norms for p in m.parameters()} - {
        id(p) for name, p in backbone.named_parameters() if name in frozen}
    assert {id(p) for p in spared['params']} == wanted and len(wanted) > 10
    ids = [id(p) for p in decayed['params'] + spared['params']]
    assert sorted(ids) == sorted(id(p) for p in detector.parameters() if p.requires_grad)


def test_learning_rate_is_that_of_the_protocol():
    rates = [0.02 * rate_factor(step, [18000, 22000]) for step in (0, 50, 100, 17999, 18000, 21999, 22000, 23999)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert rate_factor(0, [10], warmup_iterations=0) == 1


def test_steps_are_split_at_the_multiples_of_intervals():
    assert list(split_steps(range(3, 23), 5, 8)) == [
        range(3, 5), range(5, 8), range(8, 10), range(10, 15), range(15, 16), range(16, 20), range(20, 23)]
    assert list(split_steps(range(0, 7), 5, 0)) == [range(0, 5), range(5, 7)]
    assert list(split_steps(range(7, 7), 5)) == []


def test_recomputed_statistics_are_the_mean_over_the_batches(scenes):
    annotations = first(scenes, 6)
    backbone = timm.create_model('test_resnet', num_classes=0).eval()
    detector = create_detector(backbone, CONFIG, annotations.classes, test_size=64, max_size=128, channels=32, rois=8)
    images = DetectionImages(annotations, training_objects(annotations)[0])
    batches = partial(training_batches, images, training_transform([64], 128, 0.0), batch_size=2)
    seen = []
    norm = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].mean(dim=(0, 2, 3))))
    norm.running_mean.fill_(7)
    recompute_batch_norm(detector, batches(range(5)))
    handle.remove()
    assert len(seen) == 5 and norm.momentum == 0.1
    assert torch.allclose(norm.running_mean, torch.stack(seen).mean(dim=0), atol=1e-5)
    before = norm.running_mean.clone()
    recompute_batch_norm(detector, None)
    assert torch.equal(norm.running_mean, before)


def test_detections_of_an_image_do_not_depend_on_the_others(scenes):
    backbone = timm.create_model('test_resnet', num_classes=0).eval()
    detector = create_detector(
        backbone, CONFIG, scenes.classes, head='fpn', test_size=64, max_size=128, channels=32, test_proposals=(100, 50))
    some, one = first(scenes, 3), first(scenes, 1)
    found = find_objects(detector, some, list(range(1, 11)))
    alone = find_objects(detector, one, list(range(1, 11)))
    number = one.content['images'][0]['id']
    assert alone and [d for d in found if d['image_id'] == number] == alone
    assert [d['image_id'] for d in found] == sorted(d['image_id'] for d in found)
    assert find_objects(detector, one, [None] * 10) == []

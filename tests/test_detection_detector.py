"""Detectors: the maps of a backbone, C4's split, the parts that differ from torchvision's, the file of a detector."""
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from input_errors import refused
from timm_cgh.eval.detection import create_detector, load_detector, save_detector
from timm_cgh.eval.detection.maps import SimplePyramid, last_stage, measure_maps
from timm_cgh.eval.detection.parts import Anchors, RegionAlign, box_losses, mask_loss, paste_mask

CONFIG = dict(input_size=(3, 64, 64), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
SMALL = dict(test_size=64, max_size=128, channels=32, rois=16, train_proposals=(200, 100), test_proposals=(100, 50))


def make_detector(name='test_resnet', head='fpn', classes=('cat', 'dog'), seed=0, **options):
    torch.manual_seed(seed)
    backbone = timm.create_model(name, num_classes=0).eval()
    return create_detector(backbone, CONFIG, classes, head=head, **{**SMALL, **options})


def make_batch(masks=True):
    """Two images of different sizes and their objects."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 80), (70, 64))]
    targets = []
    for image in images:
        target = dict(boxes=torch.tensor([[5.0, 5, 40, 40], [10, 20, 30, 60]]), labels=torch.tensor([1, 2]))
        if masks:
            target['masks'] = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
            target['masks'][0, 5:40, 5:40] = target['masks'][1, 20:60, 10:30] = 1
        targets.append(target)
    return images, targets


# ---- maps

@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnext50_32x4d', 'regnetx_002', 'regnety_002'])
def test_trunk_and_last_stage_make_the_features_of_the_whole_model(name):
    backbone = timm.create_model(name, num_classes=0).eval()
    layout = measure_maps(backbone, (3, 224, 224))
    assert (layout.multiple, layout.fixed, layout.maps[-2].stride, layout.maps[-1].stride) == (32, False, 16, 32)
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        before, = backbone.forward_intermediates(images, indices=[-2], intermediates_only=True, stop_early=True)
        assert torch.equal(last_stage(backbone, layout, 3)(before), backbone.forward_features(images))


@pytest.mark.parametrize('name, masks', [('resnet18', False), ('regnetx_002', True), ('test_convnext', True)])
def test_c4_trains_every_parameter_of_the_backbone(name, masks):
    detector = make_detector(name, 'c4', masks=masks).train()
    images, targets = make_batch()
    losses = detector(images, targets)
    assert set(losses) == {'loss_objectness', 'loss_rpn_box_reg', 'loss_classifier', 'loss_box_reg',
                           *(['loss_mask'] if masks else [])}
    sum(losses.values()).backward()
    body = detector.backbone.body
    optimized = {id(p) for p in detector.parameters()}
    assert all(id(p) in optimized for p in body.parameters())
    assert {n for n, p in body.named_parameters() if p.grad is None} == set(detector.unused)
    assert set(detector.unused) == ({'head.norm.weight', 'head.norm.bias'} if 'convnext' in name else set())
    weights = [v.data_ptr() for name, v in detector.state_dict().items() if name.endswith('weight')]
    assert len(set(weights)) == len(weights)  # the shared stage is there once


@pytest.mark.parametrize('name', ['test_vit', 'mobilenetv3_small_050', 'densenet121'])
def test_models_that_do_not_split_are_refused_for_c4(name):
    backbone = timm.create_model(name, num_classes=0).eval()
    with refused('head', 'take fpn'):
        create_detector(backbone, CONFIG, ['cat'], head='c4', **SMALL)


@pytest.mark.parametrize('name, kwargs, multiple, strides', [
    ('test_resnet', {}, 32, [2, 4, 8, 16, 32]),
    ('resnet18_s1', {}, 32, [1, 1, 2, 4, 8]),
    ('test_vit', dict(dynamic_img_size=True), 32, [16]),
    ('vit_tiny_patch16_224', dict(patch_size=14, dynamic_img_size=True, depth=1), 28, [14]),
    ('inception_v3', {}, 32, [2, 4, 8, 16, 32]),
])
def test_strides_and_the_multiple_to_pad_to_are_measured(name, kwargs, multiple, strides):
    backbone = timm.create_model(name, num_classes=0, **kwargs).eval()
    layout = measure_maps(backbone, (3, 224, 224))
    assert (layout.multiple, layout.fixed) == (multiple, False)
    assert sorted({m.stride for m in layout.maps}) == sorted(set(strides))


def test_a_model_of_one_size_takes_images_of_that_size():
    backbone = timm.create_model('test_vit_relpos', img_size=64, num_classes=0).eval()
    layout = measure_maps(backbone, (3, 64, 64))
    assert layout.fixed and layout.multiple == 64
    with refused('max_size', '128', '64 px only'):
        create_detector(backbone, CONFIG, ['cat'], head='fpn', **SMALL)
    detector = create_detector(backbone, CONFIG, ['cat'], head='fpn', **{**SMALL, 'max_size': 64}).eval()
    with torch.no_grad():
        assert len(detector([torch.rand(3, 100, 70)])[0]['boxes'])


def test_pyramid_takes_the_deepest_map_of_each_stride():
    detector = make_detector('tresnet_m')  # two maps of stride 4
    layout = measure_maps(detector.backbone.body.eval(), (3, 64, 64))
    assert [m.stride for m in layout.maps] == [4, 4, 8, 16, 32] and detector.backbone.indices == [1, 2, 3, 4]
    assert detector.rpn.anchor_generator.strides == (4, 8, 16, 32, 64)
    with refused('anchor_sizes', '2 of them for 5 maps'):
        make_detector(anchor_sizes=[8, 16])


def test_simple_pyramid_has_four_scales_and_one_for_the_rpn():
    maps = SimplePyramid(64, 24)(dict(x=torch.randn(2, 64, 8, 6)))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(32, 24), (16, 12), (8, 6), (4, 3), (2, 2)]
    assert all(m.shape[1] == 24 for m in maps.values())


# ---- parts

def test_anchors_keep_their_area_and_ratio_at_the_given_stride():
    anchors, = Anchors([(8,)], [14])(ImageList(torch.zeros(1, 3, 50, 60), [(50, 60)]), [torch.zeros(1, 8, 4, 5)])
    assert anchors.shape == (4 * 5 * 3, 4) and anchors.dtype == torch.float32
    sides = anchors[:, 2:] - anchors[:, :2]
    assert sides.prod(dim=1).tolist() == pytest.approx([64] * 60, rel=1e-5)
    assert (sides[:3, 1] / sides[:3, 0]).tolist() == pytest.approx([0.5, 1, 2])
    centres = (anchors[:, 2:] + anchors[:, :2]) / 2
    assert torch.allclose(centres[::3][:6], torch.tensor([[0.0, 0], [14, 0], [28, 0], [42, 0], [56, 0], [0, 14]]),
                          atol=1e-5)


def test_region_align_is_half_pixel_aligned_and_keeps_nothing_of_a_batch():
    pool = RegionAlign([4, 8], 7)
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)  # value = column
    boxes = [torch.tensor([[16.0, 16, 48, 48]])]
    first = pool({'0': ramp, '1': ramp[..., ::2, ::2]}, boxes, [(128, 128)])
    # the centre of bin k of a box from column 4 to column 12 lies at 4 + (k + 0.5) 8 / 7, half a pixel off the index
    assert first[0, 0, 0].tolist() == pytest.approx([4 + (k + 0.5) * 8 / 7 - 0.5 for k in range(7)], abs=1e-4)
    pool({'0': ramp[..., :16], '1': ramp[..., ::2, :16:2]}, boxes, [(70, 300)])
    again = pool({'0': ramp, '1': ramp[..., ::2, ::2]}, boxes, [(128, 128)])
    assert torch.equal(first, again)


def test_region_align_sends_large_regions_to_coarse_maps():
    maps = {str(i): torch.full((2, 1, 128 >> i, 128 >> i), float(i)) for i in range(4)}
    boxes = [torch.tensor([[0.0, 0, side, side] for side in (20, 111, 113, 225, 500)]), torch.zeros(0, 4)]
    pooled = RegionAlign([4, 8, 16, 32], 7)(maps, boxes, [(512, 512)] * 2)
    assert pooled[:, 0, 3, 3].tolist() == [0, 0, 1, 2, 3] and pooled.shape == (5, 1, 7, 7)


def test_losses_are_l1_over_all_sampled_regions():
    generator = torch.Generator().manual_seed(0)
    logits, deltas = torch.randn(6, 3, generator=generator), torch.randn(6, 12, generator=generator)
    labels = [torch.tensor([0, 2, 1]), torch.tensor([0, 0, 2])]
    targets = [torch.randn(3, 4, generator=generator) for _ in range(2)]
    losses = box_losses(logits, deltas, labels, targets)
    classes, wanted = torch.cat(labels), torch.cat(targets).double()
    total = sum(
        (deltas[i, 4 * c:4 * c + 4].double() - wanted[i]).abs().sum() for i, c in enumerate(classes.tolist()) if c)
    assert losses['loss_box_reg'].item() == pytest.approx(total.item() / 6)
    assert losses['loss_classifier'].item() == pytest.approx(F.cross_entropy(logits.double(), classes).item())


def test_rpn_loss_is_l1():
    detector = make_detector().train()
    labels = [torch.tensor([1.0, 0.0, -1.0, 0.0])]
    deltas = torch.tensor([[0.01, 0.0, 0.0, 2.0]] * 4)
    losses = detector.rpn.compute_loss(torch.zeros(4, 1), deltas, labels, [torch.zeros(4, 4)])
    assert losses[0].item() == pytest.approx(np.log(2)) and losses[1].item() == pytest.approx(2.01 / 3)


def test_a_mask_comes_back_from_its_targets_where_it_was():
    rng, size = np.random.default_rng(0), 28
    for _ in range(20):
        y, x = np.mgrid[:100, :100] + 0.5
        true = torch.tensor(((x - rng.uniform(40, 60)) / 11) ** 2 + ((y - rng.uniform(40, 60)) / 8) ** 2 <= 1)
        rows, columns = torch.where(true)
        box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        rois = torch.cat((torch.zeros(1), box))[None]
        target = roi_align(true[None, None].float(), rois, size, aligned=True)[0, 0]
        # logits of that mask are those of the least loss: the targets of mask_loss are at the same place
        logits = (target[None, None] - 0.5) * 40
        loss = mask_loss(logits, [box[None]], [true[None].byte()], [torch.tensor([0])], [torch.tensor([0])])
        shifted = mask_loss(logits.roll(1, -1), [box[None]], [true[None].byte()], [torch.tensor([0])],
                            [torch.tensor([0])])
        assert loss < 0.05 < shifted
        pasted = paste_mask(target, box, (100, 100)) > 0.5
        assert (pasted & true).sum() / (pasted | true).sum() > 0.98
    assert mask_loss(torch.zeros(0, 3, 28, 28), [], [], [], []) == 0


@pytest.mark.parametrize('head', ['c4', 'fpn'])
def test_under_autocast_boxes_and_scores_stay_float32(head):
    detector = make_detector(head=head, masks=True)
    images, targets = make_batch()
    with torch.autocast('cpu', torch.bfloat16):
        losses = detector.train()(images, targets)
        with torch.no_grad():
            found = detector.eval()(images[:1])[0]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(found[name].dtype == torch.float32 for name in ('boxes', 'scores', 'masks')) and len(found['boxes'])


# ---- the whole

@pytest.mark.parametrize('head', ['c4', 'fpn'])
def test_detections_are_in_pixels_of_the_image_and_inside_it(head):
    detector = make_detector(head=head, masks=True).eval()
    with torch.no_grad():
        found = detector([torch.rand(3, 90, 200)])[0]
    boxes = found['boxes']
    assert len(boxes) and boxes.min() >= 0 and (boxes.max(dim=0).values <= torch.tensor([200.0, 90, 200, 90])).all()
    assert found['masks'].shape == (len(boxes), 1, 90, 200) and found['labels'].min() >= 1
    assert boxes[:, 2].max() > 128  # beyond the sides of the resized image


def test_file_of_a_detector_gives_it_back(tmp_path):
    detector = make_detector(masks=True).eval()
    path = tmp_path / 'detector.safetensors'
    save_detector(detector, path)
    loaded = load_detector(path)
    assert loaded.classes == ['cat', 'dog'] and loaded.config['masks'] and not loaded.training
    image = torch.rand(3, 80, 70)
    with torch.no_grad():
        a, b = detector([image])[0], loaded([image])[0]
    assert all(torch.equal(a[name], b[name]) for name in a)
    with refused(str(tmp_path / 'missing.safetensors'), 'not the file of a detector'):
        load_detector(tmp_path / 'missing.safetensors')
    from safetensors.torch import save_file
    save_file({'weight': torch.zeros(1)}, tmp_path / 'other.safetensors')
    with refused(str(tmp_path / 'other.safetensors'), 'not the file of a detector'):
        load_detector(tmp_path / 'other.safetensors')

"""Detectors on a timm backbone: C4 (Tab. 4) and FPN, with or without masks; and the file that holds one."""
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from timm.models import get_model_args
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from timm_cgh.errors import InputError
from timm_cgh.files import atomic_path
from timm_cgh.models.backbone import create_backbone

from .maps import BackboneMaps, MapLayout, SimplePyramid, last_stage, measure_maps
from .parts import (
    Anchors, Heads, ImageBatch, L1ProposalNetwork, MaskPredictor, ProposalHead, RegionAlign, RegionPredictor)

__all__ = ['create_detector', 'load_detector', 'save_detector']

_C4_ANCHORS = (32, 64, 128, 256, 512)  # px, all of them at each place; FPN: one for each map, 8 times its stride
_METADATA = 'timm_cgh_detector'  # of the file


class SharedStage(nn.Module):
    """C4's box head: the backbone's own last stage, and an extra batch norm (MoCo's `Res5ROIHeadsExtraNorm`)."""

    def __init__(self, stage: nn.Module, channels: int):
        super().__init__()
        self.stage = [stage]  # in a list: registered once, under its name in the backbone
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(R, C, 14, 14) cut out of the last map but one -> (R, channels, 7, 7)."""
        return self.norm(self.stage[0](x))


class _Parts(NamedTuple):
    """What C4 and FPN differ in."""
    backbone: BackboneMaps
    strides: List[float]  # of the maps that the RPN sees, px
    channels: int  # of these maps
    heads: Dict[str, Any]  # of torchvision's RoIHeads


def _box_head(channels: int) -> nn.Module:
    head = TwoMLPHead(channels * 7 ** 2, 4 * channels)
    for layer in (head.fc6, head.fc7):  # detectron2's; torch's own has a third of the variance
        nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(layer.bias)
    return head


def _c4_parts(body: nn.Module, layout: MapLayout, stage: nn.Module, classes: int, masks: bool, channels: int) -> _Parts:
    before, last = layout.maps[-2:]
    pool, head = RegionAlign([before.stride], 14), SharedStage(stage, last.channels)
    predictor = RegionPredictor(last.channels, classes)
    heads: Dict[str, Any] = dict(box_roi_pool=pool, box_head=head, box_predictor=predictor)
    if masks:  # `forward`, not the module, which would be registered twice
        heads.update(
            mask_roi_pool=pool, mask_head=head.forward, mask_predictor=MaskPredictor(last.channels, channels, classes))
    return _Parts(BackboneMaps(body, [before.place]), [before.stride], before.channels, heads)


def _fpn_parts(body: nn.Module, layout: MapLayout, classes: int, masks: bool, channels: int) -> _Parts:
    deepest = {m.stride: m for m in layout.maps if m.stride >= 4} or {0: layout.maps[-1]}
    maps = sorted(deepest.values(), key=lambda m: m.stride)
    strides = [m.stride for m in maps]
    if len(maps) > 1:
        neck: nn.Module = FeaturePyramidNetwork(
            [m.channels for m in maps], channels, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)
    else:
        neck = SimplePyramid(maps[0].channels, channels)
        strides = [scale * strides[0] for scale in (0.25, 0.5, 1, 2)]
    heads: Dict[str, Any] = dict(
        box_roi_pool=RegionAlign(strides, 7),
        box_head=_box_head(channels),
        box_predictor=RegionPredictor(4 * channels, classes),
    )
    if masks:
        heads.update(
            mask_roi_pool=RegionAlign(strides, 14),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
            mask_predictor=MaskPredictor(channels, channels, classes),
        )
    return _Parts(BackboneMaps(body, [m.place for m in maps], neck), [*strides, 2 * strides[-1]], channels, heads)


def _freeze_unused(detector: GeneralizedRCNN, layout: MapLayout, in_chans: int) -> Dict[str, int]:
    """Freeze what no map depends on (layers behind the last one), which DDP would wait for; gives names and sizes."""
    body = detector.backbone.body
    maps = detector.backbone(torch.zeros(1, in_chans, layout.side, layout.side))
    outputs = list(maps.values())
    if isinstance(detector.roi_heads.box_head, SharedStage):
        outputs += [detector.roi_heads.box_head(outputs[0])]
    named = {name: p for name, p in body.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(sum(m.sum() for m in outputs), list(named.values()), allow_unused=True)
    unused = {name: p for (name, p), grad in zip(named.items(), grads) if grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    return {name: p.numel() for name, p in unused.items()}


def create_detector(
        backbone: nn.Module,
        data_config: Mapping[str, Any],
        classes: Sequence[str],
        *,
        head: str = 'fpn',
        masks: bool = False,
        test_size: int = 800,
        max_size: int = 1333,
        anchor_sizes: Optional[Sequence[float]] = None,
        channels: int = 256,
        rois: int = 512,
        train_proposals: Optional[Tuple[int, int]] = None,
        test_proposals: Optional[Tuple[int, int]] = None,
) -> GeneralizedRCNN:
    """Faster or Mask R-CNN by the settings of MoCo's detection protocol, assembled from torchvision's parts.

    Args:
        backbone: plain timm model on the CPU in eval mode; it becomes a part of the detector
        data_config: `input_size` that it was built for, `mean`, `std`
        classes: names, without background
        head: `c4`: the backbone's last stage processes each RoI; `fpn`: feature pyramid, or ViTDet's simple pyramid for
            models whose maps have one resolution
        masks: add Mask R-CNN's branch
        test_size, max_size: short side of test images, and limit of long sides, px
        anchor_sizes: square roots of the anchors' areas, px: all at each place (c4), or one for each map (fpn)
        channels: of the pyramid and the mask head; a quarter of the box head's width
        rois: sampled per training image
        train_proposals, test_proposals: of the RPN, before and after NMS; default: detectron2's for this head

    Returns:
        a module that takes a list of (C, H, W) images in [0, 1], and in training their targets, as torchvision's
        detectors do. Its `classes` are the names, `config` the arguments given here, `unused` names and sizes of the
        backbone's parameters that the maps do not depend on, which are frozen

    Raises:
        InputError: `head` c4 for a backbone that cannot be split; sizes or anchors that do not fit the model
    """
    config = {name: value for name, value in locals().items() if name != 'backbone'}
    in_chans, num_classes = data_config['input_size'][0], len(classes) + 1
    layout = measure_maps(backbone, data_config['input_size'])
    if layout.fixed and max_size > layout.multiple:
        raise InputError(f'max_size={max_size}: {type(backbone).__name__} takes {layout.multiple} px only')
    if head == 'c4':
        parts = _c4_parts(backbone, layout, last_stage(backbone, layout, in_chans), num_classes, masks, channels)
        sizes: List[Sequence[float]] = [anchor_sizes or _C4_ANCHORS]
    else:
        parts = _fpn_parts(backbone, layout, num_classes, masks, channels)
        sizes = [(size,) for size in anchor_sizes or [8 * stride for stride in parts.strides]]
    if len(sizes) != len(parts.strides):
        raise InputError(f'anchor_sizes: {len(sizes)} of them for {len(parts.strides)} maps, give one for each')
    before, after = (dict(training=n, testing=m) for n, m in zip(
        train_proposals or ((12000, 2000) if head == 'c4' else (2000, 1000)),
        test_proposals or ((6000, 1000) if head == 'c4' else (1000, 1000))))
    anchors = Anchors(sizes, parts.strides)
    detector = GeneralizedRCNN(
        backbone=parts.backbone,
        rpn=L1ProposalNetwork(
            anchors, ProposalHead(parts.channels, anchors.num_anchors_per_location()[0]), fg_iou_thresh=0.7,
            bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=before,
            post_nms_top_n=after, nms_thresh=0.7),
        roi_heads=Heads(
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=rois, positive_fraction=0.25,
            bbox_reg_weights=(10, 10, 5, 5), score_thresh=0.05, nms_thresh=0.5, detections_per_img=100, **parts.heads),
        transform=ImageBatch(
            test_size, max_size, list(data_config['mean']), list(data_config['std']), size_divisible=layout.multiple),
    )
    detector.classes, detector.config = list(classes), config
    detector.unused = _freeze_unused(detector, layout, in_chans)
    return detector


def save_detector(detector: GeneralizedRCNN, path: Union[str, Path]) -> None:
    """Write a detector as a safetensors file; its metadata are the arguments of `create_detector`, and of timm's
    `create_model` for the backbone.
    """
    body = detector.backbone.body
    metadata = dict(detector.config, model=body.pretrained_cfg['architecture'], model_kwargs=get_model_args(body))
    with atomic_path(path) as temporary:
        save_model(detector, str(temporary), metadata={_METADATA: json.dumps(metadata)})


def load_detector(path: Union[str, Path]) -> GeneralizedRCNN:
    """The detector in a file written by `save_detector`, in eval mode on the CPU.

    Raises:
        InputError: no such file, or not one of a detector
    """
    try:
        with safe_open(path, framework='pt') as file:
            config = json.loads((file.metadata() or {})[_METADATA])
    except (KeyError, OSError, SafetensorError) as error:
        raise InputError(f'{path}: not the file of a detector ({error})') from error
    model, model_kwargs = config.pop('model'), config.pop('model_kwargs')
    detector = create_detector(create_backbone(model, **model_kwargs).eval(), **config)
    load_model(detector, str(path))
    return detector.eval()

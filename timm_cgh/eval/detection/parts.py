"""torchvision's detector parts, overridden where MoCo's protocol, half-pixel alignment or autocast ask for it."""
import math
from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper
from torchvision.transforms import v2

__all__ = [
    'Anchors', 'Heads', 'ImageBatch', 'L1ProposalNetwork', 'MaskPredictor', 'ProposalHead', 'RegionAlign',
    'RegionPredictor']


class Anchors(AnchorGenerator):
    """Anchors at the maps' own strides.

    Overrides `generate_anchors`, which rounds them to whole pixels (a third of the area of an 8 px anchor), and
    `forward`, which guesses strides from the sizes of padded image and map and takes the map's dtype (bfloat16).

    Args:
        sizes: for each map, square roots of the anchors' areas, px
        strides: of the maps, px
    """

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[float]):
        super().__init__(tuple(map(tuple, sizes)), ((0.5, 1.0, 2.0),) * len(sizes))  # height / width
        self.strides = tuple(strides)

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=torch.device('cpu')):
        """(A, 4) boxes around 0."""
        scales, roots = (torch.as_tensor(values, dtype=dtype, device=device) for values in (scales, aspect_ratios))
        roots = roots.sqrt()
        sides = torch.stack((scales / roots[:, None], scales * roots[:, None]), dim=-1).flatten(0, 1)  # width, height
        return torch.cat((-sides, sides), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """(N, 4) float32 boxes of each image."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors([m.shape[-2:] for m in feature_maps], [(s, s) for s in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """Overrides `forward`: boxes in bfloat16 have steps of 4 px beyond 512."""

    def forward(self, x: List[torch.Tensor]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        logits, deltas = super().forward(x)
        return [m.float() for m in logits], [m.float() for m in deltas]


class L1ProposalNetwork(RegionProposalNetwork):
    """Overrides `compute_loss`, whose smooth L1 has a fixed beta of 1/9: detectron2's is 0."""

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        """Losses of objectness and boxes."""
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat((positive, negative))
        labels, targets = torch.cat(labels), torch.cat(regression_targets)
        box_loss = F.l1_loss(pred_bbox_deltas[positive], targets[positive], reduction='sum') / len(sampled)
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled]), box_loss


class RegionAlign(nn.Module):
    """Half-pixel aligned RoIAlign with an adaptive number of samples (detectron2's `ROIAlignV2`).

    In place of `MultiScaleRoIAlign`, which is not aligned, and guesses the maps' scales from the first batch for good.

    Args:
        strides: of the maps, px, finest first; other maps (`pool`) are left out
        size: of the output
    """

    def __init__(self, strides: Sequence[float], size: int):
        super().__init__()
        self.strides = tuple(strides)
        self.size = size
        self.level_of = LevelMapper(*(round(math.log2(s)) for s in (strides[0], strides[-1])))  # FPN paper, Eq. 1

    def forward(self, features: Dict[str, torch.Tensor], boxes: List[torch.Tensor], image_shapes) -> torch.Tensor:
        """Maps and (R_i, 4) boxes of each image -> (R, C, size, size) float32."""
        rois = torch.cat([F.pad(b.float(), (1, 0), value=image) for image, b in enumerate(boxes)])
        levels = self.level_of(boxes).clamp(max=len(self.strides) - 1)
        maps = list(features.values())
        pooled = rois.new_zeros(len(rois), maps[0].shape[1], self.size, self.size)
        for level, stride in enumerate(self.strides):
            chosen = torch.where(levels == level)[0]
            pooled[chosen] = roi_align(
                maps[level].float(), rois[chosen], self.size, 1 / stride, sampling_ratio=0, aligned=True)
        return pooled


class RegionPredictor(FastRCNNPredictor):
    """Overrides the initialisation, detectron2's here, and `forward`: in float32, of vectors or maps (C4)."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """(R, C) or (R, C, H, W) -> (R, K), (R, 4 K)."""
        x = x.mean(dim=(2, 3)) if x.ndim == 4 else x
        return self.cls_score(x).float(), self.bbox_pred(x).float()


class MaskPredictor(MaskRCNNPredictor):
    """Overrides the initialisation, detectron2's here, and `forward`: in float32."""

    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__(in_channels, channels, num_classes)
        nn.init.normal_(self.mask_fcn_logits.weight, std=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(R, C, H, W) -> (R, K, 2 H, 2 W)."""
        return super().forward(x).float()


def box_losses(
        logits: torch.Tensor,
        deltas: torch.Tensor,
        labels: List[torch.Tensor],
        targets: List[torch.Tensor],
) -> Dict[str, torch.Tensor]:
    """Cross-entropy over all sampled RoIs, and L1 of the deltas of the positive ones' own classes, divided by all.

    (R, K), (R, 4 K), and of each image (R_i,) labels, 0 for background, and (R_i, 4) targets.
    """
    classes, targets = torch.cat(labels), torch.cat(targets)
    positive = torch.where(classes > 0)[0]
    own = deltas.view(len(deltas), -1, 4)[positive, classes[positive]]
    return dict(
        loss_classifier=F.cross_entropy(logits, classes),
        loss_box_reg=F.l1_loss(own, targets[positive], reduction='sum') / len(classes),
    )


def mask_loss(
        logits: torch.Tensor,
        boxes: List[torch.Tensor],
        masks: List[torch.Tensor],
        labels: List[torch.Tensor],
        matched: List[torch.Tensor],
) -> torch.Tensor:
    """Binary cross-entropy of the true class's mask of each positive RoI; 0 without any.

    In place of `maskrcnn_loss`, whose targets are shifted by half a pixel against the boxes. (R, K, M, M) logits; of
    each image (R_i, 4) boxes, (N_i, H, W) masks and (N_i,) labels of true objects, (R_i,) which of them an RoI is of.
    """
    if not len(logits):
        return logits.sum() * 0
    targets = torch.cat([
        roi_align(m[:, None].float(), torch.cat((i[:, None].float(), b), dim=1), logits.shape[-1], aligned=True)[:, 0]
        for m, b, i in zip(masks, boxes, matched)])
    classes = torch.cat([label[i] for label, i in zip(labels, matched)])
    own = logits[torch.arange(len(logits), device=logits.device), classes]
    return F.binary_cross_entropy_with_logits(own, (targets >= 0.5).float())


def paste_mask(mask: torch.Tensor, box: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """(M, M) probabilities inside a box (4,) -> (H, W) in the image, 0 around the box."""
    x1, y1, x2, y2 = box.tolist()
    rows, columns = slice(int(y1), min(math.ceil(y2), size[0])), slice(int(x1), min(math.ceil(x2), size[1]))
    ys, xs = (
        (torch.arange(part.start, part.stop, device=mask.device) + 0.5 - low) / (high - low) * 2 - 1
        for part, low, high in ((rows, y1, y2), (columns, x1, x2)))
    canvas = mask.new_zeros(size)
    grid = torch.stack(torch.meshgrid(xs, ys, indexing='xy'), dim=-1)
    canvas[rows, columns] = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
    return canvas


class Heads(RoIHeads):
    """Overrides `forward` in training, where torchvision's calls losses by name (smooth L1 of fixed beta, masks half a
    pixel off). C4's `mask_head` is no module but the box head's function: in training, its features serve both.
    """

    def forward(self, features, proposals, image_shapes, targets=None):
        """Detections (in eval mode) and losses (in training)."""
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
        regions = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(regions)
        losses = box_losses(logits, deltas, labels, box_targets)
        if self.has_mask():
            chosen = [label > 0 for label in labels]
            boxes, matched = ([v[c] for v, c in zip(values, chosen)] for values in (proposals, matched))
            if isinstance(self.mask_head, nn.Module):
                regions = self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
            else:
                regions = regions[torch.cat(chosen)]
            masks, labels = ([t[name] for t in targets] for name in ('masks', 'labels'))
            losses['loss_mask'] = mask_loss(self.mask_predictor(regions), boxes, masks, labels, matched)
        return [], losses


class ImageBatch(GeneralizedRCNNTransform):
    """Normalised images in one padded batch.

    Overrides `resize`: training images come resized with their boxes and masks from the data set's transforms; those of
    a test get the same antialiased filter here, where torchvision's own has none. And `postprocess`, which rounds boxes
    to whole pixels before it pastes masks: a true mask of 25 px comes back with an IoU of 0.91 there, 0.999 here.
    """

    def resize(self, image: torch.Tensor, target=None):
        """(C, H, W) -> (C, h, w)."""
        if self.training:
            return image, target
        return v2.RandomShortestSize(self.min_size, self.max_size)(image), target

    def postprocess(self, result, image_shapes, original_image_sizes) -> List[Dict[str, torch.Tensor]]:
        """Boxes in px of the original images, masks (N, 1, H, W) of their size."""
        for detection, shape, size in zip(result, image_shapes, original_image_sizes):
            boxes = detection['boxes'] = resize_boxes(detection['boxes'], shape, size)
            if 'masks' in detection:
                pasted = [paste_mask(mask[0], box, size) for mask, box in zip(detection['masks'], boxes)]
                detection['masks'] = torch.stack(pasted)[:, None] if pasted else boxes.new_zeros(0, 1, *size)
        return result

"""A picture of detections beside the ground truth."""
from typing import Any, Dict, List, Sequence

import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from timm_cgh.files import atomic_write

from .annotations import Annotations
from .dataset import DetectionImages
from .metrics import Detection

__all__ = ['save_detections_picture']

_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')  # safe for colour-blind readers


def _as_objects(annotations: Annotations, detections: Sequence[Detection], categories: Sequence[Any]) -> List[list]:
    """Detections in the form of `training_objects`."""
    objects: Dict[Any, List[dict]] = {image['id']: [] for image in annotations.content['images']}
    for d in detections:
        x, y, width, height = d['bbox']
        objects[d['image_id']].append(dict(
            box=(x, y, x + width, y + height), label=categories.index(d['category_id']) + 1, score=d['score'],
            segmentation=d.get('segmentation')))
    return list(objects.values())


def _draw(images: DetectionImages, index: int, classes: Sequence[str], side: int) -> torch.Tensor:
    """(3, side, side) picture of an image with its objects."""
    image, target = v2.Resize(None, max_size=side)(*images[index])
    pixels = image.as_subclass(torch.Tensor).expand(3, -1, -1)
    if objects := images.objects[index]:
        colors = [_COLORS[item['label'] % len(_COLORS)] for item in objects]
        texts = [classes[item['label'] - 1] + (f" {item['score']:.2f}" if 'score' in item else '') for item in objects]
        if images.masks:
            pixels = draw_segmentation_masks(pixels, target['masks'].bool(), alpha=0.4, colors=colors)
        pixels = draw_bounding_boxes(pixels, target['boxes'], texts, colors, width=2)
    return F.pad(pixels, (0, side - pixels.shape[2], 0, side - pixels.shape[1]), value=255)


def save_detections_picture(
        path: str,
        annotations: Annotations,
        images: DetectionImages,
        indices: Sequence[int],
        detections: Sequence[Detection],
        categories: Sequence[Any],
        classes: Sequence[str],
        min_score: float = 0.5,
        side: int = 320,
) -> None:
    """Draw images with their true objects (left) and the detections (right), two images a row.

    Args:
        path: PNG file
        annotations: of the split
        images, indices: with the true objects; which of them to draw
        detections: of the split, in COCO's results format; drawn from `min_score` on
        categories, classes: category id and name of each class
        side: of each picture, px
    """
    chosen = [d for d in detections if d['score'] >= min_score]
    in_chans = 1 if images.mode == 'L' else 3
    found = DetectionImages(annotations, _as_objects(annotations, chosen, categories), in_chans, images.masks)
    tiles = [_draw(source, index, classes, side) for index in indices for source in (images, found)]
    with atomic_write(path, 'wb') as file:
        v2.functional.to_pil_image(make_grid(tiles, nrow=4, pad_value=255)).save(file, format='png')

"""Annotated images in COCO's form, and the objects in them that a detector is trained on."""
import logging
import os
from collections import defaultdict
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Set, Tuple

import numpy as np
from PIL import Image

from timm_cgh.errors import InputError

__all__ = [
    'Annotations', 'annotate_mask', 'decode_mask', 'encode_mask', 'has_mask', 'make_content', 'mask_api',
    'training_objects']

_logger = logging.getLogger('eval')


class Annotations(NamedTuple):
    """One split of a data set, as COCO's annotation files have it.

    Args:
        content: `images` (`id`, `file_name`, `width`, `height`), `annotations` (`image_id`, `category_id`, `bbox` as
            x, y, width, height in px from the image's corner, `area`, `iscrowd`, maybe `segmentation`; of VOC also
            `difficult`), `categories` (`id`, `name`; by id)
        read: entry of `images` -> image
        folder: that `file_name` is relative to
    """
    content: Dict[str, Any]
    read: Callable[[Dict[str, Any]], Image.Image]
    folder: str = ''

    @property
    def files(self) -> Set[str]:
        """Paths of the images."""
        root = os.path.realpath(self.folder)
        return {os.path.normpath(os.path.join(root, image['file_name'])) for image in self.content['images']}

    @property
    def classes(self) -> List[str]:
        """Names, in the order of their category numbers."""
        return [c['name'] for c in self.content['categories']]


def mask_api():
    """pycocotools' `mask` module.

    Raises:
        InputError: not installed
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise InputError("pycocotools: is not installed; pip install 'timm-cgh[detection]'") from error
    return mask


def encode_mask(mask: np.ndarray) -> Dict[str, Any]:
    """(H, W) boolean mask -> COCO's run-length encoding, ready for JSON."""
    encoded = mask_api().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {**encoded, 'counts': encoded['counts'].decode()}


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's `segmentation`, polygons or run lengths -> (H, W) uint8 mask."""
    api = mask_api()
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # four numbers would be read as a box
        segmentation = api.merge(api.frPyObjects(polygons, height, width))
    elif isinstance(segmentation['counts'], list):  # not compressed
        segmentation = api.frPyObjects(segmentation, height, width)
    return api.decode(segmentation)


def annotate_mask(image_id: int, category_id: int, mask: np.ndarray) -> Dict[str, Any]:
    """Annotation of the object that a non-empty (H, W) mask shows."""
    encoded = encode_mask(mask)
    return dict(
        image_id=image_id, category_id=category_id, bbox=mask_api().toBbox(encoded).tolist(),
        area=float(mask_api().area(encoded)), iscrowd=0, segmentation=encoded)


def make_content(images: List[dict], annotations: List[dict], names: Sequence[str]) -> Dict[str, Any]:
    """Content of an annotation file, objects and categories numbered from 1."""
    return dict(
        images=images,
        annotations=[dict(id=number, **a) for number, a in enumerate(annotations, start=1)],
        categories=[dict(id=number, name=name) for number, name in enumerate(names, start=1)],
    )


def training_objects(
        annotations: Annotations,
        masks: bool = False,
        split_parameter: str = 'train_split',
) -> Tuple[List[List[Dict[str, Any]]], Dict[str, int]]:
    """The objects of each image that can be trained on, and how many cannot, by reason; logs which.

    Boxes are cut at the image's border. VOC's difficult objects are trained on, crowds of COCO are not.

    Args:
        annotations: of a split
        masks: objects without one are dropped
        split_parameter: that gives the split, for messages

    Returns:
        per image, dictionaries of `box` (x1, y1, x2, y2 in px), `label` (from 1) and `segmentation`; reason -> number

    Raises:
        InputError: `masks` without any in the annotations, no object left
    """
    content = annotations.content
    labels = {c['id']: label for label, c in enumerate(content['categories'], start=1)}
    images = {image['id']: image for image in content['images']}
    kept: Dict[Any, List[Dict[str, Any]]] = defaultdict(list)
    dropped: Dict[str, List[str]] = defaultdict(list)
    if masks and not any(has_mask(a) for a in content['annotations']):
        raise InputError(f'masks: the annotations of `{split_parameter}` have none')
    for a in content['annotations']:
        image = images[a['image_id']]
        x, y, width, height = a['bbox']
        x1, y1 = max(x, 0), max(y, 0)
        x2, y2 = min(x + width, image['width']), min(y + height, image['height'])
        reason = (
            'crowd' if a['iscrowd'] else 'no area' if not (x2 > x1 and y2 > y1) else  # NaN has none either
            'no mask' if masks and not has_mask(a) else None)
        if reason:
            dropped[reason].append(f"{image['file_name']} {a['bbox']}")
        else:
            kept[image['id']].append(dict(
                box=(x1, y1, x2, y2), label=labels[a['category_id']], segmentation=a.get('segmentation')))
    for reason, which in dropped.items():
        some = ', '.join(which[:3]) + ', ...' * (len(which) > 3)
        _logger.warning(f'{split_parameter}: {len(which)} objects left out ({reason}): {some}')
    if not kept:
        raise InputError(f'{split_parameter}: no object is left')
    return [kept[id] for id in images], {reason: len(which) for reason, which in dropped.items()}


def has_mask(annotation: Dict[str, Any]) -> bool:
    """A run-length encoding, or polygons of at least three points."""
    segmentation = annotation.get('segmentation')
    return isinstance(segmentation, dict) or any(len(polygon) >= 6 for polygon in segmentation or ())

"""Run a detector on all images of a split, and score what it finds."""
import json
import os
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
from torchvision.ops import box_convert
from tqdm import tqdm

from timm_cgh.distributed import Process, all_gather_objects
from timm_cgh.errors import InputError, checking
from timm_cgh.files import atomic_write, write_csv

from .annotations import Annotations, encode_mask
from .dataset import DetectionImages, load_batches
from .metrics import Detection, Precision, coco_precision, voc07_precision

__all__ = ['category_numbers', 'evaluate_detections', 'find_objects', 'read_detections', 'write_detections']


def category_numbers(classes: Sequence[str], annotations: Annotations) -> List[Any]:
    """The category id in a split's annotations of each class; None where it has no such category.

    Raises:
        InputError: objects of a category that is not among the classes
    """
    content = annotations.content
    ids = {c['name']: c['id'] for c in content['categories']}
    used = {a['category_id'] for a in content['annotations']}
    unknown = sorted(name for name, number in ids.items() if number in used and name not in classes)
    if unknown:
        some = ', '.join(unknown[:5])
        raise InputError(f'val_split: {len(unknown)} classes without training images ({some})')
    return [ids.get(name) for name in classes]


def _as_results(image_id: Any, found: Dict[str, torch.Tensor], categories: Sequence[Any]) -> List[Detection]:
    """One image's detections in COCO's results format."""
    boxes = box_convert(found['boxes'].double(), 'xyxy', 'xywh').tolist()
    results = []
    for place, (box, score, label) in enumerate(zip(boxes, found['scores'].tolist(), found['labels'].tolist())):
        if categories[label - 1] is None:
            continue
        result = dict(image_id=image_id, category_id=categories[label - 1], bbox=box, score=score)
        if 'masks' in found:
            result['segmentation'] = encode_mask((found['masks'][place, 0] > 0.5).cpu().numpy())
        results.append(result)
    return results


@torch.no_grad()
def find_objects(
        detector: nn.Module,
        annotations: Annotations,
        categories: Sequence[Any],
        process: Process = Process(),
        *,
        workers: int = 0,
        amp_dtype: Optional[torch.dtype] = None,
) -> List[Detection]:
    """Detections on all images, in COCO's results format and in the order of the images, on every rank.

    Collective: every rank must call, and processes its share of the images. One image at a time: in a batch, detections
    would depend on how far the other images have an image padded.

    Args:
        detector: by `create_detector`, on the process's device; which is put into eval mode
        annotations: of the split; its objects are not used
        categories: category id of each class (see `category_numbers`)
        process, workers: this process, its data workers
        amp_dtype: of autocast

    Raises:
        InputError: an image cannot be read
    """
    detector.eval()
    images = DetectionImages(annotations, in_chans=detector.config['data_config']['input_size'][0])
    mine, found = range(process.rank, len(images), process.world_size), {}
    loaded = load_batches(images, [[(0, index)] for index in mine], process.device, workers)
    for index, (batch, _) in zip(mine, tqdm(loaded, 'detections', len(mine), leave=False, disable=None)):
        with torch.autocast(process.device.type, amp_dtype, amp_dtype is not None):
            found[index] = _as_results(images.entries[index]['id'], detector(batch)[0], categories)
    everyone = {index: results for part in all_gather_objects(found) for index, results in part.items()}
    return [result for index in range(len(images)) for result in everyone[index]]


def evaluate_detections(
        annotations: Annotations,
        detections: Sequence[Detection],
        metric: str = 'coco',
        masks: bool = False,
) -> Dict[str, Precision]:
    """Average precisions by `coco` or `voc07` of detections in COCO's results format: of `bbox`, with masks of `segm`.

    Raises:
        InputError: pycocotools is not installed
    """
    if metric == 'voc07':
        return dict(bbox=voc07_precision(annotations.content, detections))
    return {kind: coco_precision(annotations.content, detections, kind) for kind in ('bbox', 'segm')[:1 + masks]}


def read_detections(path: str, annotations: Annotations, masks: bool) -> List[Detection]:
    """Detections in a file in COCO's results format.

    Args:
        path: JSON file
        annotations: of the split that the detections must be of
        masks: detections must have them

    Raises:
        InputError: no such file, or not one of detections on these images
    """
    keys = {'image_id', 'category_id', 'bbox', 'score', *(['segmentation'] if masks else [])}
    images = {image['id'] for image in annotations.content['images']}
    with checking('baseline', path, OSError, TypeError, ValueError):
        with open(path, encoding='utf-8') as file:
            detections = json.load(file)
        if not all(keys <= set(d) and d['image_id'] in images for d in detections):
            raise ValueError(f"must hold {', '.join(sorted(keys))} of detections in the same images")
    return detections


def write_detections(output: str, detections: Sequence[Detection], precisions: Dict[str, Precision]) -> None:
    """Write `detections.json` in COCO's results format, and `classes.csv` with each class's AP, AP50 and AP75."""
    with atomic_write(os.path.join(output, 'detections.json')) as file:
        json.dump(list(detections), file)
    header = ['class', *(f'{kind}_{name}' for kind in precisions for name in ('AP', 'AP50', 'AP75'))]
    classes = next(iter(precisions.values())).classes
    write_csv(os.path.join(output, 'classes.csv'), header, (
        [name, *(f'{v:.4f}' for row in values for v in (row.mean(), row[0], row[5]))]
        for name, *values in zip(classes, *(p.values for p in precisions.values()))))

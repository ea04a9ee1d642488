"""Average precision: COCO's by pycocotools, and VOC 2007's."""
import contextlib
import copy
import io
from collections import defaultdict
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Set, Tuple

import numpy as np

from .annotations import has_mask, mask_api

__all__ = ['Precision', 'bootstrap_ap50', 'coco_precision', 'voc07_precision']

_IOUS = np.arange(50, 100, 5) / 100
Detection = Dict[str, Any]  # COCO's results format: image_id, category_id, bbox (x, y, width, height), score


class Precision(NamedTuple):
    """Average precisions in percent: (classes, IoU 0.50, 0.55, ..., 0.95), NaN for a class without objects."""
    classes: List[str]
    values: np.ndarray

    def summary(self) -> Dict[str, float]:
        """AP (mean over IoU 0.50 to 0.95), AP50 and AP75, means over the classes that have objects."""
        columns = dict(AP=slice(None), AP50=slice(0, 1), AP75=slice(5, 6))
        return {name: round(float(np.nanmean(self.values[:, column])), 4) for name, column in columns.items()}


# ---- COCO

def _coco_eval(content: Mapping[str, Any], detections: Sequence[Detection], kind: str, ious: int = len(_IOUS)):
    """pycocotools' `COCOeval` after `evaluate`, for objects of all sizes and the first IoUs, without what it prints."""
    mask_api()  # or an InputError
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(dict(content))  # pycocotools writes into both
        for a in truth.dataset['annotations']:
            a['iscrowd'] = int(bool(a['iscrowd'] or a.get('difficult')))  # neither hit nor miss
        if kind == 'segm':  # pycocotools takes no objects without a mask
            truth.dataset['annotations'] = [a for a in truth.dataset['annotations'] if has_mask(a)]
        truth.createIndex()
        found = truth.loadRes(copy.deepcopy(list(detections))) if detections else COCO()
        evaluation = COCOeval(truth, found, kind)
        p = evaluation.params
        p.iouThrs, p.maxDets = p.iouThrs[:ious], p.maxDets[-1:]
        p.areaRng, p.areaRngLbl = p.areaRng[:1], p.areaRngLbl[:1]
        evaluation.evaluate()
    return evaluation


def _accumulate(evaluation) -> np.ndarray:
    """(classes, IoUs) in percent, NaN for a class without objects."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision = evaluation.eval['precision'][..., 0, 0].mean(axis=1).T  # (IoUs, recalls, classes) -> (classes, IoUs)
    return np.where(precision < 0, np.nan, 100 * precision)


def coco_precision(content: Mapping[str, Any], detections: Sequence[Detection], kind: str = 'bbox') -> Precision:
    """COCO's average precision, by pycocotools: of `bbox` or `segm`.

    Raises:
        InputError: pycocotools is not installed
    """
    names = {c['id']: c['name'] for c in content['categories']}
    evaluation = _coco_eval(content, detections, kind)
    return Precision([names[i] for i in evaluation.params.catIds], _accumulate(evaluation))


def bootstrap_ap50(
        content: Mapping[str, Any],
        detections: Sequence[Detection],
        baseline: Sequence[Detection],
        kind: str = 'bbox',
        samples: int = 1000,
        seed: int = 0,
) -> Tuple[float, float, float]:
    """Gain in COCO's AP50 of one run over another, and the ends of its 95 % bootstrap interval over the test images."""
    evaluations = [_coco_eval(content, found, kind, ious=1) for found in (detections, baseline)]
    images = len(evaluations[0].params.imgIds)
    tables = [np.array(e.evalImgs, dtype=object).reshape(-1, images) for e in evaluations]  # a cell: class and image

    def gain(chosen: np.ndarray) -> float:
        means = []
        for e, table in zip(evaluations, tables):
            e.evalImgs = table[:, chosen].reshape(-1).tolist()
            means.append(np.nanmean(_accumulate(e)[:, 0]))
        return float(means[0] - means[1])

    rng = np.random.default_rng(seed)
    gains = [gain(rng.integers(images, size=images)) for _ in range(samples)]
    return gain(np.arange(images)), *np.nanpercentile(gains, (2.5, 97.5)).tolist()


# ---- VOC

def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(4,), (N, 4) as x, y, width, height -> (N,)."""
    overlap = np.minimum(box[:2] + box[2:], boxes[:, :2] + boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = overlap.clip(min=0).prod(axis=1)
    return shared / (box[2:].prod() + boxes[:, 2:].prod(axis=1) - shared)


def _voc07_ap(
        matches: Sequence[Tuple[Any, int, float]],
        difficult: Mapping[Any, Sequence[bool]],
        iou: float,
) -> float:
    """11-point average precision, in [0, 1], of one class.

    Args:
        matches: of each detection by falling score: image, object that it overlaps most, their IoU
        difficult: of each image's objects
        iou: to exceed
    """
    taken: Set[Tuple[Any, int]] = set()
    hits: List[bool] = []
    for image, best, overlap in matches:
        if overlap > iou and difficult[image][best]:
            continue
        hits.append(overlap > iou and (image, best) not in taken)
        if hits[-1]:
            taken.add((image, best))
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    recall = found / sum(not d for objects in difficult.values() for d in objects)
    return float(np.mean([precision[recall >= t].max(initial=0) for t in np.arange(0, 1.1, 0.1)]))


def voc07_precision(content: Mapping[str, Any], detections: Sequence[Detection], ious: np.ndarray = _IOUS) -> Precision:
    """Average precision of VOC 2007 at several IoUs, as detectron2 computes it for Tab. 4.

    Precision is interpolated at 11 recalls. A detection counts for the object that it overlaps most, and is a miss if
    one of a higher score has matched that already. Difficult objects need not be found, and detections of them do not
    count.
    VOC's IoU is of whole pixels with both ends included, which is the plain IoU of boxes from edge to edge, as they are
    here. Equal scores keep their order (detectron2 rounds scores to three decimals and leaves ties to chance).
    """
    values = []
    for category in content['categories']:
        objects = defaultdict(list)
        for a in content['annotations']:
            if a['category_id'] == category['id']:
                objects[a['image_id']].append(a)
        matches = []
        for d in sorted((d for d in detections if d['category_id'] == category['id']), key=lambda d: -d['score']):
            there = objects.get(d['image_id'])
            overlaps = _iou(np.array(d['bbox']), np.array([a['bbox'] for a in there])) if there else np.zeros(1)
            matches.append((d['image_id'], int(overlaps.argmax()), float(overlaps.max())))
        difficult = {image: [bool(a.get('difficult')) for a in found] for image, found in objects.items()}
        to_find = any(not d for found in difficult.values() for d in found)
        values.append([100 * _voc07_ap(matches, difficult, iou) if to_find else np.nan for iou in ious])
    return Precision([c['name'] for c in content['categories']], np.array(values))

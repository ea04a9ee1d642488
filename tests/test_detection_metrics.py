"""Average precision of COCO and of VOC 2007."""
import contextlib
import io
import json

import numpy as np
import pytest

from detection_data import coco_content, open_split, truth_as_detections
from timm_cgh.eval.detection import bootstrap_ap50, coco_precision, metrics, voc07_precision
from timm_cgh.eval.detection.annotations import decode_mask, encode_mask

PERFECT = dict(AP=100.0, AP50=100.0, AP75=100.0)


@pytest.mark.parametrize('reader', ['voc', 'coco', 'masks', 'digits'])
def test_the_truth_handed_in_as_detections_scores_100(reader, tmp_path):
    annotations = open_split(reader, tmp_path)
    content, detections = annotations.content, truth_as_detections(annotations)
    marks = dict(voc='difficult', coco='iscrowd').get(reader)
    assert marks is None or any(a[marks] for a in content['annotations'])
    assert coco_precision(content, detections).summary() == PERFECT
    assert voc07_precision(content, detections).summary() == PERFECT or reader == 'coco'  # VOC has no crowds
    if reader != 'voc':
        segments = [dict(d, segmentation=_encoded(content, d)) for d in detections]
        assert coco_precision(content, segments, 'segm').summary() == PERFECT


def _encoded(content, detection):
    """As a detector gives masks: run lengths, where an annotation file may have polygons."""
    image = next(image for image in content['images'] if image['id'] == detection['image_id'])
    return encode_mask(decode_mask(detection['segmentation'], image['height'], image['width']))


# https://github.com/rafaelpadilla/Object-Detection-Metrics, sample 2: x, y, width, height; its boxes end at x + width
TRUTH = {
    1: [(25, 16, 38, 56), (129, 123, 41, 62)], 2: [(123, 11, 43, 55), (38, 132, 59, 45)],
    3: [(16, 14, 35, 48), (123, 30, 49, 44), (99, 139, 47, 47)], 4: [(53, 42, 40, 52), (154, 43, 31, 34)],
    5: [(59, 31, 44, 51), (48, 128, 34, 52)], 6: [(36, 89, 52, 76), (62, 58, 44, 67)],
    7: [(28, 31, 55, 63), (58, 67, 50, 58)]}
FOUND = {
    1: [(.88, 5, 67, 31, 48), (.70, 119, 111, 40, 67), (.80, 124, 9, 49, 67)],
    2: [(.71, 64, 111, 64, 58), (.54, 26, 140, 60, 47), (.74, 19, 18, 43, 35)],
    3: [(.18, 109, 15, 77, 39), (.67, 86, 63, 46, 45), (.38, 160, 62, 36, 53), (.91, 105, 131, 47, 47),
        (.44, 18, 148, 40, 44)],
    4: [(.35, 83, 28, 28, 26), (.78, 28, 68, 42, 67), (.45, 87, 89, 25, 39), (.14, 10, 155, 60, 26)],
    5: [(.62, 50, 38, 28, 46), (.44, 95, 11, 53, 28), (.95, 29, 131, 72, 29), (.23, 29, 163, 72, 29)],
    6: [(.45, 43, 48, 74, 38), (.84, 17, 155, 29, 35), (.43, 95, 110, 25, 42)],
    7: [(.48, 16, 20, 101, 88), (.95, 33, 116, 37, 49)]}


def one_class(truth, **more):
    """Content of annotations of one class from boxes by image."""
    boxes = [(image, box) for image, found in truth.items() for box in found]
    return dict(
        images=[dict(id=image, file_name='', width=200, height=200) for image in truth],
        categories=[dict(id=1, name='object')],
        annotations=[
            dict(id=n, image_id=image, category_id=1, bbox=list(box), area=1.0, iscrowd=0, **more)
            for n, (image, box) in enumerate(boxes, start=1)])


def scored(found):
    return [
        dict(image_id=image, category_id=1, score=score, bbox=list(box))
        for image, rows in found.items() for score, *box in rows]


def test_a_published_example_of_voc_comes_out():
    truth = {i: [(x, y, w + 1, h + 1) for x, y, w, h in boxes] for i, boxes in TRUTH.items()}
    found = {i: [(s, x, y, w + 1, h + 1) for s, x, y, w, h in rows] for i, rows in FOUND.items()}
    assert voc07_precision(one_class(truth), scored(found), np.array([0.3])).values == pytest.approx(26.84, abs=0.005)


def reference_voc07(truth, difficult, found, iou):
    """detectron2's loop, on whole pixels counted from 1, both ends included."""
    order = sorted(found, key=lambda d: -d['score'])
    taken, tp, fp = {i: [False] * len(boxes) for i, boxes in truth.items()}, [], []
    for d in order:
        x, y, w, h = d['bbox']
        box = np.array([x + 1, y + 1, x + w, y + h])
        best, hit = -1.0, None
        for j, (a, b, c, e) in enumerate(truth[d['image_id']]):
            true = np.array([a + 1, b + 1, a + c, b + e])
            shared = np.maximum(np.minimum(box[2:], true[2:]) - np.maximum(box[:2], true[:2]) + 1, 0).prod()
            overlap = shared / ((box[2:] - box[:2] + 1).prod() + (true[2:] - true[:2] + 1).prod() - shared)
            if overlap > best:
                best, hit = overlap, j
        right = wrong = 0
        if best > iou:
            if not difficult[d['image_id']][hit]:
                right, wrong = (0, 1) if taken[d['image_id']][hit] else (1, 0)
                taken[d['image_id']][hit] = True
        else:
            wrong = 1
        tp.append(right)
        fp.append(wrong)
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    recall = tp / sum(not d for found in difficult.values() for d in found)
    precision = tp / np.maximum(tp + fp, np.finfo(float).eps)
    return 100 * sum(precision[recall >= t].max(initial=0) / 11 for t in np.arange(0, 1.1, 0.1))


@pytest.mark.parametrize('seed', range(5))
def test_voc_equals_the_loop_of_detectron2(seed):
    rng = np.random.default_rng(seed)
    truth = {i: [tuple(rng.integers(1, 60, size=4)) for _ in range(rng.integers(1, 5))] for i in range(20)}
    difficult = {i: [bool(rng.random() < 0.3) for _ in boxes] for i, boxes in truth.items()}
    content = one_class(truth)
    for a, flag in zip(content['annotations'], (f for i in truth for f in difficult[i])):
        a['difficult'] = int(flag)
    found = scored({i: [
        (round(rng.random(), 1), *(np.array(boxes[rng.integers(len(boxes))]) + rng.uniform(-1, 6, size=4)).clip(1))
        for _ in range(6)] for i, boxes in truth.items()})
    values = voc07_precision(content, found, np.array([0.5, 0.75])).values[0]
    for value, iou in zip(values, (0.5, 0.75)):
        assert value == pytest.approx(reference_voc07(truth, difficult, found, iou), abs=1e-9)


def test_a_second_detection_of_an_object_is_a_miss_and_of_a_difficult_one_nothing():
    content = one_class({1: [(10, 10, 20, 20), (60, 60, 30, 30)]}, difficult=0)
    right = scored({1: [(0.9, 10, 10, 20, 20), (0.7, 60, 60, 30, 30)]})
    again = scored({1: [(0.8, 10, 10, 20, 20)]})
    assert voc07_precision(content, right).summary() == PERFECT
    assert voc07_precision(content, right + again).summary()['AP50'] == pytest.approx((6 + 5 * 2 / 3) / 11 * 100,
                                                                                      abs=1e-3)
    content['annotations'][0]['difficult'] = 1
    assert voc07_precision(content, right + again).summary() == PERFECT


def test_coco_figures_are_those_of_pycocotools_called_directly(tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    content, rng = coco_content(), np.random.default_rng(0)
    detections = [
        dict(image_id=int(rng.choice([7, 9])), category_id=int(rng.choice([3, 18])), score=float(rng.random()),
             bbox=[float(v) for v in (*rng.uniform(0, 30, size=2), *rng.uniform(10, 35, size=2))])
        for _ in range(200)]
    (tmp_path / 'truth.json').write_text(json.dumps(content))
    (tmp_path / 'found.json').write_text(json.dumps(detections))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / 'truth.json'))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / 'found.json')), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = coco_precision(content, detections).summary()
    assert list(found.values()) == pytest.approx(100 * evaluation.stats[:3], abs=1e-4) and found['AP50'] > 0


@pytest.mark.parametrize('segmentation', [None, [], [[1, 2, 3, 4]]])
def test_an_object_without_a_mask_counts_among_the_boxes_alone(segmentation):
    content = coco_content()
    detections = [
        dict(d, segmentation=_encoded(content, d)) for d in truth_as_detections(type('A', (), dict(content=content)))]
    content['annotations'][2]['segmentation'] = segmentation
    del detections[2]
    assert coco_precision(content, detections, 'segm').summary() == PERFECT
    assert coco_precision(content, detections, 'bbox').summary()['AP50'] < 100


@pytest.mark.parametrize('precision', [coco_precision, voc07_precision])
def test_nothing_found_scores_0_and_a_class_without_objects_does_not_count(precision):
    content = one_class(TRUTH)
    assert precision(content, []).summary() == dict(AP=0.0, AP50=0.0, AP75=0.0)
    content['categories'].append(dict(id=2, name='absent'))
    result = precision(content, truth_as_detections(type('A', (), dict(content=content))))
    assert result.classes == ['object', 'absent'] and np.isnan(result.values[1]).all()
    assert result.summary() == PERFECT


def test_bootstrap_gives_the_gain_and_an_interval_around_it():
    content = one_class(TRUTH)
    good = [dict(d, score=1.0) for d in truth_as_detections(type('A', (), dict(content=content)))]
    poor = good[::2]
    gain, low, high = bootstrap_ap50(content, good, poor, samples=100)
    expected = coco_precision(content, good).summary()['AP50'] - coco_precision(content, poor).summary()['AP50']
    assert gain == pytest.approx(expected, abs=1e-3) and 0 < low < gain < high < 100
    assert bootstrap_ap50(content, good, good, samples=20) == (0.0, 0.0, 0.0)


def test_bootstrap_computes_no_more_than_ap50(monkeypatch):
    content, shapes, accumulate = one_class(TRUTH), [], metrics._accumulate
    monkeypatch.setattr(metrics, '_accumulate', lambda e: shapes.append(accumulate(e).shape) or accumulate(e))
    found = [dict(d, score=1.0) for d in truth_as_detections(type('A', (), dict(content=content)))]
    bootstrap_ap50(content, found, found, samples=1)
    assert set(shapes) == {(1, 1)}  # (classes, IoUs)

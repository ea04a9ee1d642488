"""Annotations of VOC, COCO, mask folders and digit scenes, and what is made of them."""
import hashlib
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from detection_data import (
    SIZE, coco_content, make_image, make_masks, make_voc, open_split, voc_object, write_coco, write_voc)
from input_errors import refused
from timm_cgh.distributed import Process
from timm_cgh.eval.detection import (
    DetectionImages, category_numbers, open_annotations, training_batches, training_objects, training_transform)
from timm_cgh.eval.detection.dataset import shape_groups


def open_voc(data_dir, split='2007_trainval'):
    return open_annotations('voc', str(data_dir), split)


def open_coco(data_dir, split='val'):
    return open_annotations('coco', str(data_dir), split, split_parameter='val_split')


# ---- what they read

def test_voc_counts_pixels_from_1_and_keeps_difficult_objects_in_training(tmp_path):
    annotations = open_voc(make_voc(tmp_path), '2007_trainval+2012_trainval')
    assert annotations.classes == ['cat', 'dog']
    assert [image['file_name'][-5:] for image in annotations.content['images']] == ['a.jpg', 'b.jpg', 'c.jpg']
    assert [a['bbox'] for a in annotations.content['annotations']] == [
        [4, 4, 36, 36], [0, 0, 64, 48], [9, 9, 21, 21]]
    objects, dropped = training_objects(annotations)
    assert [len(found) for found in objects] == [2, 0, 1] and dropped == {}
    assert objects[0][0]['box'] == (4, 4, 40, 40) and objects[0][0]['label'] == 2


def test_coco_numbers_with_gaps_become_labels_and_crowds_are_left_out(tmp_path):
    write_coco(tmp_path, coco_content())
    annotations = open_coco(tmp_path)
    assert annotations.classes == ['car', 'dog']
    objects, dropped = training_objects(annotations, masks=True)
    assert [[item['label'] for item in found] for found in objects] == [[2], [1, 2]] and dropped == {'crowd': 1}
    assert category_numbers(['dog', 'bird', 'car'], annotations) == [18, None, 3]


def test_any_json_file_is_read_with_the_images_beside_it(tmp_path):
    path = write_coco(tmp_path, coco_content())
    path.rename(tmp_path / 'val' / 'labels.json')
    annotations = open_coco(tmp_path, 'val/labels.json')
    assert annotations.read(annotations.content['images'][0]).size == SIZE


def test_what_other_programs_leave_out_of_coco_is_filled_in(tmp_path):
    content = coco_content()
    for annotation in content['annotations']:
        annotation.pop('area'), annotation.pop('iscrowd')
    write_coco(tmp_path, content)
    first = open_coco(tmp_path).content['annotations'][0]
    assert (first['area'], first['iscrowd']) == (900.0, 0)


def test_masks_give_the_boxes_and_the_split_is_by_hash_of_the_name(tmp_path):
    make_masks(tmp_path)
    val = open_annotations('masks', str(tmp_path), 'validation', val_images=4)
    train = open_annotations('masks', str(tmp_path), 'train', val_images=4)
    names = [image['file_name'] for image in val.content['images']]
    every = sorted((f'street{n}' for n in range(10)), key=lambda n: hashlib.sha256(n.encode()).digest())
    assert names == sorted(f'images/{name}.jpg' for name in every[:4])
    assert set(names).isdisjoint(image['file_name'] for image in train.content['images'])
    assert len(train.content['images']) == 6
    number = int(names[0][len('images/street'):-len('.jpg')])
    first = val.content['annotations'][0]
    assert first['bbox'] == [4, 5 + number, 16, 30 - number] and first['area'] == 16 * (30 - number)


def test_masks_in_folders_of_splits_are_taken_as_they_are(tmp_path):
    for split in ('train', 'test'):
        make_masks(tmp_path / split, 2)
    assert len(open_annotations('masks', str(tmp_path), 'test').content['images']) == 2


def test_scenes_are_functions_of_their_number_and_of_other_digits_in_each_split():
    val = open_annotations('digits', None, 'validation')
    assert len(val.content['images']) == 100 and val.classes == [str(i) for i in range(10)]
    for entry in val.content['images'][:3]:
        image = val.read(entry)
        assert image.size == (entry['width'], entry['height']) and image.mode == 'L'
        assert np.array_equal(image, val.read(entry))
    assert all(4 <= max(a['bbox'][2:]) <= 48 for a in val.content['annotations'])


@pytest.mark.parametrize('box, kept', [
    ([-10, -10, 30, 30], (0, 0, 20, 20)),
    ([50, 40, 100, 100], (50, 40, 64, 48)),
    ([10, 10, 0, 20], None),
    ([10, 10, -5, 20], None),
    ([200, 200, 20, 20], None),
    ([float('nan'), 10, 20, 20], None),
])
def test_boxes_are_cut_at_the_border_and_those_without_area_are_named(tmp_path, caplog, box, kept):
    content = coco_content()
    content['annotations'][0]['bbox'] = box
    write_coco(tmp_path, content)
    with caplog.at_level(logging.WARNING, 'eval'):
        objects, dropped = training_objects(open_coco(tmp_path))
    assert [item['box'] for item in objects[0]] == ([kept] if kept else [])
    assert dropped == ({'crowd': 1} if kept else {'no area': 1, 'crowd': 1})
    assert kept or 'train_split: 1 objects left out (no area): 7.jpg' in caplog.text


def test_objects_without_a_mask_are_left_out_of_mask_training(tmp_path):
    content = coco_content()
    content['annotations'][1]['segmentation'] = [[1, 2, 3, 4]]  # two points
    write_coco(tmp_path, content)
    assert training_objects(open_coco(tmp_path), masks=True)[1] == {'crowd': 1, 'no mask': 1}
    assert training_objects(open_coco(tmp_path))[1] == {'crowd': 1}


# ---- items and batches

@pytest.mark.parametrize('reader', ['coco', 'masks', 'digits'])
def test_items_have_boxes_around_their_masks(reader, tmp_path):
    annotations = open_split(reader, tmp_path)
    images = DetectionImages(annotations, training_objects(annotations, masks=True)[0], masks=True)
    image, target = images[1]
    assert image.shape == (3, images.entries[1]['height'], images.entries[1]['width']) and image.dtype == torch.uint8
    assert target['masks'].shape == (len(target['boxes']), *image.shape[1:]) and len(target['boxes'])
    for box, mask in zip(target['boxes'], target['masks']):
        rows, columns = torch.where(mask > 0)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_transform_moves_boxes_and_masks_with_the_image(tmp_path):
    annotations = open_split('masks', tmp_path)
    images = DetectionImages(annotations, training_objects(annotations)[0], masks=True)
    image, target = images[0]
    moved, there = training_transform([96], 300, hflip=1.0)(image, target)
    assert moved.shape == (3, 96, 128) and there['masks'].shape[1:] == (96, 128)
    x1, y1, x2, y2 = (2 * target['boxes'][0]).tolist()
    assert there['boxes'][0].tolist() == [128 - x2, y1, 128 - x1, y2]
    assert training_transform([96], 100, 0.0)(image, target)[0].shape == (3, 75, 100)


def test_batches_hold_one_orientation_and_do_not_depend_on_the_processes():
    wide = dict(enumerate(np.random.default_rng(0).random(50) < 0.7))
    whole = list(shape_groups(wide, 4, seed=1, steps=range(40)))
    assert len(whole) == 40
    assert all(len({wide[i] for _, i in batch}) == 1 and {s for s, _ in batch} == {n} for n, batch in enumerate(whole))
    assert list(shape_groups(wide, 4, 1, range(17, 40))) == whole[17:]
    halves = [list(shape_groups(wide, 2, 1, range(40), Process(rank=r, world_size=2))) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves)] == [sorted(batch) for batch in whole]


def test_items_of_a_step_are_the_same_with_any_number_of_workers(tmp_path):
    annotations = open_split('masks', tmp_path)
    images = DetectionImages(annotations, training_objects(annotations)[0])
    transform = training_transform([32, 48, 64], 100, 0.5)
    one, two = (list(training_batches(images, transform, range(2, 6), 2, seed=3, workers=w)) for w in (0, 2))
    assert len(one) == 4
    for (images_a, targets_a), (images_b, targets_b) in zip(one, two):
        assert all(torch.equal(a, b) for a, b in zip(images_a, images_b))
        assert all(torch.equal(a['boxes'], b['boxes']) for a, b in zip(targets_a, targets_b))
    assert len({tuple(image.shape) for batch, _ in one for image in batch}) > 1


def test_images_without_objects_are_not_trained_on(tmp_path):
    annotations = open_voc(make_voc(tmp_path))
    images = DetectionImages(annotations, training_objects(annotations)[0])
    batches = training_batches(images, training_transform([32], 64, 0), range(3), 1)
    assert [len(target['boxes']) for _, (target,) in batches] == [2, 2, 2]


# ---- bad input

def test_voc_that_is_not_there(tmp_path):
    with refused('train_split', 'Dataset not found'):
        open_voc(tmp_path)
    make_voc(tmp_path)
    for split, *parts in [('1999_trainval', '1999'), ('2007_best', 'best'), ('2012_val', 'No such file'),
                          ('trainval',)]:
        with refused('train_split', split, *parts):
            open_voc(tmp_path, split)


def test_voc_files_that_are_broken_or_missing(tmp_path):
    folder = make_voc(tmp_path) / 'VOCdevkit' / 'VOC2007' / 'Annotations'
    (folder / 'b.xml').write_text('<annotation><object><name>dog</name></object></annotation>')
    with refused(str(folder / 'b.xml'), 'not a VOC annotation'):
        open_voc(tmp_path)
    (folder / 'b.xml').write_text('<annotation>')
    with refused(str(folder / 'b.xml')):
        open_voc(tmp_path)
    (folder / 'b.xml').unlink()
    with refused(str(folder / 'b.xml'), 'No such file'):
        open_voc(tmp_path)


def change(content, kind, index, **values):
    content[kind][index].update(values)
    return content


@pytest.mark.parametrize('broken, parts', [
    (lambda c: [c], ['values by name']),
    (lambda c: dict(c, images=5), ['no list of images']),
    (lambda c: {k: c[k] for k in ('images', 'annotations')}, ['no list of categories']),
    (lambda c: change(c, 'annotations', 1, category_id=55), ['annotation 2', 'category_id 55']),
    (lambda c: change(c, 'annotations', 1, image_id=1234), ['annotation 2', 'image_id 1234']),
    (lambda c: c['annotations'][1].pop('bbox') and c, ['annotations', 'lacks bbox']),
    (lambda c: change(c, 'annotations', 1, bbox=[1, 2, 3]), ['annotation 2', 'bbox']),
    (lambda c: change(c, 'annotations', 1, bbox='big'), ['annotation 2', 'bbox']),
    (lambda c: change(c, 'images', 1, id=7), ['images share an id']),
    (lambda c: c['images'][0].pop('width') and c, ['images', 'lacks width']),
])
def test_coco_files_that_contradict_themselves(tmp_path, broken, parts):
    content = coco_content()
    path = write_coco(tmp_path, content)
    content = broken(content)
    path.write_text(json.dumps(content))
    with refused(str(path), *parts):
        open_coco(tmp_path)


def test_coco_files_that_are_missing_or_no_json(tmp_path):
    with refused(str(tmp_path / 'annotations' / 'instances_val.json'), 'No such file'):
        open_coco(tmp_path)
    path = write_coco(tmp_path, coco_content())
    path.write_text('{"images": [')
    with refused(str(path), 'line 1'):
        open_coco(tmp_path)
    write_coco(tmp_path, coco_content())
    for image in (tmp_path / 'val').iterdir():
        image.unlink()
    with refused(str(path), 'no image 7.jpg'):
        open_coco(tmp_path)


def test_masks_and_images_that_do_not_fit(tmp_path):
    with refused(str(tmp_path), 'images or PNGImages'):
        open_annotations('masks', str(tmp_path), 'train')
    make_masks(tmp_path)
    with refused('train_split', 'night'):
        open_annotations('masks', str(tmp_path), 'night')
    with refused('val_images', '10 images'):
        open_annotations('masks', str(tmp_path), 'train', val_images=10)
    make_image(tmp_path / 'images' / 'lone.jpg')
    with refused(str(tmp_path / 'images' / 'lone.jpg'), 'has no mask'):
        open_annotations('masks', str(tmp_path), 'train')
    (tmp_path / 'images' / 'lone.jpg').rename(tmp_path / 'masks' / 'alone.png')
    with refused(str(tmp_path / 'masks' / 'alone.png'), 'has no image'):
        open_annotations('masks', str(tmp_path), 'train')
    (tmp_path / 'masks' / 'alone.png').unlink()
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / 'masks' / 'street0.png')
    with refused(str(tmp_path / 'masks' / 'street0.png'), '(10, 10)', str(SIZE)):
        [open_annotations('masks', str(tmp_path), split) for split in ('train', 'validation')]


def test_data_without_any_object_masks_or_known_class(tmp_path):
    empty = write_voc(tmp_path / 'empty', 2007, 'trainval', a=[])
    with refused('train_split', 'no object in any of its 1 images'):
        open_voc(empty)
    annotations = open_voc(make_voc(tmp_path))
    with refused('masks', 'have none'):
        training_objects(annotations, masks=True)
    with refused('val_split', 'cat'):
        category_numbers(['dog'], annotations)
    flat = write_voc(tmp_path / 'flat', 2007, 'trainval', a=[voc_object('dog', 200, 10, 210, 20)])
    with refused('train_split', 'no object is left'):
        training_objects(open_voc(flat))
    with refused('data_dir', 'voc'):
        open_annotations('voc', None, '2007_test')
    with refused('train_split', 'train and validation'):
        open_annotations('digits', None, 'test')


def test_an_unreadable_image_ends_the_loading_with_its_name(tmp_path):
    annotations = open_voc(make_voc(tmp_path))
    images = DetectionImages(annotations, training_objects(annotations)[0])
    path = tmp_path / annotations.content['images'][0]['file_name']
    make_image(path, size=(20, 20))
    with refused(str(path), '20 x 20 px'):
        images[0]
    with refused(str(path), '20 x 20 px', '64 x 48'):
        next(training_batches(images, training_transform([32], 64, 0), range(1), 1))
    path.write_bytes(b'no image')
    with refused(str(path)):
        next(training_batches(images, training_transform([32], 64, 0), range(1), 1, workers=1))

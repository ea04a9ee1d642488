"""Small annotated data sets on disk, as VOC, COCO and Penn-Fudan lay them out, for the tests of detection."""
import json
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from timm_cgh.eval.detection import open_annotations
from timm_cgh.eval.detection.annotations import encode_mask

SIZE = 64, 48  # width, height of the images, px


def make_image(path, seed=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def voc_object(name, xmin, ymin, xmax, ymax, difficult=0):
    return (f'<object><name>{escape(name)}</name><difficult>{difficult}</difficult><bndbox><xmin>{xmin}</xmin>'
            f'<ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>')


def write_voc(data_dir, year, image_set, **objects):
    """A set of VOCdevkit with an image for each keyword, and its objects (see `voc_object`)."""
    root = data_dir / 'VOCdevkit' / f'VOC{year}'
    for number, (name, found) in enumerate(objects.items()):
        make_image(root / 'JPEGImages' / f'{name}.jpg', number)
        xml = root / 'Annotations' / f'{name}.xml'
        xml.parent.mkdir(exist_ok=True)
        xml.write_text(
            f"<annotation><size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
            f"{''.join(found)}</annotation>")
    listing = root / 'ImageSets' / 'Main' / f'{image_set}.txt'
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text(''.join(f'{name}\n' for name in objects))
    return data_dir


def make_voc(data_dir):
    """2007 trainval and test, 2012 trainval, with a difficult object among the tested."""
    write_voc(data_dir, 2007, 'trainval', a=[voc_object('dog', 5, 5, 40, 40), voc_object('cat', 1, 1, 64, 48, 1)], b=[])
    write_voc(data_dir, 2012, 'trainval', c=[voc_object('cat', 10, 10, 30, 30)])
    return write_voc(
        data_dir, 2007, 'test', d=[voc_object('dog', 5, 5, 40, 40), voc_object('dog', 20, 20, 60, 44, 1)],
        e=[voc_object('cat', 3, 3, 33, 23)])


def coco_content():
    """Two images, categories numbered with gaps, polygons, a crowd, and boxes that no detector can be trained on."""
    crowd = np.zeros(SIZE[::-1], dtype=bool)
    crowd[:10, 30:] = True

    def box(number, image, category, x, y, width, height, **more):
        polygon = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        return dict(dict(
            id=number, image_id=image, category_id=category, bbox=[x, y, width, height], area=width * height, iscrowd=0,
            segmentation=polygon), **more)

    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=SIZE[0], height=SIZE[1]) for i in (7, 9)],
        categories=[dict(id=18, name='dog'), dict(id=3, name='car')],
        annotations=[
            box(1, 7, 18, 4, 4, 30, 30), box(2, 9, 3, 10, 12, 20, 20), box(3, 9, 18, 30, 20, 20, 20),
            box(4, 9, 18, 30, 0, 34, 10, iscrowd=1, segmentation=encode_mask(crowd))],
    )


def write_coco(data_dir, content, split='val'):
    """`annotations/instances_<split>.json`, and its images."""
    (data_dir / 'annotations').mkdir(parents=True, exist_ok=True)
    path = data_dir / 'annotations' / f'instances_{split}.json'
    path.write_text(json.dumps(content))
    for image in content['images']:
        make_image(data_dir / split / image['file_name'], image['id'])
    return path


def make_masks(data_dir, count=10):
    """Images and masks of one or two rectangles."""
    for number in range(count):
        make_image(data_dir / 'images' / f'street{number}.jpg', number)
        mask = np.zeros(SIZE[::-1], dtype=np.uint8)
        mask[5 + number:35, 4:20] = 1
        mask[8:30, 30:50 + number % 3] = 2 if number % 2 else 0
        (data_dir / 'masks').mkdir(exist_ok=True)
        Image.fromarray(mask).save(data_dir / 'masks' / f'street{number}.png')
    return data_dir


def open_split(reader, data_dir):
    """Test annotations of one of these data sets, with crowd and difficult objects where it has them."""
    if reader == 'voc':
        return open_annotations('voc', str(make_voc(data_dir)), '2007_test')
    if reader == 'coco':
        write_coco(data_dir, coco_content())
        return open_annotations('coco', str(data_dir), 'val')
    if reader == 'masks':
        return open_annotations('masks', str(make_masks(data_dir)), 'validation')
    return open_annotations('digits', None, 'validation')


def truth_as_detections(annotations):
    """The true objects, in COCO's results format."""
    return [
        dict({key: a[key] for key in ('image_id', 'category_id', 'bbox', 'segmentation') if key in a}, score=1.0)
        for a in annotations.content['annotations']]

"""Annotated images of VOC, of COCO, and of folders with instance masks."""
import hashlib
import os
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from torchvision.datasets import VOCDetection

from timm_cgh.data.decode import UNREADABLE
from timm_cgh.distributed import rank_zero_first
from timm_cgh.errors import InputError, checking
from timm_cgh.files import read_json

from .annotations import Annotations, annotate_mask, make_content
from .scenes import digit_scenes

__all__ = ['open_annotations']


def _open_image(folder: Path, entry: Dict[str, Any]) -> Image.Image:
    path = folder / entry['file_name']
    with checking(str(path), None, *UNREADABLE):
        image = Image.open(path)
        image.load()
    if image.size != (entry['width'], entry['height']):
        raise InputError(
            f"{path}: has {image.width} x {image.height} px, annotated are {entry['width']} x {entry['height']}")
    return image


def _annotations(content: Dict[str, Any], folder: Path) -> Annotations:
    return Annotations(content, partial(_open_image, folder), str(folder))


def _read_voc_xml(path: str) -> Dict[str, Any]:
    """`width` and `height` of the image; `name`, `bbox` and `difficult` of each of its `objects`."""
    with checking(path, None, OSError, ElementTree.ParseError):
        content = VOCDetection.parse_voc_xml(ElementTree.parse(path).getroot())
    try:
        size, objects = content['annotation']['size'], []
        for item in content['annotation']['object']:
            x1, y1, x2, y2 = (float(item['bndbox'][side]) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
            bbox = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]  # VOC counts pixels from 1, and x2 is inside
            objects.append(dict(name=item['name'], bbox=bbox, difficult=int(item.get('difficult', 0))))
        return dict(width=int(size['width']), height=int(size['height']), objects=objects)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f'{path}: not a VOC annotation (size, objects with name and bndbox)') from error


def _read_voc(data_dir: str, split: str, split_parameter: str, dataset_download: bool) -> Annotations:
    """Sets of VOCdevkit, YEAR_SET joined by +, such as those of the paper's `2007_trainval+2012_trainval`."""
    images: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    for part in split.split('+'):
        year, _, image_set = part.partition('_')
        with rank_zero_first(), checking(split_parameter, split, OSError, RuntimeError, ValueError):
            files = VOCDetection(data_dir, year, image_set, download=dataset_download)
        for path, xml in zip(files.images, files.annotations):
            read, number = _read_voc_xml(xml), len(images) + 1
            annotations += [dict(image_id=number, **found) for found in read.pop('objects')]
            images.append(dict(id=number, file_name=os.path.relpath(path, files.root), **read))
    names = sorted({a['name'] for a in annotations})
    for a in annotations:
        a.update(category_id=names.index(a.pop('name')) + 1, area=a['bbox'][2] * a['bbox'][3], iscrowd=0)
    return _annotations(make_content(images, annotations, names), Path(data_dir).expanduser())


def _check_coco(content: Dict[str, Any], path: Path) -> None:
    wanted = dict(
        images=('id', 'file_name', 'width', 'height'), categories=('id', 'name'),
        annotations=('id', 'image_id', 'category_id', 'bbox'))
    ids = {}
    for kind, keys in wanted.items():
        if not isinstance(content.get(kind), list):
            raise InputError(f'{path}: has no list of {kind}, as annotation files of COCO have')
        for entry in content[kind]:
            if missing := [key for key in keys if not isinstance(entry, dict) or key not in entry]:
                raise InputError(f"{path}: {kind} {str(entry)[:80]} lacks {', '.join(missing)}")
        ids[kind] = {entry['id'] for entry in content[kind]}
        if len(ids[kind]) < len(content[kind]):
            raise InputError(f'{path}: {kind} share an id')
    content['categories'].sort(key=itemgetter('id'))
    for entry in content['annotations']:
        for kind, key in (('images', 'image_id'), ('categories', 'category_id')):
            if entry[key] not in ids[kind]:
                raise InputError(f"{path}: annotation {entry['id']} is of {key} {entry[key]}, which is not in {kind}")
        with checking(f"{path}: annotation {entry['id']}: bbox", entry['bbox'], TypeError, ValueError):
            _, _, width, height = map(float, entry['bbox'])
        entry.setdefault('area', width * height)  # pycocotools needs both, and only COCO's own files always have them
        entry.setdefault('iscrowd', 0)


def _read_coco(data_dir: str, split: str) -> Annotations:
    """`annotations/instances_<split>.json` with the images in `<split>/`, or any json file of COCO's form with the
    images beside it, or in an `images/` beside it.
    """
    path = Path(data_dir, split if split.endswith('.json') else f'annotations/instances_{split}.json')
    folders = [path.parent, path.parent / 'images'] if split.endswith('.json') else [Path(data_dir, split)]
    content = read_json(path)
    _check_coco(content, path)
    first = content['images'][0]['file_name'] if content['images'] else ''
    folder = next((f for f in folders if (f / first).exists()), None)
    if folder is None:
        raise InputError(f"{path}: no image {first} in {' or '.join(map(str, folders))}")
    return _annotations(content, folder)


def _files(folder: Path, names: Sequence[str]) -> Dict[str, Path]:
    """Stem (without `_mask`) -> file, of the first of these folders that is there."""
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        raise InputError(f"{folder}: has no folder {' or '.join(names)}")
    return {p.stem.removesuffix('_mask'): p for p in sorted(found.iterdir()) if not p.name.startswith('.')}


def _split_by_hash(names: List[str], split: str, split_parameter: str, val_images: Optional[int]) -> List[str]:
    """Names of `validation`, those with the smallest hashes, or of `train`, the rest."""
    if split not in ('train', 'validation'):
        raise InputError(f'{split_parameter}={split}: no such folder; without one say train or validation')
    count = len(names) * 3 // 10 if val_images is None else val_images
    if not 0 < count < len(names):
        raise InputError(f'val_images={count}: must be at least 1, and less than the {len(names)} images')
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return sorted(order[:count] if split == 'validation' else order[count:])


def _read_masks(data_dir: str, split: str, split_parameter: str, val_images: Optional[int]) -> Annotations:
    """`images/` and `masks/` (Penn-Fudan's PNGImages, PedMasks), where value k of a mask is instance k: in a folder of
    the split's name, or of all images, to be split by hashes of their names.
    """
    folder = Path(data_dir, split) if Path(data_dir, split).is_dir() else Path(data_dir)
    images, masks = _files(folder, ('images', 'PNGImages')), _files(folder, ('masks', 'PedMasks'))
    if images.keys() != masks.keys():
        lone = min(images.keys() ^ masks.keys())
        raise InputError(f"{images.get(lone) or masks[lone]}: has no {'mask' if lone in images else 'image'}")
    names = sorted(images)
    if folder == Path(data_dir):
        names = _split_by_hash(names, split, split_parameter, val_images)
    entries, annotations = [], []
    for number, name in enumerate(names, start=1):
        with checking(str(masks[name]), None, *UNREADABLE):
            instances = np.array(Image.open(masks[name]))
        with checking(str(images[name]), None, *UNREADABLE):
            size = Image.open(images[name]).size
        if instances.shape != size[::-1]:
            raise InputError(f'{masks[name]}: a mask of {instances.shape[::-1]} for an image of {size} px')
        file_name = str(images[name].relative_to(folder))
        entries.append(dict(id=number, file_name=file_name, width=size[0], height=size[1]))
        annotations += [annotate_mask(number, 1, instances == k) for k in np.unique(instances) if k]
    return _annotations(make_content(entries, annotations, ['object']), folder)


def open_annotations(
        dataset: str,
        data_dir: Optional[str],
        split: str,
        *,
        split_parameter: str = 'train_split',
        val_images: Optional[int] = None,
        dataset_download: bool = False,
) -> Annotations:
    """A split of a data set.

    Args:
        dataset: `voc`: VOCdevkit; `coco`: its folders or any json file of its form; `masks`: images with instance
            masks; `digits`: scenes composed of UCI's digits
        data_dir: its folder
        split: of VOC YEAR_SET, joined by +; of COCO NAME of `annotations/instances_NAME.json`, or a json file; of masks
            a folder, or `train` and `validation` by hashes of the images' names; of digits `train` and `validation`
        split_parameter: that gives `split`, for messages
        val_images: of masks, to hold out; default three of ten
        dataset_download: let torchvision fetch VOC

    Raises:
        InputError: files that are missing, broken or contradict each other, or have no object
    """
    if dataset == 'digits':
        annotations = digit_scenes(split, split_parameter)
    elif not data_dir:
        raise InputError(f'data_dir: name the folder of the {dataset} data set')
    elif dataset == 'voc':
        annotations = _read_voc(data_dir, split, split_parameter, dataset_download)
    elif dataset == 'coco':
        annotations = _read_coco(data_dir, split)
    else:
        annotations = _read_masks(data_dir, split, split_parameter, val_images)
    if not annotations.content['annotations']:
        images = len(annotations.content['images'])
        raise InputError(f'{split_parameter}={split}: no object in any of its {images} images')
    return annotations

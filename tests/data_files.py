"""Small data sets on disk."""
import io
import tarfile

import numpy as np
import pytest
from PIL import Image


def picture(number, size=16, mode='RGB'):
    """A random image, another one for each number; `size` is its side or (width, height)."""
    width, height = (size, size) if isinstance(size, int) else size
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image, format='PNG', **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_images(folder, count, first=0, **kwargs):
    """PNG files, numbered from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number, **kwargs).save(folder / f'{number:03d}.png')
    return folder


def write_classes(folder, count, classes=('cat', 'dog'), first=0, **kwargs):
    """`count` images in each class folder."""
    for i, name in enumerate(classes):
        write_images(folder / name, count, first + i * count, **kwargs)
    return folder


def write_tar(path, folder):
    with tarfile.open(path, 'w') as tar:
        tar.add(folder, arcname='.')
    return path


def write_shards(folder, per_shard=12, shards=2, name='shard', labelled=True, extension='png', broken=(), images=()):
    """Shards of webdataset, labels 0, 1, 2, 0, ...; the images at the places in `broken` cannot be read.

    With `images`, a shard of these encoded ones.

    Returns:
        name of the split
    """
    wds = pytest.importorskip('webdataset')
    folder.mkdir(parents=True, exist_ok=True)
    per_shard, shards = (len(images), 1) if images else (per_shard, shards)
    for shard in range(shards):
        with wds.TarWriter(str(folder / f'{name}-{shard:06d}.tar')) as writer:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                label = {'cls': str(number % 3).encode()} if labelled else {}
                image = images[number] if images else b'broken' if number in broken else encode(picture(number))
                writer.write({'__key__': f'image{number:05d}', extension: image, **label})
    return f'{name}-{{000000..{shards - 1:06d}}}.tar|{shards * per_shard}'


def write_parquet(folder, files, labels=None, classes=None):
    """A Hugging Face data set of one parquet file, its split `train`.

    Args:
        folder: of the data set
        files: file name -> its bytes
        labels: of the images, whole numbers
        classes: their names
    """
    datasets = pytest.importorskip('datasets')
    columns = {'image': [{'path': name, 'bytes': data} for name, data in files.items()]}
    features = {'image': datasets.Image()}
    if labels is not None:
        columns['label'] = labels
        features['label'] = datasets.ClassLabel(names=classes) if classes else datasets.Value('int64')
    folder.mkdir()
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(str(folder / 'train-00000-of-00001.parquet'))
    return folder

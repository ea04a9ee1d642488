"""Small data sets on disk, for the tests of timm_cgh.data."""
import io
import tarfile

import numpy as np
import webdataset
from PIL import Image


def picture(number, size=16, mode='RGB'):
    """A picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


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


def write_shards(folder, shards=2, per_shard=12, classes=3, name='shard'):
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f'{name}-{shard:06d}.tar')) as writer:
            for i in range(per_shard):
                number, buffer = shard * per_shard + i, io.BytesIO()
                picture(number).save(buffer, 'PNG')
                writer.write({'__key__': f'{number:04d}', 'png': buffer.getvalue(), 'cls': str(number % classes).encode()})
    return folder

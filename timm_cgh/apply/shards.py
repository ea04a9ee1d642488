"""Shards of webdataset, for `wds/`: tars of images as they are, in random order, with the index that timm reads."""
import io
import json
import math
import os
import tarfile
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, cast

import torch
from timm.data.readers.reader import Reader
from tqdm import tqdm

from timm_cgh.data import class_to_idx
from timm_cgh.data.labels import to_label
from timm_cgh.data.readers import image_endings
from timm_cgh.errors import InputError
from timm_cgh.files import atomic_path, atomic_write, make_folder, read_json

from .images import NamedImages, unique_names

__all__ = ['read_index', 'write_shards']

_INDEX = '_info.json'
_MEASURED = 1000  # images whose mean size decides on the number of shards


def read_index(images: NamedImages, output: str, split: str = 'train') -> Dict[str, Any]:
    """The index of a folder of shards so far, once it is certain that a split of these images can be added.

    Raises:
        InputError: a name that timm would misread, a folder that cannot be written to or has such shards already,
            images that are not files, or other classes than those of the splits in the folder
    """
    if not split.replace('-', '').replace('_', '').isalnum() or 'tar' in split:
        raise InputError(f'split={split}: must be a plain name without "tar", which timm takes for a list of shards')
    make_folder(output, 'output', output)
    present = sorted(path.name for path in Path(output).glob(f'{split}-*.tar'))
    if present:
        raise InputError(f'output={output}: has {present[0]} already; delete it, or choose another folder')
    if not hasattr(images.dataset, 'reader'):
        raise InputError('dataset: its images are not files; use a folder, a tar or hfds/')
    path, classes = Path(output, _INDEX), class_to_idx(images.dataset)
    index: Dict[str, Any] = read_json(path) if path.exists() else dict(splits={}, class_to_idx=classes)
    if index.get('class_to_idx') != classes:
        raise InputError(f'output={output}: the splits in it have other classes; choose another folder')
    return index


def _member_names(names: Sequence[str]) -> List[str]:
    """Paths in the tars. webdataset ends the key of a sample at the first dot of the base name: others become `%2E`."""
    keys, endings, known = [], [], image_endings()
    for name in names:
        *folders, base = [part for part in name.split('/') if part not in ('', '.', '..')]
        stem, ending = os.path.splitext(base)
        keys.append('/'.join([*folders, stem.replace('%', '%25').replace('.', '%2E')]))
        endings.append(ending if ending.lower() in known else '.jpg')  # decoders go by the content
    return [key + ending for key, ending in zip(unique_names(keys), endings)]


def _read(reader: Reader, index: int) -> Tuple[bytes, int]:
    file, target, *_ = reader[index]
    with file:
        return file.read(), to_label(target)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time: equal images make equal shards
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shards(
        images: NamedImages,
        readable: torch.Tensor,
        output: str,
        split: str = 'train',
        *,
        shard_images: int = 1000,
        shard_mb: float = 1000,
        seed: int = 42,
) -> Dict[str, Any]:
    """Write images to `<split>-000000.tar`, ... and add the split to the index `_info.json`, which comes last.

    Files are copied byte for byte and keep their names: `a/b.c.jpg` has the key `a/b%2Ec`. The number of the class is
    in a `.cls` file beside the image. A stream shuffles its shards, but images only within a buffer, so all images are
    shuffled here. All shards hold as many images, since a worker with fewer repeats them until the others are done.

    Args:
        images: files, see `open_images`
        readable: (n,) indices of those to write
        output: folder
        split: name of the split
        shard_images: images in a shard, at most
        shard_mb: megabytes in a shard, at most, approximately
        seed: of the order

    Returns:
        entry of the split in the index

    Raises:
        InputError: see `read_index`
    """
    index, reader = read_index(images, output, split), cast(Any, images.dataset).reader
    order = readable[torch.randperm(len(readable), generator=torch.Generator().manual_seed(seed))]
    measured = [len(_read(reader, place)[0]) for place in order[:_MEASURED].tolist()]
    size = sum(measured) / len(measured) * len(order)
    shards = order.tensor_split(max(math.ceil(len(order) / shard_images), math.ceil(size / (shard_mb * 1e6))))
    names, filenames = _member_names(images.names), [f'{split}-{number:06d}.tar' for number in range(len(shards))]
    for filename, shard in zip(tqdm(filenames, 'shards', leave=False, disable=None), shards):
        with atomic_path(Path(output, filename)) as temporary, tarfile.open(temporary, 'w') as tar:
            for place in shard.tolist():
                data, label = _read(reader, place)
                _add(tar, names[place], data)
                if label >= 0:
                    _add(tar, f'{os.path.splitext(names[place])[0]}.cls', str(label).encode())
    entry = dict(
        name=split, num_samples=len(order), filenames=filenames, shard_lengths=[len(shard) for shard in shards])
    index['splits'][split] = entry
    with atomic_write(Path(output, _INDEX)) as file:
        json.dump(index, file, indent=1, ensure_ascii=False)
    return entry

"""Open data sets: timm's, torchvision's STL-10, the digits."""
import contextlib
import math
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from timm.data import ImageDataset, IterableImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import STL10

from timm_cgh.distributed import rank_zero_first
from timm_cgh.errors import InputError, checking, reason

from .decode import MAX_PIXELS, Decoding
from .digits import Digits
from .labels import whole
from .readers import FileReader, ShardReader, list_tars

__all__ = [
    'check_disjoint', 'create_decoding', 'data_name', 'find_split_folder', 'image_mode', 'is_stream', 'num_images',
    'open_dataset', 'source_prefix', 'splits_overlap']

_PACKAGES = {
    'torch': 'torchvision', 'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow-datasets'}
_SYNONYMS = _TRAIN_NAMES, _VAL_NAMES = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))
_TORCH_FOLDERS = ('torch/image_folder', 'torch/folder')
_TORCH_TRAIN_VAL = tuple(f'torch/{n}' for n in ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist'))
_TORCH_OTHERS = ('torch/stl10', 'torch/imagenet', 'torch/inaturalist', 'torch/inat', 'torch/places365')
_STL10_SPLITS = {'train': 'train+unlabeled', **dict.fromkeys(_VAL_NAMES, 'test')}


def image_mode(in_chans: int) -> str:
    """PIL mode of images with this number of channels, `L` or `RGB`; else the number.

    Raises:
        InputError: less than 1
    """
    if in_chans < 1:
        raise InputError(f'in_chans={in_chans}: must be 3 (colour), 1 (grey) or the number of bands')
    return {1: 'L', 3: 'RGB'}.get(in_chans, str(in_chans))


def is_stream(dataset: Dataset) -> bool:
    """Whether a data set can only be iterated over (wds/, hfids/, tfds/)."""
    return isinstance(dataset, IterableDataset)


def num_images(dataset: Dataset) -> int:
    """Number of images in a data set, over all processes.

    The length of timm's streams is something else: the share of one process, rounded up to whole batches per worker.
    """
    reader: Any = getattr(dataset, 'reader', None)
    return int(reader.num_samples) if is_stream(dataset) and hasattr(reader, 'num_samples') else len(dataset)


def source_prefix(dataset: str) -> str:
    """`hfds` of `hfds/owner/name`; empty for a folder, a tar and the digits."""
    return dataset.partition('/')[0].lower() if '/' in dataset else ''


def data_name(dataset: str, data_dir: Optional[str]) -> str:
    """Short public name of a data set: `cifar10` of `torch/cifar10`, `owner/name` on the Hub, else the folder's name.

    It gives away no path, and nothing that is not a plain name: `data_dir` may be a command with a login in it, which
    reads shards.

    Args:
        dataset, data_dir: see `open_dataset`
    """
    prefix = source_prefix(dataset)
    name = dataset.partition('/')[2] if prefix in _PACKAGES else dataset
    parts = [part for part in (name or data_dir or '').split('/') if part]
    while len(parts) > 1 and parts[-1].lower() in _TRAIN_NAMES:
        parts.pop()
    if not (prefix in ('hfds', 'hfids') and len(parts) == 2 and parts[0].strip('.~')):
        parts = parts[-1:]
    text = '/'.join(parts)
    return text if re.fullmatch(r'[\w.-]+(/[\w.-]+)?', text) and text.strip('.') else 'images'


def find_split_folder(data_dir: str, split: str) -> Optional[str]:
    """Path of a split in a folder of splits, or in its folder `images`: the entry with its name or a synonym.

    `val`, `valid`, ... are synonyms; an entry may be a tar, and have capitals.
    """
    names = (split, *next((names for names in _SYNONYMS if split in names), ()))
    names = (*names, *(f'{name}.tar' for name in names))
    wanted = {name.lower() for name in names}
    for root in (data_dir, os.path.join(data_dir, 'images')):
        there = os.listdir(root) if os.path.isdir(root) else []  # perhaps a million images
        alike = sorted(entry for entry in there if entry.lower() in wanted)
        for name in names:
            for entry in (name, *alike):
                path = os.path.join(root, entry)
                if entry.lower() == name.lower() and os.path.exists(path):
                    return path
    return None


def _tables_overlap(table: Any, *splits: str) -> bool:
    """Whether two splits of a table of Hugging Face, such as `train[:50%]` and `train+test`, share rows."""
    import datasets
    lengths = {name: split.num_examples for name, split in (table.info.splits or {}).items()}
    try:
        first, second = (
            datasets.ReadInstruction.from_spec('+'.join(lengths) if split == 'all' else split).to_absolute(lengths)
            for split in splits)
    except Exception:  # opening the split says what is wrong with it
        return False
    return any(a.splitname == b.splitname and a.from_ < b.to and b.from_ < a.to for a in first for b in second)


def splits_overlap(train: Dataset, train_split: str, split: str, dataset: str, data_dir: Optional[str]) -> bool:
    """Whether a split is known to share images with the training split, by whatever names.

    Of streams, and of the names that torchvision gives to a single data set, only equal ones are known.

    Args:
        train: the training split
        train_split, split: the two names
        dataset, data_dir: see `open_dataset`
    """
    lower = dataset.lower()
    if train_split == split:
        return True
    if not dataset or lower in _TORCH_FOLDERS:
        root, names = data_dir or '', (train_split, split)
        found = [find_split_folder(root, name) or (root if name in _TRAIN_NAMES else '') for name in names]
        first, second = (Path(path).resolve() for path in found)
        return all(found) and (first.is_relative_to(second) or second.is_relative_to(first))
    if source_prefix(dataset) == 'hfds':
        return _tables_overlap(whole(train).reader.dataset, train_split, split)
    if lower in _TORCH_TRAIN_VAL:
        return (train_split in _TRAIN_NAMES) == (split in _TRAIN_NAMES)
    if lower == 'torch/stl10':
        parts = [{*_STL10_SPLITS.get(name, name).split('+')} for name in (train_split, split)]
        return not parts[0].isdisjoint(parts[1])
    return source_prefix(dataset) == 'torch' and any({train_split, split} <= {*names} for names in _SYNONYMS)


def check_disjoint(train: Dataset, train_split: str, val_split: str, dataset: str, data_dir: Optional[str]) -> None:
    """Raise an `InputError` where validation images are known to be training images; see `splits_overlap`."""
    if splits_overlap(train, train_split, val_split, dataset, data_dir):
        raise InputError(f'val_split={val_split}: shares images with the training split, {train_split}')


def _find_images(data_dir: str, split: str, search_split: bool, split_parameter: str) -> str:
    """Folder or tar to read. timm itself silently reads all of `data_dir` where it does not find the split."""
    if not os.path.exists(data_dir):
        raise InputError(f'data_dir={data_dir}: no such folder or file')
    if os.path.isfile(data_dir):
        if not data_dir.endswith('.tar'):
            raise InputError(f'data_dir={data_dir}: must be a folder of images or an uncompressed .tar of them')
        if split not in _TRAIN_NAMES:
            raise InputError(f'{split_parameter}={split}: a tar has no splits; `data_dir` must be a folder of them')
        return data_dir
    folder = find_split_folder(data_dir, split) if search_split else None
    if folder is None and search_split and split not in _TRAIN_NAMES:
        found = sorted(entry.name for entry in os.scandir(data_dir) if entry.is_dir() or entry.name.endswith('.tar'))
        raise InputError(
            f"{split_parameter}={split}: not in {data_dir}, which has {', '.join(found[:8]) or 'no folders'}")
    return folder or data_dir  # without split folders, all images are for training


def _check_name(dataset: str, data_dir: str, split: str, split_parameter: str) -> None:
    """Check a data set's name and where it lies, as far as that needs no reader."""
    prefix, lower, source = source_prefix(dataset), dataset.lower(), dataset.partition('/')[2]
    if dataset and not prefix:
        raise InputError(
            f'dataset={dataset}: no such data set; digits, torch/{dataset} or hfds/... (or `data_dir` alone)?')
    if prefix and prefix not in _PACKAGES:
        raise InputError(f'dataset={dataset}: must start with torch/, hfds/, hfids/, wds/ or tfds/, or be digits')
    if prefix in ('', 'torch', 'wds') and not data_dir:
        raise InputError(f"data_dir: must be given, the folder of {dataset or 'images or a tar of them'}")
    known = (*_TORCH_TRAIN_VAL, *_TORCH_OTHERS, *_TORCH_FOLDERS)
    if prefix == 'torch' and lower not in known:
        raise InputError(f"dataset={dataset}: must be one of {', '.join(known)}")
    if lower in _TORCH_TRAIN_VAL and split not in (*_TRAIN_NAMES, *_VAL_NAMES, 'test'):
        raise InputError(f'{split_parameter}={split}: {dataset} has train and validation')
    if prefix == 'wds' and '://' not in data_dir and not os.path.isdir(data_dir):
        raise InputError(f'data_dir={data_dir}: must be a folder of webdataset shards')
    if prefix in ('hfds', 'hfids') and source.startswith(('.', '/', '~')) and not os.path.exists(source):
        raise InputError(f'dataset={dataset}: no such folder: {source}')


def _open(dataset: str, decoding: Decoding, download: bool, trust_remote_code: bool, **options: Any) -> Dataset:
    """Open a data set; `options` are those of timm's `create_dataset`."""
    root, split = options['root'], options['split']
    if not dataset:
        reader = FileReader(root, options['class_map'], options.get('input_key'), bands=decoding.mode.isdigit())
        return ImageDataset(root, reader=reader, input_img_mode='' if decoding.mode.isdigit() else decoding.mode)
    if dataset.lower() == 'torch/stl10':
        return STL10(root, split=_STL10_SPLITS.get(split, split), download=download)
    if source_prefix(dataset) == 'wds':
        return IterableImageDataset(
            root, reader=ShardReader(name=dataset.partition('/')[2], decoding=decoding, **options))
    return create_dataset(
        dataset,
        search_split=False,
        download=download,
        trust_remote_code=trust_remote_code,
        input_img_mode='',  # timm would clip grey levels of 16 bits
        **options,
    )


def _check_image_column(dataset: str, root: Optional[str], split: str, input_key: Optional[str]) -> None:
    """Raise `InputError` where a table lacks the column of images, of which its libraries say nothing clear."""
    try:
        import datasets
        features = datasets.load_dataset(dataset.partition('/')[2], split=split, cache_dir=root).features
    except Exception:  # it is the source that cannot be opened
        return
    name, images = input_key or 'image', [key for key, value in features.items() if isinstance(value, datasets.Image)]
    if name not in images:
        raise InputError(
            f"input_key={name}: must be the column of the images; {dataset} has {', '.join(features)}, of which "
            f"{', '.join(images) or 'none'} holds images")


def _list_shards(root: str) -> str:
    names = [os.path.basename(path) for path in list_tars(root)] if os.path.isdir(root) else []
    return f"; {root} has {', '.join(names[:3])}{', ...' if names[3:] else ''}" if names else ''


def _explain(
        error: Exception, dataset: str, data_dir: str, split: str, split_parameter: str, download: bool) -> InputError:
    """Name the parameter at fault, for whatever a reader's libraries have raised."""
    prefix, source = source_prefix(dataset), f'dataset={dataset}' if dataset else f'data_dir={data_dir}'
    text = reason(error)
    lower = text.lower().replace((data_dir or dataset).lower(), '')  # the user's own names give no hints
    if isinstance(error, ImportError) or 'please install' in lower:
        return InputError(f'dataset={dataset}: needs a package (pip install {_PACKAGES.get(prefix, "timm")})')
    if 'num_samples' in lower:
        hint = ' (or SHARDS|N)' if prefix == 'wds' else ''
        return InputError(f'num_samples: must be given, the number of images in {split} of {dataset}{hint}')
    if 'class map' in lower:
        return InputError(f'class_map: {text}')
    if 'download' in lower and not download:
        return InputError(f'{source}: {text} (`dataset_download` fetches it, `data_dir` says where it is)')
    if prefix == 'wds' and 'not found in info' in lower:
        return InputError(
            f'{split_parameter}={split}: must be the name of shards and their number of images, such as '
            f'shard-{{0000..0012}}.tar|13000, as there is no _info.json with splits{_list_shards(data_dir)}')
    if 'split' in lower:
        return InputError(f'{split_parameter}={split}: {text}')
    return InputError(f'{source}: {text}')


def _first_columns(reader: Any) -> Optional[List[str]]:
    try:
        return list(next(iter(reader.builder.as_streaming_dataset(split=reader.split))))
    except Exception:  # whatever the libraries raise will be raised again, and explained, when images are read
        return None


def _check_opened(opened: Dataset, dataset: str, target_key: Optional[str]) -> None:
    """Raise what timm's readers would raise only later, and let them open tables without a label column."""
    prefix = source_prefix(dataset)
    reader: Any = getattr(opened, 'reader', None)
    if prefix == 'wds':
        for shard in reader.split_info.filenames:
            path = os.path.join(reader.root, shard)
            if '://' not in path and not path.startswith('pipe:') and not os.path.exists(path):
                raise InputError(f'data_dir={reader.root}: no shard {shard}')
    if prefix == 'hfds' and not reader.target_keys \
            and reader.label_key.split('/')[0] not in reader.dataset.column_names:
        if target_key:
            raise InputError(f"target_key={target_key}: must be one of {', '.join(reader.dataset.column_names)}")
        reader.dataset = reader.dataset.add_column(reader.label_key, [-1] * len(reader.dataset))  # unlabelled
    if prefix == 'hfds' and reader.remap_class:
        missing = [str(label) for label in reader._source_names.values() if label not in reader.class_to_idx]
        if missing:
            raise InputError(f"class_map: has no number for {', '.join(missing[:5])}, of {dataset}")
    columns = None
    if prefix == 'hfids' and not reader.target_keys:
        columns = reader.builder.info.features or _first_columns(reader)
    if columns and reader.target_key.split('/')[0] not in columns:
        if target_key:
            raise InputError(f"target_key={target_key}: must be one of {', '.join(columns)}")
        reader.target_key = reader.input_key  # unlabelled: an image is not a number, which `to_label` makes -1
    if not is_stream(opened) and not len(opened):
        raise InputError(f"{f'dataset={dataset}' if dataset else 'data_dir'}: has no images")


def _check_applicable(dataset: str, data_dir: str, **given: Any) -> None:
    """Refuse parameters that a source would ignore, or does not take."""
    kind = 'torch' if dataset == 'digits' else source_prefix(dataset)
    for parameter, sources in (
            ('class_map', ('torch',)),
            ('input_key', ('torch',)),
            ('target_key', ('torch', '')),
            ('num_samples', ('torch', '', 'hfds')),
            ('in_chans', ('torch', 'hfids', 'tfds')),
    ):
        if given[parameter] and kind in sources:
            value = given[parameter] if isinstance(given[parameter], (int, str)) else ''
            raise InputError(f"{parameter}={value}: does not apply to {dataset or f'{data_dir}, a folder or a tar'}")


def create_decoding(
        in_chans: int = 3,
        pixel_range: Optional[Sequence[float]] = None,
        max_pixels: Optional[int] = None,
        exif_orientation: bool = True,
) -> Decoding:
    """The way to decode images; the parameters are explained at `open_dataset`.

    Raises:
        InputError: no channel, an empty range
    """
    low, high = pixel_range or (0, 1)
    if not -math.inf < low < high < math.inf:
        raise InputError(f'pixel_range={low:g} {high:g}: the first must be below the second')
    return Decoding(
        image_mode(in_chans), (low, high) if pixel_range else None, max_pixels or MAX_PIXELS, exif_orientation)


def open_dataset(
        dataset: Optional[str],
        data_dir: Optional[str],
        split: Optional[str] = 'train',
        *,
        is_training: bool = False,
        batch_size: int = 1,
        seed: int = 42,
        in_chans: int = 3,
        dataset_download: bool = False,
        dataset_trust_remote_code: bool = False,
        class_map: Union[str, Dict[str, int]] = '',
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        num_samples: Optional[int] = None,
        pixel_range: Optional[Sequence[float]] = None,
        max_pixels: Optional[int] = None,
        exif_orientation: bool = True,
        search_split: bool = True,
        split_parameter: str = 'train_split',
) -> Dataset:
    """Open a data set of (PIL image, target) items, which carries the way to decode its images (`Decoding`).

    Args:
        dataset: empty for a folder or a tar at `data_dir`; `digits`; `torch/...` (also `torch/stl10`), `hfds/...`,
            `hfids/...`, `wds/...`, `tfds/...` as in timm's `create_dataset`
        data_dir: folder, tar, or where the named data set lies or is cached
        split: name of the split. `train` is all of a folder without such a subfolder, and train + unlabeled of STL-10
        is_training: whether streams shuffle and repeat
        batch_size, seed: of streams
        in_chans: 3 for colour, 1 for grey images; another number for TIFF and NumPy (`.npy`) files of as many bands
        dataset_download: whether data sets may be downloaded
        dataset_trust_remote_code, class_map, input_key, target_key, num_samples: see `timm.data.create_dataset`
        pixel_range: values of images of more than 8 bits that become 0 and 255; default 0 and 65535 of integers, 0 and
            1 of floating point values
        max_pixels: larger images are not read, as unreadable ones; default Pillow's limit
        exif_orientation: whether images are turned as their EXIF tag says
        search_split: whether the split may be a subfolder of `data_dir`
        split_parameter: name of the parameter that `split` comes from, for errors

    Raises:
        InputError: the data set cannot be opened
    """
    dataset, data_dir, split = dataset or '', data_dir or '', split or 'train'
    decoding, prefix = create_decoding(in_chans, pixel_range, max_pixels, exif_orientation), source_prefix(dataset)
    if dataset != 'digits':
        _check_name(dataset, data_dir, split, split_parameter)
    _check_applicable(
        dataset, data_dir, class_map=class_map, input_key=input_key, target_key=target_key, num_samples=num_samples,
        in_chans=in_chans not in (1, 3) and in_chans)
    if dataset == 'digits':
        with checking(split_parameter, split, ValueError):
            return Digits(split, decoding.mode)
    if not prefix or dataset.lower() in _TORCH_FOLDERS:
        data_dir = _find_images(data_dir, split, search_split, split_parameter)
    keys = {key: value for key, value in (('input_key', input_key), ('target_key', target_key)) if value}
    try:
        with rank_zero_first() if dataset_download else contextlib.nullcontext():
            opened = _open(
                dataset, decoding, dataset_download, dataset_trust_remote_code, root=data_dir or None, split=split,
                class_map=class_map, is_training=is_training, batch_size=batch_size, num_samples=num_samples,
                seed=seed, **keys)
    except (AttributeError, TypeError):  # a bug rather than a wrong parameter
        raise
    except Exception as error:  # timm's readers raise whatever their libraries do
        if prefix == 'hfds':
            _check_image_column(dataset, data_dir or None, split, input_key)
        raise _explain(error, dataset, data_dir, split, split_parameter, dataset_download) from error
    if prefix == 'hfds':
        images = opened.reader.dataset.data.column(opened.reader.image_key)
        if images.null_count == len(images):  # the library adds the column that it lacks
            _check_image_column(dataset, data_dir or None, split, input_key)
    _check_opened(opened, dataset, target_key)
    opened.decoding = decoding
    return opened

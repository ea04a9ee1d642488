"""Where images come from: timm's data sets, torchvision's STL-10, the embedded digits."""
import contextlib
import os
import re
from typing import Any, Dict, List, Optional, Union

from timm.data import ImageDataset, IterableImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset

from timm_cgh.errors import InputError

from .decode import more_extensions
from .digits import Digits
from .shards import ShardReader
from .tars import TarReader
from .turns import downloading_in_turn

__all__ = ['data_name', 'find_split_folder', 'image_mode', 'is_stream', 'num_images', 'open_dataset', 'prefix_of']

_PACKAGES = {
    'torch': 'torchvision', 'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow-datasets'}
_SYNONYMS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))
_TORCH_FOLDERS = ('torch/image_folder', 'torch/folder')
_TORCH_TRAIN_TEST = tuple(f'torch/{n}' for n in ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist'))
_TORCH_OTHERS = ('torch/stl10', 'torch/imagenet', 'torch/inaturalist', 'torch/inat', 'torch/places365')
_STL10_SPLITS = {'train': 'train+unlabeled', **{name: 'test' for name in _SYNONYMS[1]}}


def image_mode(in_chans: int) -> str:
    """PIL mode of images with so many channels.

    Raises:
        InputError: neither 1 nor 3
    """
    if in_chans not in (1, 3):
        raise InputError(f'--in-chans {in_chans}: images have 3 channels (colour) or 1 (grey)')
    return 'L' if in_chans == 1 else 'RGB'


def is_stream(dataset: Dataset) -> bool:
    """Whether a data set has no order of its own (wds/, hfids/, tfds/)."""
    return isinstance(dataset, IterableDataset)


def num_images(dataset: Dataset) -> int:
    """Images in a data set, over all processes.

    timm's streams count otherwise: the share of one process, rounded up to whole batches of every worker.
    """
    reader = getattr(dataset, 'reader', None)
    return int(reader.num_samples) if is_stream(dataset) and hasattr(reader, 'num_samples') else len(dataset)


def prefix_of(name: str) -> str:
    """`hfds` of `hfds/owner/name`; empty for a folder, a tar and the digits."""
    return name.partition('/')[0].lower() if '/' in name else ''


def data_name(name: str, root: Optional[str]) -> str:
    """What to call a data set on paper: `cifar10` of `torch/cifar10`, `owner/name` of the Hub's, else the folder's name.

    Nothing of where it lies stays, and nothing that is no name: shards may be read by a command with a login in it.

    Args:
        name, root: `--dataset` and `--data-dir`
    """
    prefix = prefix_of(name)
    parts = [p for p in ((name.partition('/')[2] if prefix in _PACKAGES else name) or root or '').split('/') if p]
    while len(parts) > 1 and parts[-1].lower() in _SYNONYMS[0]:
        parts.pop()
    if not (prefix in ('hfds', 'hfids') and len(parts) == 2 and parts[0].strip('.~')):
        parts = parts[-1:]
    text = '/'.join(parts)
    return text if re.fullmatch(r'[\w.-]+(/[\w.-]+)?', text) and text.strip('.') else 'images'


def find_split_folder(root: str, split: str) -> Optional[str]:
    """What holds a split in a folder of splits: the entry of that name or of a synonym (`val`, `valid`, ...)."""
    for name in (split, *next((names for names in _SYNONYMS if split in names), ())):
        path = os.path.join(root, name)
        if os.path.exists(path):
            return path
    return None


def _open_root(root: str, split: str, search_split: bool, flag: str) -> str:
    """The folder or tar to read; timm itself would silently read all of `root` where it finds no such split."""
    if not os.path.exists(root):
        raise InputError(f'--data-dir {root}: no such folder or file')
    if os.path.isfile(root):
        if not root.endswith('.tar'):
            raise InputError(f'--data-dir {root}: must be a folder of images or an uncompressed .tar of them')
        if split not in _SYNONYMS[0]:
            raise InputError(f'{flag} {split}: a tar has no splits; give --data-dir a folder of them')
        return root
    folder = find_split_folder(root, split) if search_split else None
    if folder is None and search_split and split not in _SYNONYMS[0]:
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() or entry.name.endswith('.tar'))
        raise InputError(f"{flag} {split}: not in {root}, which has {', '.join(found[:8]) or 'no folders'}")
    return folder or root  # no split folders: all of it is for training


def _check_name(name: str, root: Optional[str], split: str, flag: str) -> None:
    prefix, lower = prefix_of(name), name.lower()
    if name and not prefix:
        raise InputError(f'--dataset {name}: no such data set; digits, torch/{name} or hfds/... (or --data-dir alone)?')
    if prefix and prefix not in _PACKAGES:
        raise InputError(f'--dataset {name}: must start with torch/, hfds/, hfids/, wds/ or tfds/, or be digits')
    if prefix in ('', 'torch', 'wds') and not root:
        raise InputError(
            f"--data-dir: say where {name or 'the images'} lie" + (' or shall go' if prefix == 'torch' else ''))
    known = (*_TORCH_TRAIN_TEST, *_TORCH_OTHERS, *_TORCH_FOLDERS)
    if prefix == 'torch' and lower not in known:
        raise InputError(f"--dataset {name}: there are {', '.join(known)}")
    if lower in _TORCH_TRAIN_TEST and split not in (*_SYNONYMS[0], *_SYNONYMS[1], 'test'):
        raise InputError(f'{flag} {split}: {name} has train and validation')
    if prefix == 'wds' and '://' not in root and not os.path.isdir(root):
        raise InputError(f'--data-dir {root}: must be a folder of webdataset shards')
    source = name.partition('/')[2]
    if prefix in ('hfds', 'hfids') and source.startswith(('.', '/', '~')) and not os.path.exists(source):
        raise InputError(f'--dataset {name}: no such folder: {source}')


def _explain(error: Exception, name: str, root: Optional[str], split: str, flag: str, download: bool) -> InputError:
    """One line that names the flag, for whatever a reader's libraries raised."""
    prefix, where = prefix_of(name), f'--dataset {name}' if name else f'--data-dir {root}'
    reason = (' '.join(str(error).split()) or type(error).__name__)[:300]
    lower = reason.lower().replace((root or name).lower(), '')  # no hints from the user's own names
    if isinstance(error, ImportError) or 'please install' in lower:
        return InputError(f'--dataset {name}: needs a package (pip install {_PACKAGES.get(prefix, "timm")})')
    if 'num_samples' in lower:
        hint = ' (or SHARDS|N)' if prefix == 'wds' else ''
        return InputError(f'--num-samples: say how many images {name} {split} has{hint}')
    if 'class map' in lower:
        return InputError(f'--class-map: {reason}')
    if 'download' in lower and not download:
        return InputError(f'{where}: {reason} (--dataset-download fetches it, --data-dir says where it is)')
    if 'split' in lower:
        return InputError(f'{flag} {split}: {reason}')
    return InputError(f'{where}: {reason}')


def _first_columns(reader: Any) -> Optional[List[str]]:
    try:
        return list(next(iter(reader.builder.as_streaming_dataset(split=reader.split))))
    except Exception:  # whatever the stream's libraries raise; it comes again, and is explained, where images are read
        return None


def _check_opened(dataset: Dataset, name: str, target_key: Optional[str]) -> None:
    """What timm's readers would only stumble over later."""
    prefix, reader = prefix_of(name), getattr(dataset, 'reader', None)
    if prefix == 'wds':
        for shard in reader.split_info.filenames:
            path = os.path.join(reader.root, shard)
            if '://' not in path and not path.startswith('pipe:') and not os.path.exists(path):
                raise InputError(f'--data-dir {reader.root}: no shard {shard}')
    if prefix == 'hfds' and not reader.target_keys \
            and reader.label_key.split('/')[0] not in reader.dataset.column_names:
        if target_key:
            raise InputError(f"--target-key {target_key}: the columns are {', '.join(reader.dataset.column_names)}")
        reader.dataset = reader.dataset.add_column(reader.label_key, [-1] * len(reader.dataset))  # unlabelled
    if prefix == 'hfds' and reader.remap_class:
        missing = [str(label) for label in reader._source_names.values() if label not in reader.class_to_idx]
        if missing:
            raise InputError(f"--class-map: has no number for {', '.join(missing[:5])}, of {name}")
    columns = None
    if prefix == 'hfids' and not reader.target_keys:
        columns = reader.builder.info.features or _first_columns(reader)
    if columns and reader.target_key.split('/')[0] not in columns:
        if target_key:
            raise InputError(f"--target-key {target_key}: the columns are {', '.join(columns)}")
        reader.target_key = reader.input_key  # unlabelled: what is no number counts as no class
    if not is_stream(dataset) and not len(dataset):
        raise InputError(f'--dataset {name}: holds no images')


def open_dataset(
        name: Optional[str],
        root: Optional[str],
        split: Optional[str] = 'train',
        *,
        is_training: bool = False,
        batch_size: int = 1,
        seed: int = 42,
        in_chans: int = 3,
        download: bool = False,
        class_map: Union[str, Dict[str, int]] = '',
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        num_samples: Optional[int] = None,
        search_split: bool = True,
        trust_remote_code: bool = False,
        split_flag: str = '--train-split',
) -> Dataset:
    """Open a data set of (PIL image, target) items.

    Args:
        name: empty for a folder or a tar at `root`; `digits`; `torch/...` (`torch/stl10` too), `hfds/...`, `hfids/...`,
            `wds/...`, `tfds/...` as timm's `create_dataset` reads them
        root: folder, tar, or where the named data set lies or is cached
        split: name of the split. `train` is all of a folder without such a sub-folder, and train + unlabelled of STL-10
        is_training: shuffle and repeat (streams)
        in_chans: 3 for colour, 1 for grey images
        search_split: look for the split's sub-folder in `root`
        split_flag: the option to name where the split is at fault
        others: see `timm.data.create_dataset`

    Raises:
        InputError: the data set cannot be opened; names the flag and what would be right
    """
    name, split, mode = name or '', split or 'train', image_mode(in_chans)
    if name == 'digits':
        return Digits(split, mode)
    _check_name(name, root, split, split_flag)
    if prefix_of(name) == '' or name.lower() in _TORCH_FOLDERS:
        root = _open_root(root, split, search_split, split_flag)
    optional = {key: value for key, value in (('input_key', input_key), ('target_key', target_key)) if value}
    in_turn = downloading_in_turn() if download else contextlib.nullcontext()
    try:
        if name.lower() == 'torch/stl10':
            from torchvision.datasets import STL10
            with in_turn:
                return STL10(root, split=_STL10_SPLITS.get(split, split), download=download)
        options = dict(
            root=root, split=split, class_map=class_map, is_training=is_training, batch_size=batch_size,
            num_samples=num_samples, seed=seed, input_img_mode=mode, **optional)
        if prefix_of(name) == 'wds':
            dataset = IterableImageDataset(root, reader=ShardReader(name=name.partition('/')[2], **options))
        elif not name and os.path.isfile(root):
            dataset = ImageDataset(root, reader=TarReader(root, class_map=class_map, **optional), input_img_mode=mode)
        else:
            with in_turn, more_extensions():
                dataset = create_dataset(
                    name, search_split=False, download=download, trust_remote_code=trust_remote_code, **options)
    except TypeError as error:
        given = next((key for key in optional if key in str(error)), None)
        if given:
            raise InputError(f"--{given.replace('_', '-')}: has no meaning for {name or root}") from error
        raise _explain(error, name, root, split, split_flag, download) from error
    except Exception as error:  # timm's readers raise whatever their libraries do
        raise _explain(error, name, root, split, split_flag, download) from error
    _check_opened(dataset, name, target_key)
    return dataset

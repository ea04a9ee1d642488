"""Embeddings on disk: parts that are written while they are computed, joined into one file with the images' names."""
import csv
import json
import os
import shutil
import uuid
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from timm_cgh.errors import InputError, checking
from timm_cgh.files import atomic_path, atomic_write, check_file, make_folder

from .images import write_unreadable

__all__ = ['Embeddings', 'Parts', 'check_output', 'join_parts', 'read_embeddings']

_Blocks = Iterator[Tuple[Sequence[str], np.ndarray]]  # names and (n, D) float32 rows
_MAX_HEADER = 100_000_000  # bytes, of safetensors files that can be read


class Embeddings(NamedTuple):
    """names: of the N images; features: (N, D) float32."""
    names: List[str]
    features: torch.Tensor


# ---- parts

class Parts:
    """Embeddings of some of the images, in files of a folder that are complete or absent.

    Args:
        folder: of the parts, made if absent
        names: of all images, all different
        settings: what all parts must have in common; values for JSON
        part_size: images per part, at least

    Raises:
        InputError: the folder holds what is not such a part, or a part with other settings
    """

    def __init__(self, folder: str, names: Sequence[str], settings: Mapping[str, Any], part_size: int = 4096):
        self.folder, self.names, self.part_size = Path(folder), names, part_size
        self.settings: Dict[str, Any] = json.loads(json.dumps(settings))
        make_folder(folder, 'output', folder)
        self._begin()
        self.scan()

    def scan(self) -> None:
        """Find out which images are in the parts: those of other processes and of earlier runs."""
        positions = {name: position for position, name in enumerate(self.names)}
        self.files = sorted(self.folder.glob('*.safetensors'))
        self.unreadable: List[Tuple[str, str]] = []  # names and reasons
        self.width = 0
        # each image's part, and its row there; -1: not done, row -1: unreadable
        self.places = np.full((len(self.names), 2), -1, dtype=np.int32)
        for number, path in enumerate(self.files):
            with checking(str(path), None, KeyError, SafetensorError, ValueError), safe_open(path, 'np') as file:
                about = json.loads(file.metadata()['part'])
                self.width = max(self.width, file.get_slice('features').get_shape()[1])
            for key, value in self.settings.items():
                if about['settings'].get(key) != value:
                    raise InputError(
                        f"output={self.folder}: was begun with other settings: {key.replace('_', ' ')}; delete it, or "
                        f'choose another file')
            for row, name in enumerate(about['names']):
                if name in positions:
                    self.places[positions[name]] = number, row
            for name, why in about['unreadable']:
                if name in positions and self.places[positions[name], 0] < 0:
                    self.places[positions[name]] = number, -1
                    self.unreadable.append((name, why))
        self.unreadable.sort(key=lambda item: positions[item[0]])

    def remaining(self) -> torch.Tensor:
        """(n,) indices of the images that are in no part."""
        return torch.from_numpy(np.flatnonzero(self.places[:, 0] < 0))

    def add(self, features: torch.Tensor, names: Sequence[str], unreadable: Sequence[Tuple[str, str]]) -> None:
        """Add images, to be written once they are enough for a part.

        Args:
            features: (n, D) rows
            names: of their images
            unreadable: names of images that cannot be read, each with the reason
        """
        self._rows += [features] if names else []
        self._names += names
        self._unreadable += unreadable
        if len(self._names) + len(self._unreadable) >= self.part_size:
            self.flush()

    def flush(self) -> None:
        """Write a part of what has been added since the last one."""
        if self._names or self._unreadable:
            features = torch.cat(self._rows) if self._rows else torch.empty(0, 0)
            about = json.dumps(dict(settings=self.settings, names=self._names, unreadable=self._unreadable))
            path = self.folder / f'{uuid.uuid4().hex}.safetensors'
            with checking('output', self.folder, OSError, SafetensorError), atomic_path(path) as temporary:
                save_file({'features': features}, temporary, {'part': about})
        self._begin()

    def _begin(self) -> None:
        self._rows: List[torch.Tensor] = []
        self._names: List[str] = []
        self._unreadable: List[Tuple[str, str]] = []

    def blocks(self) -> _Blocks:
        """The rows in the order of the images, a few megabytes at a time."""
        order = np.flatnonzero(self.places[:, 1] >= 0)
        number, row = self.places[order].T
        starts = np.flatnonzero((np.diff(number, prepend=-1) != 0) | (np.diff(row, prepend=-1) != 1))
        for begin, end in zip(starts, [*starts[1:], len(order)]):
            with safe_open(self.files[number[begin]], 'np') as file:  # not kept open: its pages count as memory in use
                rows = file.get_slice('features')[int(row[begin]):int(row[end - 1]) + 1]
            yield [self.names[int(index)] for index in order[begin:end]], rows


# ---- one file

def _write_parquet(path: Path, names: Sequence[str], width: int, blocks: _Blocks, about: Dict[str, str]) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter
    schema = pa.schema(
        [('file_name', pa.string()), ('embedding', pa.list_(pa.float32(), width))], metadata=about)
    with ParquetWriter(path, schema) as writer:
        for names, rows in blocks:
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), width)
            writer.write_table(pa.table([pa.array(names, pa.string()), column], schema=schema))


def _write_csv(path: Path, names: Sequence[str], width: int, blocks: _Blocks, about: Dict[str, str]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['file_name', *range(width)])
        for names, rows in blocks:
            writer.writerows([name, *(f'{value:.9g}' for value in row)] for name, row in zip(names, rows.tolist()))


def _names_path(path: Path) -> Path:
    return path.with_name(f'{path.stem}.names.txt')


def _write_npy(path: Path, names: Sequence[str], width: int, blocks: _Blocks, about: Dict[str, str]) -> None:
    with open(path, 'wb') as file:
        header = dict(descr='<f4', fortran_order=False, shape=(len(names), width))
        np.lib.format.write_array_header_1_0(file, header)
        for _, rows in blocks:
            file.write(rows.astype('<f4').tobytes())


def _write_safetensors(path: Path, names: Sequence[str], width: int, blocks: _Blocks, about: Dict[str, str]) -> None:
    """By hand, as safetensors' own writer wants the whole matrix in memory."""
    tensor = dict(dtype='F32', shape=[len(names), width], data_offsets=[0, 4 * len(names) * width])
    # names as they are: in ASCII, each other letter would take six bytes
    about = {**about, 'file_names': json.dumps(names, ensure_ascii=False)}
    header = json.dumps({'__metadata__': about, 'features': tensor}, ensure_ascii=False).encode()
    header += b' ' * (-len(header) % 8)
    if len(header) > _MAX_HEADER:
        raise InputError(f'output: {len(names)} names are too many for the header of a safetensors file, take .parquet')
    with open(path, 'wb') as file:
        file.write(len(header).to_bytes(8, 'little') + header)
        for _, rows in blocks:
            file.write(rows.astype('<f4').tobytes())


_WRITERS: Dict[str, Callable[[Path, Sequence[str], int, _Blocks, Dict[str, str]], None]] = {
    '.parquet': _write_parquet, '.csv': _write_csv, '.npy': _write_npy, '.safetensors': _write_safetensors}


def _need_pyarrow(parameter: str, path: str) -> None:
    if path.endswith('.parquet') and find_spec('pyarrow') is None:
        raise InputError(f"{parameter}={path}: needs pyarrow, pip install 'timm-cgh[embed]'")


def check_output(output: str, overwrite: bool = False) -> None:
    """Check that a file of embeddings can be written, before hours are spent on them.

    Raises:
        InputError: an unknown ending, a missing package, no folder to write to, or the file of a finished run
    """
    check_file(output, 'output', _WRITERS)
    _need_pyarrow('output', output)
    if os.path.exists(output) and not overwrite and not os.path.exists(f'{output}.parts'):
        raise InputError(f'output={output}: exists; `overwrite` replaces it')


def join_parts(parts: Parts, output: str) -> str:
    """Write the rows of all parts into one file and the unreadable images' names into another; delete the parts.

    The file has a row per image, in the order of the images, with its name: the column `file_name` of Parquet and CSV,
    the metadatum `file_names` (JSON) of safetensors, a line of `<stem>.names.txt` beside NPY. Memory stays flat.

    Returns:
        text for the log

    Raises:
        InputError: it cannot be written, or no image can be read
    """
    path = Path(output)
    names = [parts.names[int(index)] for index in np.flatnonzero(parts.places[:, 1] >= 0)]
    if not names:
        name, why = parts.unreadable[0]
        raise InputError(f'data_dir: none of {len(parts.unreadable)} images can be read, {name} among them ({why})')
    about = {key: value if isinstance(value, str) else json.dumps(value) for key, value in parts.settings.items()}
    with checking('output', output, OSError):
        if path.suffix == '.npy':
            with atomic_write(_names_path(path)) as file:
                file.writelines(f'{name}\n' for name in names)
        with atomic_path(path) as temporary:
            _WRITERS[path.suffix](temporary, names, parts.width, parts.blocks(), about)
        unreadable = write_unreadable(output, parts.unreadable)
    shutil.rmtree(parts.folder)
    return f'{output}: {len(names)} embeddings of {parts.width} values{unreadable}'


def _read_parquet(path: Path) -> Embeddings:
    from pyarrow.parquet import read_table
    table = read_table(path, columns=['file_name', 'embedding'])
    features = table['embedding'].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return Embeddings(table['file_name'].to_pylist(), torch.from_numpy(features.reshape(len(table), -1).copy()))


def _read_csv(path: Path) -> Embeddings:
    names, rows = [], []
    with open(path, newline='', encoding='utf-8') as file:
        for name, *values in islice(csv.reader(file), 1, None):
            names.append(name)
            rows.append(np.array(values, dtype=np.float32))
    return Embeddings(names, torch.from_numpy(np.stack(rows)))


def _read_npy(path: Path) -> Embeddings:
    names = _names_path(path).read_text(encoding='utf-8').split('\n')[:-1]
    return Embeddings(names, torch.from_numpy(np.load(path, allow_pickle=False)))


def _read_safetensors(path: Path) -> Embeddings:
    with safe_open(path, 'pt') as file:
        return Embeddings(json.loads(file.metadata()['file_names']), file.get_tensor('features'))


def read_embeddings(path: str) -> Embeddings:
    """Embeddings from a file that `join_parts` has written.

    Raises:
        InputError: no such file, a missing package, or not such a file
    """
    readers = {
        '.parquet': _read_parquet, '.csv': _read_csv, '.npy': _read_npy, '.safetensors': _read_safetensors}
    if Path(path).suffix not in readers:
        raise InputError(f"embeddings={path}: must end in {', '.join(readers)}")
    _need_pyarrow('embeddings', path)
    with checking('embeddings', path, OSError, KeyError, SafetensorError, TypeError, ValueError):
        embeddings = readers[Path(path).suffix](Path(path))
        if embeddings.features.ndim != 2 or len(embeddings.names) != len(embeddings.features):
            raise ValueError('names and rows do not match')
    return Embeddings(embeddings.names, embeddings.features.float())

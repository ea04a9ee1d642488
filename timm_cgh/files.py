"""Files that are whole or absent (written beside their name, then renamed into place); YAML, JSON, CSV."""
import csv
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterable, Iterator, List, Literal, Mapping, Sequence, Union

import yaml

from .errors import InputError

__all__ = [
    'Summary', 'atomic_path', 'atomic_write', 'check_file', 'epochs_done', 'make_folder', 'read_json', 'read_resolved',
    'read_rows', 'read_yaml', 'sync', 'write_csv', 'write_yaml']


@contextmanager
def atomic_path(path: Union[str, Path]) -> Iterator[Path]:
    """Path in the same folder to write to; it takes the place of `path` when the block ends without an exception.

    For writers that want a name rather than an open file (safetensors). Who reads `path` meanwhile, or finds it after a
    kill, sees the old content; what a kill leaves is a hidden `.<name>.<process id>.tmp`, which the next writer with
    that id replaces. The folder must exist; an `OSError` always has its `filename`.
    """
    path = Path(path)
    # not tempfile: its files are readable by their owner only, whatever the umask
    temp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temp
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp, 0o666 & ~umask)  # some writers (safetensors) make theirs readable by the owner only
        sync(temp)
        os.replace(temp, path)  # the same folder, hence the same file system: atomic
    except OSError as error:
        error.filename = error.filename or str(path)  # what a full disk does not say
        raise
    finally:
        temp.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Union[str, Path], mode: Literal['w', 'wb'] = 'w') -> Iterator[IO]:
    """Open file whose content takes the place of `path` when the block ends without an exception, see `atomic_path`.

    Args:
        path: file to write
        mode: 'w' (UTF-8, newlines as given: what the csv module asks for) or 'wb'
    """
    encoding, newline = ('utf-8', '') if mode == 'w' else (None, None)
    with atomic_path(path) as temp, open(temp, mode, encoding=encoding, newline=newline) as file:
        yield file


def sync(path: Union[str, Path]) -> None:
    """Have a file's content on the disk before it is renamed: a power cut must not leave an empty one."""
    with open(path, 'rb') as file:
        os.fsync(file.fileno())


def make_folder(folder: str, parameter: str, value: str) -> None:
    """Make a folder where there is none, and check that files can be written to it.

    Args:
        folder: to make, with its parents
        parameter, value: the parameter that asks for it, and what it was set to

    Raises:
        InputError: it cannot be made or written to
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f'{parameter}={value}: cannot write to {folder} ({error.strerror})') from error


def check_file(path: str, parameter: str, endings: Iterable[str]) -> None:
    """Check before the work that a file can be written after it; its folder is made.

    Raises:
        InputError: another ending, or a folder that cannot be made or written to
    """
    if not path.endswith(tuple(endings)):
        raise InputError(f"{parameter}={path}: must end in {' or '.join(endings)}")
    make_folder(os.path.dirname(path) or '.', parameter, path)


class _Loader(yaml.SafeLoader):
    """Refuses aliases, with which a few lines can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError('aliases (*name) are not supported')
        return super().compose_node(parent, index)


def _read_mapping(path: Union[str, Path], parse: Callable[[str], Any]) -> Dict[str, Any]:
    try:
        content = parse(Path(path).read_text(encoding='utf-8'))
    except Exception as error:  # of odd content PyYAML raises many types, AttributeError and RecursionError among them
        why = error.strerror if isinstance(error, OSError) else ' '.join(str(error).split())
        raise InputError(f'{path}: {why[:300] if why else type(error).__name__}') from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f'{path}: must hold values by name ("name: value")')
    return content


def read_yaml(path: Union[str, Path]) -> Dict[str, Any]:
    """Content of a YAML file that holds values by name; an empty file has none.

    Raises:
        InputError: no such file, or not such a file; starts with the path
    """
    return _read_mapping(path, lambda text: yaml.load(text, _Loader) or {})


def read_resolved(run: Union[str, Path]) -> Dict[str, Any]:
    """Content of the `resolved.yaml` in a run's folder: what its `options` came to, and more.

    Raises:
        InputError: no such file, or not such a file; starts with the path
    """
    path = Path(run, 'resolved.yaml')
    resolved = read_yaml(path)
    if not isinstance(resolved.get('options'), dict):
        raise InputError(f'{path}: not of a run of train.py')
    return resolved


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a list that stands in two places is written twice: readers refuse aliases


def write_yaml(path: Union[str, Path], content: Mapping[str, Any]) -> None:
    """Write plain values by name to a YAML file, in their order."""
    with atomic_write(path) as file:
        yaml.dump(dict(content), file, _Dumper, default_flow_style=None, sort_keys=False)


def read_json(path: Union[str, Path]) -> Dict[str, Any]:
    """Content of a JSON file that holds values by name.

    Raises:
        InputError: no such file, or not such a file; starts with the path
    """
    return _read_mapping(path, json.loads)


def write_csv(path: Union[str, Path], header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table to a CSV file."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)


def read_rows(path: Union[str, Path], unit: str = 'epoch') -> List[Dict[str, str]]:
    """Rows of a `summary.csv`, values as text; none where there is no such file.

    Args:
        path: the file
        unit: column that numbers the rows

    Raises:
        InputError: a row that is not made of a number of the unit and numbers, or blanks; starts with the path
    """
    if not os.path.exists(path):
        return []
    rows: List[Dict[str, str]] = []
    try:
        with open(path, newline='', encoding='utf-8') as file:
            for row in csv.DictReader(file):
                if not 0 <= int(row[unit]) < 2 ** 40:
                    raise ValueError
                for value in row.values():
                    float(value if value != '' else 0)
                rows.append(row)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # short rows hold None, long ones a list
        raise InputError(f'{path}: row {len(rows) + 1} is damaged, must be an {unit} and numbers') from error
    return rows


def epochs_done(rows: Sequence[Mapping[str, Any]]) -> int:
    """Epochs behind the last row; there may be fewer rows, where a run went on in another folder."""
    return int(rows[-1]['epoch']) + 1 if rows else 0


class Summary:
    """Rows of a run's `summary.csv` under timm's column names, rewritten in one rename per row.

    Columns may appear late or stay blank (a kNN check every few epochs, InfoNCE only in the warm-up).

    Args:
        path: the file
        start: rows of earlier epochs are kept, later ones (of a run that is resumed before them) dropped
        unit: column that numbers the rows

    Raises:
        InputError: see `read_rows`
    """

    def __init__(self, path: str, start: int = 0, unit: str = 'epoch'):
        self.path = path
        self.rows: List[Dict[str, Any]] = []
        if start:
            self.rows = [
                {name: int(text) if text.isdigit() else float(text) for name, text in row.items() if text}
                for row in read_rows(path, unit) if int(row[unit]) < start]

    def add(self, row: Dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        write_csv(self.path, names, ([r.get(name, '') for name in names] for r in self.rows))

"""Files that are whole or absent: written beside their name, then renamed into place; and folders to write them to."""
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Iterator, Union

from .errors import InputError

__all__ = ['atomic_path', 'atomic_write', 'make_folder']


@contextmanager
def atomic_path(path: Union[str, Path]) -> Iterator[Path]:
    """Path in the same folder to write to; it takes the place of `path` when the block ends without an exception.

    For writers that want a name rather than an open file (safetensors). Who reads `path` meanwhile, or finds it after a
    kill, sees the old content; what a kill leaves is a hidden `.<name>.<process id>.tmp`, which the next writer with
    that id replaces.

    Args:
        path: file to write; its folder must exist

    Raises:
        OSError: the folder is missing or not writable, the disk is full, ...
    """
    path = Path(path)
    # not tempfile: its files are readable by their owner only, whatever the umask
    temp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temp
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp, 0o666 & ~umask)  # some writers (safetensors) make theirs readable by the owner only
        os.replace(temp, path)  # the same folder, hence the same file system: atomic
    finally:
        temp.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Union[str, Path], mode: str = 'w') -> Iterator[IO]:
    """Open file whose content takes the place of `path` when the block ends without an exception.

    Args:
        path: file to write; its folder must exist
        mode: 'w' (UTF-8, newlines as given: what the csv module asks for) or 'wb'

    Raises:
        ValueError: a mode that does not start from an empty file
        OSError: the folder is missing or not writable, the disk is full, ...
    """
    if mode not in ('w', 'wb'):
        raise ValueError(f"mode is 'w' or 'wb', not {mode!r}")
    text = dict(encoding='utf-8', newline='') if mode == 'w' else {}
    with atomic_path(path) as temp, open(temp, mode, **text) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # or a power cut after the rename could leave an empty file under the good name


def make_folder(folder: str, flag: str, value: str) -> None:
    """Make a folder where there is none, and see that files can be written to it.

    Args:
        folder: to make, with its parents
        flag, value: command line option that asks for it, and what it was set to

    Raises:
        InputError: it cannot be made or written to
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f'{flag} {value}: cannot write to {folder} ({error.strerror})') from error

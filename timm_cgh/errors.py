"""What a user can put right: one line, no traceback."""
from contextlib import contextmanager
from typing import Any, Iterator

__all__ = ['InputError', 'blame']


class InputError(ValueError):
    """A setting or a file that cannot be used; the text names it and says what would be right. Scripts exit with 2."""


@contextmanager
def blame(flag: str, value: Any = '') -> Iterator[None]:
    """What a library raises about a setting becomes an `InputError` that names the setting.

    Args:
        flag: command line option
        value: what it was set to, of a switch nothing
    """
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'{flag} {value}'.rstrip() + f': {reason}') from error

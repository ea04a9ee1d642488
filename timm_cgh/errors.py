"""Errors that a user can put right."""
import errno
import os
import re
from contextlib import contextmanager
from typing import Any, Iterator, Optional, Type

__all__ = ['DEBUG', 'InputError', 'checking', 'full_disk', 'reason', 'redact']

DEBUG = os.environ.get('TIMM_CGH_DEBUG', '') not in ('', '0')


def redact(value: Any) -> Any:
    """A text, or the values of a dictionary, without what may hold a login.

    That is the part before the host in an address, its query, and a command behind `pipe:` but for its first word.
    """
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if not isinstance(value, str) or ('://' not in value and 'pipe:' not in value):
        return value
    value = re.sub(r'(pipe:\s*\S*)\s(.*\.tar|.*)', r'\1 ***', value, flags=re.DOTALL)
    value = re.sub(r'://[^/@\s]+@', '://***@', value)
    return re.sub(r'(://[^\s?]+\?)\S+', r'\1***', value)


class InputError(ValueError):
    """A parameter or a file that a user can put right.

    The message is one line: what is at fault and what would be right. A parameter comes first, with its value where
    that helps (`bank_size=0: must be at least 1`); other parameters are named in backticks. The scripts print it with
    options in place of parameter names (`timm_cgh.arguments`) and exit with code 2.
    """

    def __init__(self, message: str):
        # torch raises an exception of a data worker again with the worker's traceback before its message
        super().__init__(redact(message.rpartition('errors.InputError: ')[2].strip()))


def reason(error: BaseException, limit: int = 300) -> str:
    """First line of an exception's message, or its type where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


def full_disk(error: BaseException) -> Optional[str]:
    """The file, where it is known, that could not be written for lack of space; None if that is not what happened."""
    cause: Optional[BaseException] = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return str(cause.filename or '')
        if 'No space left on device' in str(cause):  # safetensors'
            return ''
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def checking(parameter: str, value: Any = None, *errors: Type[Exception]) -> Iterator[None]:
    """Turn exceptions that a library raises about a parameter's value into an `InputError`.

    Keep the block to the library call that reads the value, and `errors` to what that call raises about a bad one:
    anything else is a bug and keeps its traceback.

    Args:
        parameter: name of the parameter, or a file
        value: what it was set to; None to leave it out of the message
        errors: exception types; default `OSError` and `ValueError`
    """
    try:
        yield
    except InputError:
        raise
    except errors or (OSError, ValueError) as error:  # noqa: B030
        at_fault = parameter if value is None else f'{parameter}={value}'
        raise InputError(f'{at_fault}: {reason(error)}') from error

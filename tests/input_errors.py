"""How the library and the scripts reject bad input."""
import re
from contextlib import contextmanager

import pytest

from timm_cgh.errors import InputError


@contextmanager
def refused(at_fault, *parts):
    """The block raises an `InputError` of one line that starts with the parameter at fault and has the other parts."""
    with pytest.raises(InputError) as caught:
        yield caught
    text = str(caught.value)
    assert '\n' not in text and '--' not in text, text
    assert text.startswith((f'{at_fault}: ', f'{at_fault}=')), text
    assert all(part in text for part in parts), text


def check_refused(capsys, script, argv, *named):
    """A root script, called in this process, ends with exit code 2 and an error line that holds all of `named`.

    Args:
        script: the imported module, with `parser` and `main`
        argv: its arguments, of any type

    Returns:
        all that it wrote to stderr
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.parser.run(script.main, [str(arg) for arg in argv])
    stderr = capsys.readouterr().err
    assert stop.value.code == 2, stderr
    last = stderr.strip().splitlines()[-1]
    assert re.match(r'[^:]+: error: ', last), stderr
    for text in named:
        assert text in last, last
    return stderr

"""Command lines of the scripts: one-line errors with exit code 2, YAML files of options, value types."""
import argparse
import math
import sys
from typing import Any, Callable, NoReturn, Optional, Sequence

import yaml

from timm_cgh.errors import InputError

__all__ = ['Parser', 'at_least_one', 'fraction', 'natural', 'non_negative', 'positive']


def _number(kind: type, accept: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.isinf(value) or not accept(value):
            raise argparse.ArgumentTypeError(f'must be {wanted}, got {text}')
        return value
    return convert


at_least_one = _number(int, lambda v: v >= 1, 'a whole number of at least 1')
natural = _number(int, lambda v: v >= 0, 'a whole number of at least 0')
positive = _number(float, lambda v: v > 0, 'a positive number')
non_negative = _number(float, lambda v: v >= 0, 'a number of at least 0')
fraction = _number(float, lambda v: 0 <= v <= 1, 'a number from 0 to 1')


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` whose errors are one line and whose options may come from a YAML file (`--config`).

    A file's values pass through the same types and choices as the command line's, which overrides them. Keys are the
    options' names with underscores, as in the `args.yaml` that a run writes.
    """

    def error(self, message: str) -> NoReturn:
        print(f'{self.prog}: error: {message}', file=sys.stderr)
        sys.exit(2)

    def run(self, main: Callable[[Optional[Sequence[str]]], int], argv: Optional[Sequence[str]] = None) -> int:
        """The exit code of a script's `main`; an `InputError` ends it with one line and code 2."""
        try:
            return main(argv)
        except InputError as error:  # from a data worker it comes with the worker's traceback before it
            self.error(str(error).strip().splitlines()[-1].removeprefix(f'{InputError.__module__}.InputError: '))

    def parse(
            self,
            argv: Optional[Sequence[str]] = None,
            default_config: Optional[str] = None,
            wants_default: Callable[[argparse.Namespace], bool] = lambda args: False,
    ) -> argparse.Namespace:
        """Parse the command line over the file that it names, or over `default_config` where `wants_default` says so.

        Args:
            argv: arguments, default those of the process
            default_config: YAML file used where none is named
            wants_default: asked with the command line parsed alone
        """
        args = self.parse_args(argv)
        path = args.config or (default_config if wants_default(args) else None)
        if path:
            args = self.parse_args(argv, argparse.Namespace(**self._read(path)))
            args.config = path
        return args

    def _read(self, path: str) -> dict:
        try:
            with open(path, encoding='utf-8') as file:
                values = yaml.safe_load(file) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f'--config {path}: {" ".join(str(error).split())}')
        if not isinstance(values, dict):
            self.error(f'--config {path}: must hold options as "name: value" lines')
        actions = {flag.lstrip('-').replace('-', '_'): action for action in self._actions for flag in action.option_strings}
        actions.update({action.dest: action for action in self._actions})  # as args.yaml has them
        checked = {}
        for key, value in values.items():
            if key not in actions:
                self.error(f'--config {path}: no such option: {key}')
            checked[actions[key].dest] = self._checked(path, actions[key], value)
        return checked

    def _checked(self, path: str, action: argparse.Action, value: Any) -> Any:
        if value is None or isinstance(value, dict):
            return value
        where = f'--config {path}: {action.dest}'
        if isinstance(action.default, bool) and not isinstance(value, bool):
            self.error(f'{where}: must be true or false, got {value!r}')
        fixed = action.nargs if isinstance(action.nargs, int) else 0
        if fixed and (not isinstance(value, list) or len(value) != fixed):
            self.error(f'{where}: must be a list of {action.nargs}, got {value!r}')
        if isinstance(value, list) and not action.nargs:
            self.error(f'{where}: must be one value, got {value!r}')
        items = value if isinstance(value, list) else [value]
        try:
            items = [action.type(str(item)) for item in items] if action.type else items
        except (argparse.ArgumentTypeError, ValueError) as error:
            self.error(f'{where}: {error}')
        for item in items:
            if action.choices is not None and item not in action.choices:
                self.error(f'{where}: {item!r} is not one of {", ".join(map(str, action.choices))}')
        return items if isinstance(value, list) or action.nargs in ('+', '*') else items[0]

"""Command lines of the scripts: options from YAML files, value types, one-line errors that name the flag."""
import argparse
import inspect
import math
import os
import re
import reprlib
import sys
import traceback
from functools import partial
from typing import Any, Callable, Dict, Mapping, NoReturn, Optional, Sequence, Tuple, cast

import torch
from timm.utils import ParseKwargs

from . import scripts
from .errors import DEBUG, InputError, full_disk
from .files import read_yaml
from .models.checkpoints import find_run_arguments

__all__ = [
    'KeyValues', 'Parser', 'add_config_argument', 'add_dataset_arguments', 'add_decoding_arguments',
    'add_device_arguments', 'add_evaluation_arguments', 'add_image_arguments', 'add_input_arguments',
    'add_model_arguments', 'add_run_arguments', 'add_training_arguments', 'arguments_of', 'at_least_one',
    'autocast_dtype', 'deviation', 'fraction', 'natural', 'non_negative', 'positive', 'random_seed']

_CONFIGS = os.path.join(scripts.__path__[-1], 'configs')


def _number(kind: type, low: float, high: float, wanted: str, text: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        wanted = f'at most {high:.10g}' if value > high else wanted
        raise argparse.ArgumentTypeError(f'must be {wanted}, got {text[:60]}')
    return value


_INT32, _FLOAT32 = torch.iinfo(torch.int32), torch.finfo(torch.float32)
at_least_one = partial(_number, int, 1, _INT32.max, 'a whole number of at least 1')
natural = partial(_number, int, 0, _INT32.max, 'a whole number of at least 0')
random_seed = partial(_number, int, 0, 2 ** 32 - 1, 'a whole number of at least 0')  # as NumPy takes them
positive = partial(_number, float, _FLOAT32.tiny, _FLOAT32.max, 'a positive number')
non_negative = partial(_number, float, 0, _FLOAT32.max, 'a number of at least 0')
fraction = partial(_number, float, 0, 1, 'a number from 0 to 1')
deviation = partial(_number, float, 1e-6, 1, 'a number above 0 (pixels are in [0, 1])')


def arguments_of(function: Callable, args: argparse.Namespace) -> Dict[str, Any]:
    """The options that a function or class has parameters for, by name; `amp_dtype` as `autocast_dtype` gives it."""
    names = inspect.signature(function).parameters
    options = {name: value for name, value in vars(args).items() if name in names}
    return {**options, 'amp_dtype': autocast_dtype(args)} if 'amp_dtype' in options else options


def autocast_dtype(args: argparse.Namespace) -> Optional[torch.dtype]:
    """The type of `--amp-dtype` where there is `--amp`."""
    return getattr(torch, args.amp_dtype) if args.amp else None


class KeyValues(ParseKwargs):
    """timm's action for `KEY=VALUE ...`, with an error for what is something else."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Optional[str] = None) -> None:
        for value in values:
            if not re.match(r'[^\W\d]\w*=', value):
                raise argparse.ArgumentError(self, f'must be KEY=VALUE, got {value}')
        super().__call__(parser, namespace, values, option_string)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows what is required, and the defaults that the phrase itself does not state; flags are off by default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        if action.required and action.option_strings:
            return f'{text} (required)'
        if 'default' in text or action.nargs == 0 or action.default in (None, '', argparse.SUPPRESS):
            return text
        several = isinstance(action.default, (list, tuple))
        return f"{text} (default: {' '.join(map(str, action.default)) if several else action.default})"


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` whose errors are one line and whose options may come from a YAML file (`--config`).

    Values of the file pass through the same types and choices as those of the command line, which override them. Keys
    are the options' names with underscores, as in the `args.yaml` that a run writes.

    Args:
        doc: docstring of a script: a paragraph of description, then examples
        **kwargs: see `argparse.ArgumentParser`
    """

    def __init__(self, doc: Optional[str] = None, **kwargs: Any):
        if doc:
            kwargs['description'], _, kwargs['epilog'] = doc.strip().partition('\n\n')
        super().__init__(formatter_class=_Help, **kwargs)

    default_config: Optional[str] = None  # file of the options where no data are named
    from_run: Sequence[str] = ()  # options whose default is that of the run that the weights are from

    def error(self, message: str) -> NoReturn:
        print(f'{self.prog}: error: {message}', file=sys.stderr)
        sys.exit(2)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """argparse hides the message of a `ValueError`, which says what is wrong with the value."""
        if action.type is None or isinstance(action.type, type):  # int, float
            return super()._get_value(action, text)
        try:
            return cast(Callable, action.type)(text)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise argparse.ArgumentError(action, str(error)) from error

    def run(self, main: Callable[[Optional[Sequence[str]]], int], argv: Optional[Sequence[str]] = None) -> int:
        """Call a script's `main`; an `InputError` or a full disk ends it with one line and exit code 2.

        With `TIMM_CGH_DEBUG=1` in the environment its traceback is printed as well.
        """
        try:
            return main(argv)
        except InputError as error:
            if DEBUG:
                traceback.print_exception(error)
            self.error(self.with_flags(str(error)))
        except Exception as error:
            if (path := full_disk(error)) is None:
                raise
            self.error(f"no space left on the disk{f', for {path}' if path else ''}")

    def with_flags(self, message: str) -> str:
        """A message of the library with this parser's flags in place of parameter names (see `InputError`)."""
        flags = {action.dest: max(action.option_strings, key=len, default=action.metavar) for action in self._actions}

        def flag(found: re.Match) -> str:
            name, separator = found.groups()
            return flags[name] + {'=': ' '}.get(separator, separator) if name in flags else found[0]

        message = re.sub(r'^(\w+)(=|: )', flag, message)
        return re.sub(r'`(\w+)()`', flag, message)

    def parse(self, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
        """Parse the command line (default: this process's) over the file that it names.

        Raises:
            InputError: a file that cannot be read or holds what is no option
        """
        args = self.parse_args(argv, argparse.Namespace(**{a.dest: '' for a in self._actions if a.required}))
        path, values = self._read(vars(args))
        args = self.parse_args(argv, argparse.Namespace(**values))
        if self.from_run:
            run, file = find_run_arguments(getattr(args, 'model', None), getattr(args, 'checkpoint', None))
            inherited = self._check({name: run[name] for name in self.from_run if name in run}, f'{file}: ')
            args = self.parse_args(argv, argparse.Namespace(**{**inherited, **values}))
        args.config = path
        return args

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's, for which an option that is required may have its value in the namespace, from a file."""
        given = [a for a in self._actions if a.required and getattr(namespace, a.dest, None) is not None]
        try:
            for action in given:
                action.required = False
            return super().parse_known_args(args, namespace)
        finally:
            for action in given:
                action.required = True

    def parse_values(self, **values: Any) -> argparse.Namespace:
        """Take Python values by the options' names, checked like those of a file; the other options from `config`.

        Raises:
            InputError: no such option, or a value that its flag would refuse
        """
        given = self._check(values)
        path, read = self._read(given)
        return self.parse_args([], argparse.Namespace(**{**read, **given, 'config': path}))

    def _read(self, options: Mapping[str, Any]) -> Tuple[Optional[str], Dict[str, Any]]:
        """The file that options name (where they name no data, the parser's default) and the options in it."""
        named = options.get('data_dir') is not None or options.get('dataset')
        path = options.get('config') or (None if named else self.default_config)
        if not path:
            return None, {}
        file, included = path, os.path.join(_CONFIGS, os.path.basename(path))
        if os.path.dirname(path) in ('', 'configs') and not os.path.exists(path) and os.path.exists(included):
            file = included
        try:
            content = read_yaml(file)
        except InputError as error:
            raise InputError(f'config={error}') from error
        return path, self._check(content, f'config={path}: ')

    def _check(self, values: Mapping[str, Any], where: str = '') -> Dict[str, Any]:
        options = [action for action in self._actions if action.default != argparse.SUPPRESS]  # not --help
        actions = {flag.lstrip('-').replace('-', '_'): action for action in options for flag in action.option_strings}
        actions.update({action.dest: action for action in options})  # as args.yaml has them
        checked = {}
        for key, value in values.items():
            if key not in actions:
                raise InputError(f'{where}{key}: no such option')
            checked[actions[key].dest] = self._checked(actions[key], value, f'{where}{actions[key].dest}')
        return checked

    def _checked(self, action: argparse.Action, value: Any, where: str) -> Any:
        if isinstance(action, KeyValues):
            if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
                raise InputError(f'{where}: must be values by name, got {reprlib.repr(value)}')
            return value
        if value is None and action.default is None:
            return None
        if isinstance(action.default, bool):
            if not isinstance(value, bool):
                raise InputError(f'{where}: must be true or false, got {reprlib.repr(value)}')
            return value
        several = isinstance(value, (list, tuple))
        if isinstance(action.nargs, int) and (not several or len(value) != action.nargs):
            raise InputError(f'{where}: must be a list of {action.nargs}, got {reprlib.repr(value)}')
        if several and action.nargs in (None, '?'):
            raise InputError(f'{where}: must be one value, got {reprlib.repr(value)}')
        items = [self._item(action, item, where) for item in (value if several else [value])]
        return items if several or action.nargs in ('+', '*') else items[0]

    def _item(self, action: argparse.Action, item: Any, where: str) -> Any:
        item = os.fspath(item) if isinstance(item, os.PathLike) else item
        if item is None or isinstance(item, (dict, list, tuple)) or (action.type is None and not isinstance(item, str)):
            wanted = 'text (in quotes)' if action.type is None else 'one value'
            raise InputError(f'{where}: must be {wanted}, got {reprlib.repr(item)}')
        try:
            if b'\0' in os.fsencode(str(item)):
                raise ValueError
        except ValueError as error:  # or half of a surrogate pair
            raise InputError(f'{where}: holds a character that no name may have, {reprlib.repr(item)}') from error
        try:
            item = self._get_value(action, str(item)) if action.type else item
        except argparse.ArgumentError as error:
            raise InputError(f'{where}: {error.message[:200]}') from error
        if action.choices is not None and item not in action.choices:
            raise InputError(f'{where}: {reprlib.repr(item)} is not one of {", ".join(map(str, action.choices))}')
        return item


def add_config_argument(parser: Parser) -> None:
    """Add the file that `Parser.parse` reads options from."""
    parser.add_argument('-c', '--config', metavar='FILE',
                        help='YAML file of these options, which the command line overrides; default: none')


_DECODING = ('pixel_range', 'max_pixels', 'exif_orientation')


def add_decoding_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options about the decoding of images, whose default in an evaluation is that of the run."""
    group.add_argument('--pixel-range', nargs=2, type=float, metavar=('LOW', 'HIGH'),
                       help='what becomes black and white in images of more than 8 bits; default 0 65535, of floating '
                            'point 0 1')
    group.add_argument('--max-pixels', type=at_least_one, metavar='N',
                       help="larger images are not read; default: Pillow's limit, 178,956,970")
    group.add_argument('--exif-orientation', action=argparse.BooleanOptionalAction, default=True,
                       help='turn images as their EXIF tag says')


def add_dataset_arguments(group: argparse._ArgumentGroup, labelled: bool = True) -> None:
    """Add the options of a data set that depend on its kind; `labelled`: with those about its labels."""
    group.add_argument('--dataset-download', action='store_true',
                       help='allow the download of torch/ and other data sets')
    group.add_argument('--dataset-trust-remote-code', action='store_true',
                       help='allow data sets of the Hub to run their own code')
    group.add_argument('--input-key', metavar='NAME',
                       help="column of the images in a table; default: timm's for the data set")
    if labelled:
        group.add_argument('--target-key', metavar='NAME',
                           help="column of the labels in a table; default: timm's for the data set")
        group.add_argument('--class-map', metavar='FILE', default='',
                           help="timm's file of class names and their numbers; default: names in order")


def add_input_arguments(group: argparse._ArgumentGroup, in_chans: Optional[int] = None) -> None:
    """Add the arguments of a model, and the images that it takes; `in_chans` is the default of --in-chans."""
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                       help='further arguments of timm.create_model; default: none')
    group.add_argument('--img-size', nargs='+', metavar='PX', type=at_least_one,
                       help="side of the images, or height and width; default: the model's")
    group.add_argument('--in-chans', metavar='N', type=int, default=in_chans,
                       help='3 (colour), 1 (grey) or number of bands of TIFF and NumPy files' + (
                           '' if in_chans else "; default: the model's"))
    group.add_argument('--mean', nargs='+', type=fraction, metavar='X',
                       help="mean of pixels in [0, 1]; default: the model's")
    group.add_argument('--std', nargs='+', type=deviation, metavar='X',
                       help="standard deviation of pixels in [0, 1]; default: the model's")


def add_device_arguments(group: argparse._ArgumentGroup) -> None:
    """Add where and with which precision a network runs, and the seed."""
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                       help='cpu, cuda, cuda:1, ...; default: cuda where available, else cpu')
    group.add_argument('--amp', action='store_true', help='mixed precision, by torch.autocast')
    group.add_argument('--amp-dtype', choices=('float16', 'bfloat16'), default='float16',
                       help='type of the numbers under --amp')
    group.add_argument('--channels-last', action='store_true',
                       help='memory format of convolutions, often faster on GPUs')
    group.add_argument('--seed', type=random_seed, default=42, metavar='N', help='seed of everything random')


def add_evaluation_arguments(parser: Parser, hold_out: bool = False) -> None:
    """Add the groups Data, Model and Run of an evaluation; `hold_out`: training images may serve for validation."""
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', metavar='DIR',
                       help='folder of splits of class folders, or root of --dataset; default: none')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help="digits, or timm's torch/..., hfds/...; default: the folder")
    group.add_argument('--train-split', metavar='NAME', default='train',
                       help='split, or subfolder of --data-dir, to train on')
    group.add_argument('--val-split', metavar='NAME', default=None if hold_out else 'validation',
                       help='split to evaluate on; default: validation (a folder may be called val or valid)' + (
                           ', else a fifth of the training images of each class' if hold_out else ''))
    add_dataset_arguments(group)
    add_decoding_arguments(group)
    parser.from_run = _DECODING
    add_model_arguments(parser)


def add_image_arguments(parser: Parser, split: Optional[str] = None) -> None:
    """Add the group Data of a job on images whose labels do not matter; `split` is the default of --split."""
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', metavar='PATH',
                       help='folder of images, uncompressed tar of them or single image, or root of --dataset; '
                            'default: none')
    group.add_argument('--image-list', metavar='FILE',
                       help='only the files named in FILE, one path per line, relative to --data-dir, without classes; '
                            'default: all')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help="digits, or timm's torch/... or hfds/... (a folder of Parquet files too); "
                            'default: --data-dir')
    group.add_argument('--split', metavar='NAME', default=split,
                       help='split of the data set, or subfolder of --data-dir' + (
                           '' if split else '; default: all of a folder, else train'))
    add_dataset_arguments(group, labelled=False)
    add_decoding_arguments(group)
    parser.from_run = _DECODING


def add_model_arguments(parser: Parser, results: bool = True) -> None:
    """Add the options of every job that runs a network: --config and the groups Model and Run."""
    add_config_argument(parser)
    group = parser.add_argument_group('Model')
    group.add_argument('--model', metavar='NAME',
                       help="timm model, local-dir:RUN/export, hf-hub:OWNER/NAME; default: that of --checkpoint's run")
    group.add_argument('--checkpoint', metavar='SOURCE',
                       help='weights: a file (safetensors or torch; ours, MoCo, DINO, ...), the folder of a run or its '
                            'export/, or hf-hub:OWNER/NAME; default: those of --model')
    group.add_argument('--teacher', action='store_true', help="the teacher in --checkpoint, a run's last.pth.tar")
    group.add_argument('--no-pretrained', action='store_true', help='random weights, as a baseline')
    add_input_arguments(group)
    add_run_arguments(parser, results)


def add_run_arguments(parser: Parser, results: bool = True) -> None:
    """Add the group Run; `results`: with --output and --results-file."""
    group = parser.add_argument_group('Run')
    group.add_argument('-j', '--workers', metavar='N', type=natural, default=min(4, os.cpu_count() or 1),
                       help='processes that read images, for each process of the job')
    group.add_argument('-b', '--batch-size', type=at_least_one, default=256, metavar='N',
                       help='images in a batch of one process')
    add_device_arguments(group)
    if not results:
        return
    group.add_argument('--output', metavar='DIR', help='folder for plots and other files; default: none are written')
    group.add_argument('--results-file', metavar='FILE',
                       help='.json or .csv file for the results, which are printed in any case; default: none')


def add_training_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options of the evaluations that train on augmented images."""
    group.add_argument('--momentum', type=fraction, default=0.9, metavar='M',
                       help='momentum, of optimizers such as SGD')
    group.add_argument('--weight-decay', type=non_negative, default=0.0, metavar='X',
                       help='weight decay of the optimizer')
    group.add_argument('--scale', nargs=2, type=positive, default=[0.08, 1.0], metavar=('MIN', 'MAX'),
                       help="range of a crop's share of the image area")
    group.add_argument('--hflip', type=fraction, default=0.5, metavar='P', help='probability of a horizontal flip')
    group.add_argument('--val-interval', type=natural, default=10, metavar='N',
                       help='epochs between evaluations; 0: at the end only')
    group.add_argument('--log-interval', type=at_least_one, default=50, metavar='N',
                       help='batches between two reports of the loss')
    group.add_argument('--resume', metavar='FILE',
                       help="checkpoint to continue from; 'auto': that in --output, where there is one; default: none")

import importlib

import pytest

from timm_cgh.arguments import KeyValues, Parser, at_least_one, fraction, natural, non_negative, positive
from timm_cgh.errors import InputError


@pytest.fixture
def parser():
    parser = Parser(prog='train.py')
    parser.add_argument('--config')
    parser.add_argument('--data-dir')
    parser.add_argument('--epochs', type=at_least_one, default=200)
    parser.add_argument('--lr', type=non_negative)
    parser.add_argument('--momentum', type=fraction, default=0.9)
    parser.add_argument('--scale', nargs=2, type=positive, default=[0.2, 1.0])
    parser.add_argument('--out-indices', nargs='+', type=int)
    parser.add_argument('--context', choices=('cross', 'same'), default='cross')
    parser.add_argument('--amp', action='store_true')
    parser.add_argument('-j', '--workers', type=natural, default=4)
    parser.add_argument('--opt-kwargs', dest='opt_args', nargs='*', default={}, action=KeyValues)
    return parser


def write(tmp_path, text):
    path = tmp_path / 'c.yaml'
    path.write_text(text)
    return str(path)


def test_command_line_overrides_file_overrides_default(parser, tmp_path):
    path = write(tmp_path, 'epochs: 10\nlr: 1e-3\nscale: [0.5, 1]\nout_indices: [-2, -1]\namp: true\n')
    args = parser.parse(['--config', path, '--epochs', '3'])
    assert (args.epochs, args.lr, args.scale, args.out_indices, args.amp) == (3, 1e-3, [0.5, 1.0], [-2, -1], True)


def test_a_required_option_may_come_from_the_file(parser, tmp_path, capsys):
    parser.add_argument('-o', '--output', required=True)
    for text, argv, output in (('output: a', [], 'a'), ('output: a', ['-o', 'b'], 'b'), ('lr: 1', ['-o', 'b'], 'b')):
        assert parser.parse(['--config', write(tmp_path, text), *argv]).output == output
    assert parser.parse_values(config=write(tmp_path, 'output: a')).output == 'a'
    for argv in ([], ['--config', write(tmp_path, 'lr: 1')], ['--config', write(tmp_path, 'output:')]):
        with pytest.raises(SystemExit):
            parser.parse(argv)
        assert 'the following arguments are required: -o/--output' in capsys.readouterr().err


def test_default_config_is_used_only_where_wanted(parser, tmp_path):
    path = write(tmp_path, 'epochs: 10\n')
    parser.default_config = path
    assert parser.parse([]).epochs == 10
    assert parser.parse(['--data-dir', 'images']).epochs == 200
    assert parser.parse(['--epochs', '3']).epochs == 3


@pytest.mark.parametrize('text,named', [
    ('epoch: 3\n', 'epoch'),
    ('epochs: 0\n', 'epochs'),
    ('epochs: many\n', 'epochs'),
    ('epochs: [1, 2]\n', 'epochs'),
    ('momentum: 1.5\n', 'momentum'),
    ('scale: 0.5\n', 'scale'),
    ('scale: [0.5]\n', 'scale'),
    ('scale: [-1, 1]\n', 'scale'),
    ('context: both\n', 'context'),
    ('amp: maybe\n', 'amp'),
    ('- epochs\n', 'name: value'),
    ('epochs: [\n', 'c.yaml'),
    ('epochs:\n', 'epochs'),
    ('epochs: {a: 1}\n', 'epochs'),
    ('epochs: true\n', 'epochs'),
    ('amp:\n', 'amp'),
    ('scale: [{a: 1}, 2]\n', 'scale'),
    ('scale: [[1], 2]\n', 'scale'),
    ('out_indices: [null]\n', 'out_indices'),
    ('context: 3\n', 'must be text'),
    ('data_dir: 2024\n', 'must be text'),
    ('data_dir: 2024-01-01\n', 'must be text'),
    ('data_dir: [a]\n', 'must be one value'),
    ('data_dir: "a\\0b"\n', 'data_dir: holds a character'),
    ('data_dir: "a\\ud800b"\n', 'data_dir: holds a character'),
    ('opt_kwargs: nesterov\n', 'opt_args: must be values by name'),
    ('opt_kwargs: {1: 2}\n', 'opt_args: must be values by name'),
    ('opt_kwargs:\n', 'opt_args: must be values by name'),
    (f'epochs: {"[" * 900}{"]" * 900}', 'recursion'),
    (f'epochs: {"9" * 3000}', 'epochs'),
    (f'context: {"x" * 10 ** 6}', 'context'),
])
def test_bad_files_end_in_one_line_and_code_2(parser, tmp_path, capsys, text, named):
    with pytest.raises(SystemExit) as stop:
        parser.run(parser.parse, ['--config', write(tmp_path, text)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and named in message and message.count('\n') == 1 and len(message) < 600


def test_a_file_may_name_an_option_by_its_flag(parser, tmp_path):
    args = parser.parse(['--config', write(tmp_path, 'opt_kwargs: {nesterov: true}\nj: 3')])
    assert args.opt_args == {'nesterov': True} and args.workers == 3 and not hasattr(args, 'opt_kwargs')


@pytest.mark.parametrize('argv', [
    ['--epochs', '0'],
    ['--epochs', '2.5'],
    ['--lr', 'nan'],
    ['--lr', '-1'],
    ['--momentum', 'inf'],
    ['--scale', '0', '1'],
    ['--workers', '-1'],
    ['--context', 'both'],
    ['--config', 'missing.yaml'],
    ['--epcohs', '1'],
    ['--opt-kwargs', 'nesterov'],
    ['--opt-kwargs', 'a=1', '=2'],
])
def test_bad_command_lines_end_in_one_line_and_code_2(parser, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        parser.run(parser.parse, argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and argv[0] in message and message.count('\n') == 1


@pytest.mark.parametrize('name', ['train', 'eval_knn', 'eval_linear', 'eval_semisup'])
def test_no_option_of_a_script_takes_an_odd_value_from_a_file(name):
    parser = importlib.import_module(name).parser
    for action in parser._actions[1:]:  # not --help
        for value in (None, {'a': 1}, {1: 1}, [], [[1]], [None], [{}], 'a\0', 1e400, -1, 10 ** 400, True, b'x', {1, 2}):
            try:
                found = parser._check({action.dest: value})[action.dest]
            except InputError as error:
                assert str(error).startswith(action.dest)
                continue
            if value is None:
                assert action.default is None
            elif isinstance(value, dict):
                assert isinstance(action, KeyValues) and value == {'a': 1}
            elif isinstance(value, (list, set)):
                assert value == [] and action.nargs in ('*', '+')
            else:
                assert action.type is not None or isinstance(found, bool), (action.dest, value)

"""README and docs: links lead somewhere, commands are those of the real parsers, and they run on small stand-ins."""
import ast
import configparser
import importlib
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

import timm_cgh
from conftest import REPOSITORY
from script_runner import call_script
from timm_cgh.__main__ import _COMMANDS
from timm_cgh.train.pretrain import pretrain
from training import TINY, make_images

DOCS = REPOSITORY / 'docs'
PAGES = [REPOSITORY / 'README.md', *sorted(DOCS.rglob('*.md'))]
READ_ONLY = [REPOSITORY / name for name in ('CONTRIBUTING.md', 'CHANGELOG.md', 'results/README.md')]
OTHERS = ('pip', './distributed_train.sh', 'export', 'mkdocs', 'srun')  # not our parsers
# a block of code, its language and the comment above it
BLOCK = re.compile(r'(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$', re.M | re.S)


class Block(NamedTuple):
    page: str
    language: str
    code: str
    runs: bool


def read_blocks(path):
    """Blocks of code of a page."""
    for found in BLOCK.finditer(path.read_text(encoding='utf-8')):
        yield Block(path.name, found['info'].split(' ')[0], found['code'], found['why'] is None)


def split_commands(code):
    """Argument lists of the commands in a block of bash."""
    for line in code.replace('\\\n', ' ').splitlines():
        for part in line.split(' #')[0].split(' && '):
            words = shlex.split(part, comments=True)
            if words:
                yield words


def find_script(words):
    """Script that a command runs and its arguments; None for commands that are not ours."""
    while re.match(r'\w+=', words[0]):
        words = words[1:]
    if words[0] == 'torchrun':
        words = ['python', *words[next(i for i, word in enumerate(words) if word.endswith('.py') or word == '-m'):]]
    if words[0] == 'srun':
        words = words[1:]
    if words[:3] == ['python', '-m', 'timm_cgh']:
        words = ['timm-cgh', *words[3:]]
    if words[0] == 'timm-cgh':
        return _COMMANDS[words[1]][0], words[2:]
    if words[0] == 'python' and words[1].endswith('.py') and '/' not in words[1]:
        return words[1].removesuffix('.py'), words[2:]
    assert words[0] in OTHERS or words[:2] == ['python', '-m'] or '/' in words[1], f'unknown command: {words}'
    return None


BLOCKS = [block for path in PAGES for block in read_blocks(path)]
BASH = [block for block in BLOCKS if block.language == 'bash']
PYTHON = [block for block in BLOCKS if block.language == 'python']


def by_page(blocks):
    return {'argvalues': blocks, 'ids': [f'{block.page}-{i}' for i, block in enumerate(blocks)]}


@pytest.mark.parametrize('block', **by_page(BASH))
def test_every_command_is_one_that_its_parser_takes(block):
    for words in split_commands(block.code):
        found = find_script(words)
        if found is None:
            continue
        name, args = found
        script = importlib.import_module(name)
        if name == 'compare':
            _, args = script.parser.parse_known_args(args)
            script = importlib.import_module('train')
        read = script.parser.parse if any(arg.startswith('configs/') for arg in args) else script.parser.parse_args
        os.chdir(REPOSITORY)
        read(args)  # ends in SystemExit, or InputError for a file


@pytest.mark.parametrize('block', **by_page(PYTHON))
def test_every_python_block_compiles_and_imports_what_exists(block):
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_blocks_are_of_a_known_language():
    languages = {block.language for block in BLOCKS}
    assert languages <= {'bash', 'python', 'text', 'yaml', 'bibtex'}, languages


@pytest.mark.parametrize('path', [*PAGES, *READ_ONLY], ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_relative_links_lead_to_files_and_headings(path):
    text = re.sub(r'^```.*?^```$', '', path.read_text(encoding='utf-8'), flags=re.M | re.S)
    for target in re.findall(r'\]\(([^()\s]+)\)', text):
        name, _, anchor = target.partition('#')
        if '://' in target:
            continue
        goal = (path.parent / name).resolve() if name else path
        assert goal.exists(), f'{path.name}: {target}'
        if anchor:
            headings = re.findall(r'^#+ (.*)$', goal.read_text(encoding='utf-8'), re.M)
            assert anchor in [re.sub(r'[^\w -]', '', h).strip().lower().replace(' ', '-') for h in headings], target


def test_api_reference_covers_every_module():
    markers = re.findall(r'<!-- modules: (.+) -->', '\n'.join(page.read_text() for page in (DOCS / 'api').glob('*.md')))
    package = Path(timm_cgh.__file__).parent
    covered = {path for marker in markers for pattern in marker.split() for path in package.glob(pattern)}
    public = {path for path in package.rglob('*.py') if '\n__all__' in path.read_text(encoding='utf-8')}
    assert public - covered == {package / '__main__.py'}


def test_the_documentation_workflow_installs_the_docs_extra():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / 'setup.cfg', encoding='utf-8')
    workflow = (REPOSITORY / '.github' / 'workflows' / 'docs.yml').read_text(encoding='utf-8')
    install = re.search(r'run: pip install (.*?)  #', workflow)[1]
    assert set(shlex.split(install)) == set(config['options.extras_require']['docs'].split())


def test_quick_start_has_the_two_lines_that_ci_runs():
    lines = re.search(r'```bash quick-start\n(.*?)```', PAGES[0].read_text(encoding='utf-8'), re.S)[1].splitlines()
    assert len(lines) == 2 and 'train.py' in lines[0] and 'pytest' in lines[1]


# what makes a command of a guide one of seconds; argparse takes the last of two
QUICK = {
    'train': [*TINY, '--epochs', '2', '--warmup-epochs', '0', '--contrast-warmup-epochs', '1'],
    'eval_knn': ['--device', 'cpu', '--workers', '0'],
    'eval_linear': ['--device', 'cpu', '--workers', '0', '--epochs', '1', '--batch-size', '8'],
    'eval_semisup': ['--device', 'cpu', '--workers', '0', '--epochs', '1', '--batch-size', '8', '--percent', '50'],
    'eval_detection': ['--device', 'cpu', '--workers', '0', '--iterations', '2', '--batch-size', '2'],
    'embed': ['--device', 'cpu', '--workers', '0', '--overwrite'],
    'predict': ['--device', 'cpu', '--workers', '0'],
    'write_shards': ['--workers', '0'],
    'finetune': ['--device', 'cpu', '--workers', '0', '--epochs', '1', '--batch-size', '8'],
}


@pytest.fixture(scope='module')
def done():
    """Commands that were run already: several pages have them."""
    return []


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What the guide's commands find in the folder that they run in."""
    folder = tmp_path_factory.mktemp('guide')
    for name in ('photos', 'images', 'new'):
        make_images(folder / name, classes=())
    for split in ('train', 'val'):
        make_images(folder / 'labelled' / split)
    (folder / 'configs').symlink_to(REPOSITORY / 'configs')
    (folder / 'weights').symlink_to(REPOSITORY / 'weights')
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    for name in ('my', 'other', 'RUN'):
        assert call_script('train', *QUICK['train'], '--data-dir', 'photos', '--experiment', name, plots=True) == 0
    args = ['--model', 'local-dir:output/train/my/export', '--data-dir', 'labelled', '--results-file', 'knn.json']
    assert call_script('eval_knn', *args, *QUICK['eval_knn']) == 0
    patch.undo()
    return folder


def quicken(name, args):
    """Arguments of a run of seconds; in a folder of its own where the guide's name is taken."""
    args = [*args, *QUICK.get(name, ()), *(['--batch-size', '64'] if 'digits' in args and name == 'train' else ())]
    if name == 'convert' and 'onnx' not in args:  # the stand-in is no ResNet of torchvision's
        args[0] = 'weights/cgh_resnet18'
    if name == 'finetune' and Path('output', 'finetune').exists():
        args += ['--output', 'output/finetune_again']
    if name == 'train' and '--resume' not in args:
        run = args[args.index('--experiment') + 1] if '--experiment' in args else ''
        if not run or Path('output/train', run).exists():
            args += ['--experiment', f'run_{len(os.listdir("output/train"))}']
    return args


@pytest.mark.slow
@pytest.mark.parametrize('block', **by_page([block for block in BASH if block.runs]))
def test_commands_run(block, folder, done, monkeypatch):
    monkeypatch.chdir(folder)
    for words in split_commands(block.code):
        found = find_script(words)
        # `train.py` alone is what .ci/run runs, and processes of torchrun would each want a core
        if found is None or not found[1] or words[0] == 'torchrun' or words in done:
            continue
        done.append(words)
        name, args = found
        assert call_script(name, *quicken(name, args), plots=True) == 0, words


@pytest.mark.slow
@pytest.mark.parametrize('block', **by_page([block for block in PYTHON if block.runs]))
def test_python_runs(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    options = QUICK['train']
    quick = {flag[2:].replace('-', '_'): value for flag, value in zip(options[::2], options[1::2])}
    monkeypatch.setattr(
        timm_cgh, 'pretrain', lambda data_dir, model, **given: pretrain(data_dir, **{**given, **quick}))
    exec(compile(block.code, block.page, 'exec'), {})

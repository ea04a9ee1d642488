"""benchmark.py measures everything that it compares; no test depends on the speed."""
import json
import os
import subprocess
import sys

import pytest
import torch

import benchmark as script
from benchmarks import step
from conftest import REPOSITORY
from data_files import write_classes, write_tar
from input_errors import check_refused
from script_runner import run_script

TINY = ['--batch-size', 4, '--turns', 2, '--repeats', 1, '--device', 'cpu']
NETWORK = [*TINY, '--model', 'resnet10t', '--img-size', 32, '--bank-size', 32]


@pytest.fixture
def benchmark(tmp_path):
    """`benchmark(*args)`: the figures, and the lines that were printed."""
    def call(*args):
        done = run_script('benchmark.py', *args, '--json', tmp_path / 'figures')
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / 'figures').read_text()), done.stdout.splitlines()
    return call


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / 'images.tar', write_classes(tmp_path / 'images', 5, size=40))


def test_data_path_is_compared_with_the_official_recipe(benchmark, tar):
    result, lines = benchmark('data', '--data-dir', tar, '--img-size', 16, '--batch-size', 4, '--turns', 2)
    ms = result['cpu_ms_per_image']
    assert ms.keys() == {'official', 'uint8', 'whole', 'decode'} and min(ms.values()) > 0 and ms['whole'] > ms['uint8']
    assert result['times_official']['official'] == 1 and len(result['turns']['uint8']) == 2
    assert [line.split('  ')[0] for line in lines[2:]] == [
        'official recipe', 'ours, photometric work left to the device', 'ours, photometric work on the same core',
        'floor: full decode alone']


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_training_is_compared_with_its_step_and_its_loader(benchmark, tar, workers):
    result, lines = benchmark(
        'e2e', '--data-dir', tar, '--img-size', 32, *TINY, '--workers', workers, '--model', 'test_resnet',
        '--bank-size', 16)
    assert result['images_per_s'].keys() == {'synthetic', 'loader', 'e2e'} and min(result['images_per_s'].values()) > 0
    assert lines[-1].startswith('end to end')


def test_step_is_compared_with_its_floor_and_with_lightlys(benchmark):
    result, _ = benchmark('step', *NETWORK, '--lightly', '--parts')
    parts = {'relation loss', 'its products', 'hypercolumn, heads', 'their SGD', 'teacher update'}
    assert result['ms'].keys() == {'floor', 'cgh', 'lightly'} | parts and min(result['ms'].values()) > 0
    ratios = [cgh / floor for cgh, floor in zip(result['seconds']['cgh'], result['seconds']['floor'])]
    assert result['ratio'] == pytest.approx(sum(ratios) / 2)  # the median of two


def test_step_and_floor_are_compiled_alike_and_the_peak_is_without_the_floor(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda module, **_: compiled.append(type(module).__name__))
    monkeypatch.setattr(step, 'peak_memory', lambda _: float(len(compiled)))
    args = script.parser.parse_args(['step', *map(str, NETWORK), '--torchcompile'])
    assert step.benchmark_step(args)['peak_memory_mib'] == 2
    assert compiled == ['ContextEncoder'] * 2 + ['ResNet'] * 2


@pytest.mark.slow
def test_loss_is_measured_at_several_sizes_of_bank_and_batch(benchmark):
    result, _ = benchmark('loss', *TINY, '--bank-size', 4096, '--embed-dim', 16)
    assert result['bank_sizes'] == [512, 1024, 2048, 4096] and len(result['ms']['products']) == 4
    assert result['memory_mib'].keys() == {'4 x 512', '16 x 512', '4 x 4096', '16 x 4096'}


@pytest.mark.slow  # eight processes
def test_every_variant_is_measured(benchmark):
    result, lines = benchmark('variants', *NETWORK)
    rows = result['variants']
    assert rows['global (ReSSL)']['relative_rate'] == rows['global (ReSSL)']['relative_memory'] == 1
    assert rows['cross, predictor, multi-crop']['memory_mib'] > rows['global (ReSSL)']['memory_mib'] > 0
    assert len(lines) == 2 + len(rows)


@pytest.mark.slow
def test_processes_of_one_thread_are_compared_with_one_process():
    env = dict(os.environ, OMP_NUM_THREADS='2')
    command = [sys.executable, str(REPOSITORY / 'benchmark.py'), 'processes', *map(str, NETWORK)]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and '2 processes of one thread' in done.stdout, done.stderr


@pytest.mark.parametrize('args, named', [
    (['data'], '--data-dir: '),
    (['e2e', '--data-dir', '{tar}', '--batch-size', 0], '--batch-size'),
    (['data', '--data-dir', '{tar}', '--batch-size', 11], '--batch-size 11'),
    (['step', '--model', 'nonsense'], '--model nonsense: timm has no such model'),
    (['step', '--context', 'nonsense'], '--context'),
    (['step', '--device', 'meta'], '--device meta'),
    (['step', '--batch-size', 1], '--batch-size 1: must be at least 2'),
    (['step', '--json', '/proc/nowhere/a.json'], '--json /proc/nowhere/a.json'),
    (['loss', '--bank-size', 1], '--bank-size 1: must be at least 8'),
    (['knn'], 'faiss'),
])
def test_bad_input_is_one_line_and_code_2(capsys, tar, monkeypatch, args, named):
    if args == ['knn']:
        monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    check_refused(capsys, script, [str(arg).format(tar=tar) for arg in args], named)

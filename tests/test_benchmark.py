"""benchmark.py by its command line: what it compares is there; how fast it is, no test says."""
import importlib
import json
import os
import subprocess
import sys

import pytest
from data_files import write_classes, write_tar

from conftest import REPOSITORY

ENV = dict(os.environ, OMP_NUM_THREADS='1')


def benchmark(*args):
    command = [sys.executable, str(REPOSITORY / 'benchmark.py'), *map(str, args)]
    return subprocess.run(command, env=ENV, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / 'images.tar', write_classes(tmp_path / 'images', 5, size=40))


def test_data_path_beside_the_official_recipe(tmp_path, tar):
    done = benchmark('data', '--data-dir', tar, '--img-size', 16, '--batch-size', 4, '--turns', 2,
                     '--json', tmp_path / 'a')
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'a').read_text())
    ms = result['cpu_ms_per_image']
    assert ms.keys() == {'official', 'uint8', 'whole', 'decode'} and min(ms.values()) > 0 and ms['whole'] > ms['uint8']
    assert result['times_official']['official'] == 1 and len(result['turns']['uint8']) == 2
    assert [line.split('  ')[0] for line in done.stdout.splitlines()[2:]] == [
        'official recipe', 'ours, photometric work left to the device', 'ours, photometric work on the same core',
        'floor: full decode alone']


@pytest.mark.parametrize('workers', [0, 1])
def test_training_beside_its_step_and_its_loader(tmp_path, tar, workers):
    done = benchmark('e2e', '--data-dir', tar, '--img-size', 32, '--batch-size', 4, '--workers', workers,
                     '--turns', 2, '--repeats', 1, '--model', 'test_resnet', '--bank-size', 16, '--device', 'cpu',
                     '--json', tmp_path / 'a')
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'a').read_text())
    assert result['images_per_s'].keys() == {'synthetic', 'loader', 'e2e'} and min(result['images_per_s'].values()) > 0
    assert 'end to end' in done.stdout


@pytest.mark.parametrize('args, named', [
    (['data'], '--data-dir'),
    (['e2e', '--data-dir', '{tar}', '--batch-size', 0], '--batch-size'),
    (['data', '--data-dir', '{tar}', '--batch-size', 11], '--batch-size 11'),
])
def test_bad_input_is_one_line_and_code_2(capsys, tar, args, named):
    script = importlib.import_module('benchmark')
    with pytest.raises(SystemExit) as stop:
        script.parser.run(script.main, [str(arg).format(tar=tar) for arg in args])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and 'error: ' in last and named in last

"""The wheel, installed in a folder of its own, without the repository."""
import csv
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import numpy as np
import onnxruntime
import pytest

from conftest import REPOSITORY
from hub_server import WRITER, HubServer
from training import TINY, make_images


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel of the tracked files, and a folder that it is installed in."""
    source, folder = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('timm_cgh', 'configs'):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    subprocess.run([*pip, 'wheel', '--no-deps', '-w', folder, source], check=True)
    built, = folder.glob('timm_cgh-*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--target', folder / 'site', built], check=True)
    return built, folder / 'site'


def run(site, cwd, *args, **environment):
    """`timm-cgh ARGS` of the installed wheel; standard output."""
    environment = {**os.environ, 'PYTHONPATH': str(site), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', **environment}
    done = subprocess.run(
        [sys.executable, '-m', 'timm_cgh', *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_wheel_holds_scripts_and_configurations_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel[0]).namelist()
    for name in ('train.py', 'eval_linear.py', 'publish.py', 'configs/digits.yaml', 'configs/eval_linear_small.yaml'):
        assert f'timm_cgh/scripts/{name}' in names
    assert {'timm_cgh/hub/model_card.md', 'timm_cgh/py.typed', 'timm_cgh/data/digits.npz'} <= set(names)
    assert any(name.endswith('/NOTICE') for name in names)  # the digits' source and licence
    assert not [name for name in names if 'test' in name or name.startswith(('train', 'setup', 'benchmark'))]
    assert (wheel[1] / 'bin' / 'timm-cgh').exists()


def test_console_script_of_the_wheel_trains_and_evaluates(wheel, tmp_path):
    make_images(tmp_path / 'images' / 'train')
    make_images(tmp_path / 'images' / 'val')
    run(wheel[1], tmp_path, 'train', *TINY, '--data-dir', 'images', '--epochs', 1, '--experiment', 'run')
    export = tmp_path / 'output' / 'train' / 'run' / 'export'
    assert '"knn"' in run(
        wheel[1], tmp_path, 'knn', '--model', f'local-dir:{export}', '--data-dir', 'images', '--device', 'cpu')


@pytest.mark.slow
def test_from_photographs_to_a_published_classifier(wheel, tmp_path):
    call = partial(run, wheel[1], tmp_path)
    make_images(tmp_path / 'photos', classes=())
    make_images(tmp_path / 'labelled', size=24)
    call('train', *TINY, '--data-dir', 'photos', '--knn-dir', 'labelled', '--epochs', 2, '--experiment', 'run')
    export = tmp_path / 'output' / 'train' / 'run' / 'export'
    cpu = ['--device', 'cpu', '--workers', 0]
    call('embed', '--model', f'local-dir:{export}', '--data-dir', 'photos', '-o', 'photos.parquet', *cpu)
    tune = ['finetune', '--model', f'local-dir:{export}', '--data-dir', 'labelled', '--epochs', 2]
    call(*tune, '--output', 'birds', *cpu)
    classifier = tmp_path / 'birds' / 'export'
    call('predict', '--model', f'local-dir:{classifier}', '--data-dir', 'photos', '-o', 'photos.csv', *cpu)
    with open(tmp_path / 'photos.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and {value for row in rows for value in row.values()} >= {'cat', 'dog'}
    with HubServer() as hub:
        online = dict(
            HF_ENDPOINT=hub.url, HF_TOKEN=WRITER, HF_HOME=str(tmp_path / 'home'), HF_HUB_OFFLINE='0',
            HF_HUB_DISABLE_XET='1')
        call('publish', export, '--repo-id', 'me/birds', '--license', 'apache-2.0', **online)
        assert 'model.safetensors' in str(hub.repositories['me/birds'].__dict__)
    call('convert', classifier, '--to', 'onnx', '-o', 'birds.onnx')
    session = onnxruntime.InferenceSession(str(tmp_path / 'birds.onnx'))
    image = np.zeros((1, 3, 16, 16), np.float32)
    assert session.run(None, {session.get_inputs()[0].name: image})[0].shape == (1, 2)

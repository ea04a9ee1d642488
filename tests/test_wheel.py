"""The wheel, installed in a folder of its own, without the repository."""
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from pyarrow.parquet import read_table

import conftest
from conftest import REPOSITORY
from data_files import encode, picture
from hub_server import HubServer
from run_folders import read_table as read_rows
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


@pytest.mark.slow
def test_console_script_of_the_wheel_trains_and_evaluates(wheel, tmp_path):
    make_images(tmp_path / 'images' / 'train')
    make_images(tmp_path / 'images' / 'val')
    run(wheel[1], tmp_path, 'train', *TINY, '--data-dir', 'images', '--epochs', 1, '--experiment', 'run')
    export = tmp_path / 'output' / 'train' / 'run' / 'export'
    assert '"knn"' in run(
        wheel[1], tmp_path, 'knn', '--model', f'local-dir:{export}', '--data-dir', 'images', '--device', 'cpu')


def photographs(indices):
    """JPEG files of 64 px: of Tiny-ImageNet, 50 of each class in order, where it lies beside the checkout, else smooth
    random ones."""
    path = conftest.SHARED_DATA / 'tiny-imagenet' / 'validation-00000-of-00001.parquet'
    if path.exists():
        column = read_table(path, columns=['image'])['image']
        return [column[index].as_py()['bytes'] for index in indices]
    return [encode(picture(index, size=6).resize((64, 64), Image.Resampling.BICUBIC), 'JPEG') for index in indices]


def write_files(folder, files):
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.fixture
def images(tmp_path):
    """photos/: 600, noise, two copies and a broken one; labelled/: 60 of three classes, and a broken one in each split;
    new/: 8 and a broken one."""
    files = photographs(range(150, 9750, 16))
    first = Image.open(io.BytesIO(files[0]))
    planted = {
        'broken.jpg': files[0][:-200], 'noise.png': encode(picture(0, size=64)), 'copy.jpg': files[0],
        'half.png': encode(first.resize((32, 32)))}
    write_files(tmp_path / 'photos', {**{f'{number:03d}.jpg': data for number, data in enumerate(files)}, **planted})
    for number, name in enumerate(('ant', 'bee', 'cat')):
        files = photographs(range(50 * number, 50 * number + 20))
        for split, part in (('train', files[:14]), ('val', files[14:])):
            write_files(tmp_path / 'labelled' / split / name, {f'{i}.jpg': data for i, data in enumerate(part)})
    for split in ('train', 'val'):
        (tmp_path / 'labelled' / split / 'bee' / 'broken.jpg').write_bytes(b'no image')
    new = {f'{i}.jpg': data for i, data in enumerate(photographs(range(40, 48)))}
    write_files(tmp_path / 'new', {**new, 'broken.jpg': b'no image'})
    return tmp_path


def first_columns(path):
    return [row.split('\t')[0] for row in path.read_text().splitlines()]


@pytest.mark.slow
def test_from_photographs_to_a_published_classifier(wheel, images):
    """Each job is one command; broken files are named by each, and count in no figure."""
    call, cpu = partial(run, wheel[1], images), ['--device', 'cpu', '--workers', 0]
    call('train', *TINY, '--img-size', 64, '--batch-size', 32, '--bank-size', 64, '--data-dir', 'photos', '--knn-dir',
         'labelled', '--epochs', 2, '--experiment', 'run')
    folder = images / 'output' / 'train' / 'run'
    log = (folder / 'train.log').read_text()
    assert log.count('photos/broken.jpg') == 1 and 'labelled/val/bee/broken.jpg' in log
    model = ['--model', f"local-dir:{folder / 'export'}"]

    knn = json.loads(call('knn', *model, '--data-dir', 'labelled', *cpu).partition('--result\n')[2])
    counts = [knn[name] for name in ('train_images', 'val_images', 'train_unreadable', 'val_unreadable')]
    assert counts == [42, 18, 1, 1]

    trained = f"local-dir:{REPOSITORY / 'weights' / 'cgh_resnet50'}"  # two epochs do not tell noise from texture
    find = partial(call, 'neighbours', '--model', trained, '--data-dir', 'photos', *cpu)
    find('-o', 'alike', '--img-size', 32)  # the size of the smaller copy
    pairs = {frozenset((row['file_name_1'], row['file_name_2'])) for row in read_rows(images / 'alike/duplicates.csv')}
    assert {frozenset(('000.jpg', name)) for name in ('copy.jpg', 'half.png')} <= pairs
    find('-o', 'odd')
    outliers = [row['file_name'] for row in read_rows(images / 'odd/outliers.csv')]
    assert len(outliers) == 603 and 'noise.png' in outliers[:5]
    assert first_columns(images / 'alike/images.unreadable.txt') == ['broken.jpg']

    call('embed', *model, '--data-dir', 'photos', '-o', 'photos.parquet', *cpu)
    table = read_table(images / 'photos.parquet')
    assert sorted(table['file_name'].to_pylist()) == sorted(outliers)
    assert first_columns(images / 'photos.parquet.unreadable.txt') == ['broken.jpg']

    call('finetune', *model, '--data-dir', 'labelled', '--epochs', 2, '--output', 'birds', '--results-file',
         'birds.json', *cpu)
    tuned = json.loads((images / 'birds.json').read_text())
    assert [tuned[name] for name in ('train_images', 'val_images', 'val_unreadable')] == [42, 18, 1]
    classifier = images / 'birds' / 'export'
    call('predict', '--model', f'local-dir:{classifier}', '--data-dir', 'new', '-o', 'new.csv', *cpu)
    rows = read_rows(images / 'new.csv')
    assert len(rows) == 8 and {row[f'class_{place}'] for row in rows for place in (1, 2, 3)} == {'ant', 'bee', 'cat'}
    assert first_columns(images / 'new.csv.unreadable.txt') == ['broken.jpg']

    with HubServer() as hub:
        online = dict(hub.environment(images / 'home'), HF_HUB_OFFLINE='0')
        call('publish', classifier, '--repo-id', 'me/birds', '--license', 'apache-2.0', **online)
        assert 'model.safetensors' in str(hub.repositories['me/birds'].__dict__)
    call('convert', classifier, '--to', 'onnx', '-o', 'birds.onnx')
    session = onnxruntime.InferenceSession(str(images / 'birds.onnx'))
    image = np.zeros((1, 3, 64, 64), np.float32)
    assert session.run(None, {session.get_inputs()[0].name: image})[0].shape == (1, 3)

    call('shards', '--data-dir', 'photos', '-o', 'shards', '--workers', 0)
    assert first_columns(images / 'shards/train.unreadable.txt') == ['broken.jpg']

"""eval_knn.py by its command line, and the pictures of the evaluations."""
import importlib
import json
import logging
import os
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor

from conftest import REPOSITORY
from timm_cgh.data import Digits
from timm_cgh.eval import best_knn, create_eval_loader, extract_features, knn_accuracy, knn_predict
from timm_cgh.eval.knn import _nearest, _rank_key, _topk, nearest_neighbors
from timm_cgh.eval.pictures import save_class_accuracy, save_confusion, save_retrieval_grid
from timm_cgh.hub import export_backbone

CONFIG = dict(input_size=(1, 16, 16), mean=(0.3,), std=(0.37,), interpolation='bilinear')
DIGITS = ['--dataset', 'digits', '--batch-size', '64', '--workers', '0', '--device', 'cpu']


def backbone():
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=0, in_chans=1)


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """Export folder of a small backbone."""
    return export_backbone(backbone(), tmp_path_factory.mktemp('run') / 'export', **CONFIG)


def knn(encoder, *args):
    """Exit code of a run in this process."""
    script = importlib.import_module('eval_knn')
    handlers = list(logging.getLogger().handlers)
    try:
        return script.cli([str(a) for a in ('--model', f'local-dir:{encoder}', *DIGITS, *args)])
    finally:
        logging.getLogger().handlers = handlers  # each call adds one, to the standard error of its own test


def printed(text):
    return json.loads(text.partition('--result\n')[2])


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        knn(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope='module')
def judged(encoder, tmp_path_factory):
    """Folder and results of a run with everything that it can write."""
    output = tmp_path_factory.mktemp('knn')
    assert knn(encoder, '--output', output, '--save-features', output / 'features',
               '--results-file', output / 'results.json') == 0
    return output, json.loads((output / 'results.json').read_text())


# ---- the command line

def test_accuracy_is_that_of_the_features(judged):
    model, sets = backbone().eval(), [Digits(split, 'L') for split in ('train', 'validation')]
    features = [extract_features(model, create_eval_loader(s, CONFIG, batch_size=64)) for s in sets]
    accuracy = knn_accuracy(*features[0], *features[1])
    results = judged[1]
    assert results['knn'] == {str(k): pytest.approx(value, abs=1e-3) for k, value in accuracy.items()}
    assert (results['k'], results['top1']) == (best_knn(accuracy)[0], pytest.approx(best_knn(accuracy)[1], abs=1e-3))
    assert results['top1'] > 50 and results['num_classes'] == 10


def test_saved_features_give_the_accuracy_again(judged):
    output, results = judged
    train, val = (load_file(output / 'features' / f'{name}.safetensors') for name in ('train', 'validation'))
    assert len(train['features']) == results['train_images'] and len(val['labels']) == results['val_images']
    accuracy = knn_accuracy(train['features'], train['labels'], val['features'], val['labels'], ks=(20,))
    assert accuracy[20] == pytest.approx(results['knn']['20'], abs=1e-4)
    with safe_open(output / 'features' / 'train.safetensors', 'pt') as file:
        assert json.loads(file.metadata()['class_names']) == [str(i) for i in range(10)]


def test_pictures_lie_beside_the_results(judged):
    for name in ('retrieval.png', 'classes.png'):
        with Image.open(judged[0] / name) as picture:
            assert min(picture.size) > 300


def test_only_the_k_that_are_asked_for_are_tried(encoder, capsys):
    assert knn(encoder, '--k', '3', '1', '3') == 0
    assert list(printed(capsys.readouterr().out)['knn']) == ['1', '3']


def test_raw_pixels_are_judged_by_the_same_protocol(encoder, capsys):
    assert knn(encoder, '--pixels', '--k', '5') == 0
    results = printed(capsys.readouterr().out)
    parts = []
    for split in ('train', 'validation'):
        images, labels = zip(*(Digits(split, 'L')[i][:2] for i in range(len(Digits(split, 'L')))))
        images = [to_tensor(image.resize((16, 16), Image.Resampling.BILINEAR)).flatten() for image in images]
        parts += [torch.stack(images), torch.tensor(labels)]
    assert results['top1'] == pytest.approx(knn_accuracy(*parts, ks=(5,))[5], abs=1e-3)
    assert (results['weights'], results['num_features']) == ('pixels', 256)


@pytest.mark.parametrize('images, ks', [(150, [10, 20, 100]), (7, [7]), (200, [10, 20, 100, 200])])
def test_default_k_fit_the_data_set(images, ks):
    assert importlib.import_module('eval_knn').choose_ks(None, images) == ks


@pytest.mark.parametrize('args, named', [
    (['--k', '10', '5000'], '--k 5000: there are only 1433 training images'),
    (['--k', '0'], '--k: must be a whole number of at least 1'),
    (['--temperature', '0'], '--temperature'),
    (['--val-split', 'test'], 'there are train and validation'),
    (['--save-features', '/dev/null/here'], '--save-features /dev/null/here'),
    (['--checkpoint', 'nowhere.pth'], 'nowhere.pth: no such file'),
    (['--pixels', '--checkpoint', 'nowhere.pth'], '--pixels: no weights are asked for'),
])
def test_refusals_are_one_line(encoder, capsys, args, named):
    assert named in refused(capsys, encoder, *args)


def test_network_that_has_diverged_is_named(tmp_path, capsys):
    model = backbone()
    torch.nn.init.constant_(model.layer4[0].conv1.weight, float('nan'))
    export = export_backbone(model, tmp_path / 'export', **CONFIG)
    assert 'are not finite' in refused(capsys, export)


def test_two_processes_give_the_accuracy_of_one(encoder, judged, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         str(REPOSITORY / 'eval_knn.py'), '--model', f'local-dir:{encoder}', *DIGITS, '--save-features', str(tmp_path)],
        env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('--result') == 1
    two, one = printed(done.stdout), judged[1]
    assert two['knn'] == one['knn'] and two['val_images'] == one['val_images']
    saved = [load_file(folder / 'validation.safetensors') for folder in (tmp_path, judged[0] / 'features')]
    assert torch.equal(saved[0]['labels'], saved[1]['labels'])
    torch.testing.assert_close(saved[0]['features'], saved[1]['features'])


# ---- the search

def test_long_rows_are_searched_like_short_ones():
    similarity = torch.randn(7, 5003, generator=torch.Generator().manual_seed(0))
    values, places = _topk(similarity, 30)
    expected = similarity.topk(30, dim=1)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)


def test_of_equals_the_earliest_are_taken_in_long_rows():
    similarity = torch.randint(-9, 9, (6, 5003), generator=torch.Generator().manual_seed(0)).float()
    values, places = _nearest(similarity, 40)
    expected = _rank_key(similarity, torch.arange(5003)).argsort(dim=1, descending=True)[:, :40]
    assert torch.equal(places, expected) and torch.equal(values, similarity.gather(1, expected))


def test_many_training_images_change_nothing_of_the_vote():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(9001, 16, generator=generator), torch.randn(40, 16, generator=generator)
    labels = torch.randint(7, (9001,), generator=generator)
    similarity = torch.nn.functional.normalize(test.double()) @ torch.nn.functional.normalize(train.double()).T
    near = similarity.topk(50, dim=1)
    votes = torch.zeros(40, 7, dtype=torch.double).scatter_add_(1, labels[near.indices], (near.values / 0.07).exp())
    assert torch.equal(knn_predict(train, labels, test, ks=(50,))[50], votes.argmax(dim=1))
    assert torch.equal(nearest_neighbors(train, test, 50), near.indices)


# ---- pictures

@pytest.mark.parametrize('classes', [1, 3, 25, 120])
@pytest.mark.parametrize('draw', [save_confusion, save_class_accuracy])
def test_pictures_of_any_number_of_classes(draw, classes, tmp_path):
    labels = torch.arange(classes).repeat(4)
    predictions = labels.clone()
    predictions[::3] = -1  # heads that diverged predict nothing
    assert draw(labels, predictions, tmp_path / 'a.png', [f'class ${i}' for i in range(classes)])
    with Image.open(tmp_path / 'a.png') as picture:
        assert min(picture.size) > 200


def test_pictures_need_no_names_and_leave_no_scraps(tmp_path):
    labels = torch.tensor([0, 0, 2])  # no image of class 1
    assert save_confusion(labels, labels, tmp_path / 'a.png')
    assert save_class_accuracy(labels, labels, tmp_path / 'b.png')
    image = Image.new('L', (8, 8), 128)
    assert save_retrieval_grid([[(image, '1', True), (image, '1', True), (image, '2', False)]], tmp_path / 'c.png')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'b.png', 'c.png']


def test_pictures_are_left_out_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    labels = torch.tensor([0, 1])
    assert not save_confusion(labels, labels, tmp_path / 'a.png')
    assert not save_class_accuracy(labels, labels, tmp_path / 'a.png')
    assert not list(tmp_path.iterdir())

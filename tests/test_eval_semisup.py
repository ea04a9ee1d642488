"""Semi-supervised fine-tuning: its parts, and eval_semisup.py by its command line."""
import csv
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from conftest import REPOSITORY
from timm_cgh.data import Digits, open_dataset
from timm_cgh.errors import InputError
from timm_cgh.eval import create_eval_loader
from timm_cgh.eval.semisup import balanced_subset, listed_subset, param_groups
from timm_cgh.hub import export_backbone

CONFIG = dict(input_size=(1, 16, 16), mean=(0.3,), std=(0.37,), interpolation='bilinear')
DIGITS = ['--dataset', 'digits', '--in-chans', '1', '--batch-size', '64', '--workers', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """Export folder of a small backbone."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=0, in_chans=1)
    return export_backbone(model, tmp_path_factory.mktemp('run') / 'export', **CONFIG)


def semisup(encoder, output, *args, data=DIGITS):
    """Exit code and results of a run in this process."""
    script = importlib.import_module('eval_semisup')
    results = output.parent / f'{output.name}.json'
    handlers = list(logging.getLogger().handlers)
    try:
        code = script.cli([str(a) for a in (
            '--model', f'local-dir:{encoder}', *data, '--output', output, '--results-file', results, *args)])
    finally:
        logging.getLogger().handlers = handlers  # each call adds one, to the standard error of its own test
    found = json.loads(results.read_text()) if results.exists() else None
    return code, found[0] if isinstance(found, list) else found


def refused(capsys, *args, **kwargs):
    with pytest.raises(SystemExit) as stop:
        semisup(*args, **kwargs)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def trained(output):
    return torch.load(output / 'last.pth.tar', weights_only=True)['classifier']


@pytest.fixture
def images(tmp_path):
    """Class folders `cat` and `dog` with a file `shared.png` in both."""
    for kind in ('cat', 'dog'):
        (tmp_path / 'images' / 'train' / kind).mkdir(parents=True)
        for name in ('shared', *(f'{kind}_{i}' for i in range(5))):
            Image.new('RGB', (16, 16)).save(tmp_path / 'images' / 'train' / kind / f'{name}.png')
    return open_dataset('', str(tmp_path / 'images'), 'train')


def listing(tmp_path, *lines):
    path = tmp_path / 'list.txt'
    path.write_text('\n'.join(lines) + '\n')
    return str(path)


# ---- the parts

@pytest.mark.parametrize('share, counts', [(0.01, {1}), (0.1, {9, 10}), (0.5, {50}), (1.0, {100})])
def test_subset_is_balanced(share, counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    chosen = balanced_subset(labels, share - 0.003 if share == 0.1 else share)
    assert len(chosen) == round((share - 0.003 if share == 0.1 else share) * 1000)
    assert set(np.bincount(labels[chosen]).tolist()) == counts
    assert (np.diff(chosen) > 0).all()


def test_subset_is_a_function_of_its_seed():
    labels = np.arange(1000) % 10
    assert np.array_equal(balanced_subset(labels, 0.1, 3), balanced_subset(labels, 0.1, 3))
    assert not np.array_equal(balanced_subset(labels, 0.1, 3), balanced_subset(labels, 0.1, 4))


def test_smaller_subset_is_part_of_a_larger_one():
    labels = np.random.default_rng(0).choice(7, size=997, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.04, 0.01])
    chosen = [set(balanced_subset(labels, share).tolist()) for share in np.linspace(0.001, 1, 60)]
    for small, large in zip(chosen, chosen[1:]):
        assert small <= large
    assert len(chosen[-1]) == 997


def test_small_class_gives_all_that_it_has_and_the_others_fill_up():
    labels = np.repeat([0, 1, 2], [2, 500, 498])
    assert np.bincount(labels[balanced_subset(labels, 0.1)]).tolist() == [2, 49, 49]


def test_unlabelled_images_are_never_chosen():
    labels = np.where(np.arange(100) % 2, -1, np.arange(100) % 4)
    assert (labels[balanced_subset(labels, 1.0)] >= 0).all()
    with pytest.raises(ValueError, match='no labelled'):
        balanced_subset([-1, -1], 0.5)


@pytest.mark.parametrize('lines', [
    ('cat_1.png', 'dog_3.png'),
    ('cat/cat_1.png', 'dog/dog_3.png'),
    ('# chosen', 'dog_3.png', '', 'cat/cat_1.png', 'dog_3.png'),
])
def test_list_names_the_images(images, tmp_path, lines):
    chosen = listed_subset(images, listing(tmp_path, *lines))
    assert [images.filename(int(i), basename=True) for i in chosen] == ['cat_1.png', 'dog_3.png']


@pytest.mark.parametrize('lines, named', [
    (('cat_1.png', 'cow.png', 'pig.png'), '2 of 3 names .* first: cow.png'),
    (('shared.png',), 'shared.png is the name of 2 images; write CLASS/shared.png'),
    (('# nothing',), 'names no image'),
])
def test_list_that_does_not_fit_is_refused(images, tmp_path, lines, named):
    with pytest.raises(InputError, match=named):
        listed_subset(images, listing(tmp_path, *lines))


def test_list_needs_images_with_names(tmp_path):
    with pytest.raises(InputError, match='--percent'):
        listed_subset(Digits('train', 'L'), listing(tmp_path, '1.png'))
    with pytest.raises(InputError, match='No such file'):
        listed_subset(Digits('train', 'L'), str(tmp_path / 'missing.txt'))


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'deit_tiny_distilled_patch16_224'])
def test_every_parameter_is_in_one_group(name):
    model = timm.create_model(name, num_classes=5)
    body, head = param_groups(model, 1e-4, 0.5)
    assert (body['lr'], head['lr']) == (1e-4, 0.5)
    assert all(5 in p.shape for p in head['params'])
    assert sorted(id(p) for p in body['params'] + head['params']) == sorted(id(p) for p in model.parameters())


# ---- the command line

@pytest.fixture(scope='module')
def tuned(encoder, tmp_path_factory):
    """A run, all the files it leaves."""
    output = tmp_path_factory.mktemp('semisup') / 'tuned'
    code, results = semisup(encoder, output, '--percent', '50', '--lr', '0.3', '--epochs', '8', '--val-interval', '4')
    assert code == 0
    return output, results


def test_run_learns_from_the_labelled_share(tuned):
    output, results = tuned
    assert results['train_images'] == 716 and results['percent'] == pytest.approx(50, abs=0.1)
    assert results['top1'] > 30
    with open(output / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [int(r['epoch']) for r in rows] == list(range(8))
    assert [bool(r['eval_top1']) for r in rows] == [i in (3, 7) for i in range(8)]
    for name in ('confusion.png', 'classes.png'):
        assert (output / name).read_bytes().startswith(b'\x89PNG')


def test_export_is_a_timm_classifier_of_the_reported_accuracy(tuned):
    output, results = tuned
    model = timm.create_model(f'local-dir:{output}/export', pretrained=True).eval()
    digits = Digits('validation', 'L')
    (images, labels), = create_eval_loader(digits, CONFIG, batch_size=len(digits))
    with torch.no_grad():
        top1 = 100 * (model(images).argmax(dim=1) == labels).double().mean().item()
    assert top1 == pytest.approx(results['top1'], abs=1e-3)


def test_backbone_learns_at_its_own_rate(encoder, tmp_path):
    for lr in ('0', '0.1'):
        assert semisup(encoder, tmp_path / lr, '--percent', '10', '--lr', lr, '--epochs', '1')[0] == 0
    before = timm.create_model(f'local-dir:{encoder}', pretrained=True).state_dict()
    still, moved = trained(tmp_path / '0'), trained(tmp_path / '0.1')
    weights = [n for n in before if n.endswith('weight') and before[n].ndim == 4]
    assert all(torch.equal(still[n], before[n]) for n in weights)
    assert not any(torch.equal(moved[n], before[n]) for n in weights)
    # batch statistics are the data's even where no weight moves: the network is in train mode
    assert any(not torch.equal(still[n], before[n]) for n in before if n.endswith('running_mean'))


def test_same_seed_gives_the_same_run_and_resume_too(encoder, tmp_path, monkeypatch):
    args = ['--percent', '10', '--epochs', '2', '--lr', '0.01', '--val-interval', '1']
    semisup(encoder, tmp_path / 'whole', *args)
    script = importlib.import_module('eval_semisup')
    save_state = script.save_state

    def killed(*a, **k):
        save_state(*a, **k)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, 'save_state', killed)
        semisup(encoder, tmp_path / 'broken', *args)
    code, _ = semisup(encoder, tmp_path / 'broken', *args, '--resume', 'auto')
    assert code == 0
    whole, resumed = trained(tmp_path / 'whole'), trained(tmp_path / 'broken')
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize('percent, lr_head, lr', [(1, 0.5, 1e-4), (10, 0.2, 2e-4)])
def test_recipes_are_those_of_the_paper(percent, lr_head, lr):
    script = importlib.import_module('eval_semisup')
    config = str(REPOSITORY / 'configs' / f'eval_semisup_{percent}percent.yaml')
    for argv in (['-c', config], ['--percent', str(percent)]):
        args = script.parser.parse(argv)
        script.choose_settings(args)
        assert (args.percent, args.lr_head, args.lr, args.epochs) == (percent, lr_head, lr, 50)
        assert (args.decay_milestones, args.decay_rate, args.momentum, args.weight_decay) == ([30, 40], 0.1, 0.9, 0)
    assert script.parser.parse(['-c', config]).batch_size == 256


def test_list_file_by_command_line(encoder, images, tmp_path, capsys):
    (tmp_path / 'images' / 'train').rename(tmp_path / 'images' / 'validation')
    shutil.copytree(tmp_path / 'images' / 'validation', tmp_path / 'images' / 'train')
    data = ['--data-dir', tmp_path / 'images', '--in-chans', '1', '--workers', '0', '--device', 'cpu', '--epochs', '1']
    names = listing(tmp_path, 'cat_1.png', 'dog/dog_2.png', 'dog/shared.png')
    code, results = semisup(encoder, tmp_path / 'listed', '--label-list', names, '--percent', '1', data=data)
    assert code == 0 and results['train_images'] == 3 and results['lr_head'] == 0.5
    names = listing(tmp_path, 'cow.png')
    assert 'cow.png' in refused(
        capsys, encoder, tmp_path / 'other', '--label-list', names, '--percent', '1', data=data)


@pytest.mark.parametrize('args, named', [
    ([], '--percent or --label-list'),
    (['--percent', '101'], 'at most 100'),
    (['--percent', '0'], '--percent'),
    (['--label-list', 'list.txt'], '--lr-head'),
])
def test_refusals_are_one_line(encoder, tmp_path, capsys, args, named):
    assert named in refused(capsys, encoder, tmp_path / 'run', *args)
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()


def test_two_processes_run(encoder, tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         str(REPOSITORY / 'eval_semisup.py'), '--model', f'local-dir:{encoder}', *DIGITS, '--percent', '10',
         '--epochs', '2', '--output', str(tmp_path / 'two')],
        env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout[done.stdout.index('{'):])
    assert results['val_images'] == 364  # no image counted twice
    model = timm.create_model(f'local-dir:{tmp_path}/two/export', pretrained=True).eval()
    digits = Digits('validation', 'L')
    (images, labels), = create_eval_loader(digits, CONFIG, batch_size=len(digits))
    with torch.no_grad():
        top1 = 100 * (model(images).argmax(dim=1) == labels).double().mean().item()
    assert top1 == pytest.approx(results['top1'], abs=1e-3)

"""Semi-supervised fine-tuning: its parts, and eval_semisup.py by its command line."""
import itertools
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import eval_semisup as script
from conftest import REPOSITORY
from evaluations import (
    CPU, DIGITS, evaluate, exported_top1, load_export, printed_results, stop_after_saving, write_damaged)
from input_errors import check_refused
from script_runner import run_two_processes
from timm_cgh.data import Digits, open_dataset
from timm_cgh.errors import InputError
from timm_cgh.eval.semisup import balanced_subset, listed_subset, param_groups
from training import read_summary


def semisup(encoder, output, *args, **options):
    """Exit code and results of a run in this process."""
    return evaluate('eval_semisup', encoder, output, '--batch-size', '64', *args, **options)


def read_classifier(output):
    return torch.load(output / 'last.pth.tar', weights_only=True)['classifier']


@pytest.fixture
def named_images(tmp_path):
    """Class folders `cat` and `dog` with a file `shared.png` in both."""
    for kind in ('cat', 'dog'):
        (tmp_path / 'images' / 'train' / kind).mkdir(parents=True)
        for name in ('shared', *(f'{kind}_{i}' for i in range(5))):
            Image.new('RGB', (16, 16)).save(tmp_path / 'images' / 'train' / kind / f'{name}.png')
    return open_dataset('', str(tmp_path / 'images'), 'train')


def write_list(tmp_path, *lines):
    path = tmp_path / 'list.txt'
    path.write_text('\n'.join(lines) + '\n')
    return str(path)


# ---- the parts

@pytest.mark.parametrize('share, counts', [(0.01, {1}), (0.097, {9, 10}), (0.5, {50}), (1.0, {100})])
def test_subset_has_equally_many_images_of_every_class(share, counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    chosen = balanced_subset(labels, share)
    assert len(chosen) == round(share * 1000)
    assert set(np.bincount(labels[chosen]).tolist()) == counts
    assert (np.diff(chosen) > 0).all()


def test_subset_is_a_function_of_its_seed():
    labels = np.arange(1000) % 10
    assert np.array_equal(balanced_subset(labels, 0.1, 3), balanced_subset(labels, 0.1, 3))
    assert not np.array_equal(balanced_subset(labels, 0.1, 3), balanced_subset(labels, 0.1, 4))


def test_smaller_subset_is_part_of_a_larger_one():
    labels = np.random.default_rng(0).choice(7, size=997, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.04, 0.01])
    chosen = [set(balanced_subset(labels, share).tolist()) for share in np.linspace(0.001, 1, 60)]
    for small, large in itertools.pairwise(chosen):
        assert small <= large
    assert len(chosen[-1]) == 997


def test_a_small_class_gives_all_its_images_and_the_others_more():
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
def test_list_names_the_images(named_images, tmp_path, lines):
    chosen = listed_subset(named_images, write_list(tmp_path, *lines))
    assert [named_images.filename(int(i), basename=True) for i in chosen] == ['cat_1.png', 'dog_3.png']


@pytest.mark.parametrize('lines, named', [
    (('cat_1.png', 'cow.png', 'pig.png'), '2 of 3 names .* first: cow.png'),
    (('shared.png',), 'shared.png is the name of 2 images; write CLASS/shared.png'),
    (('# nothing',), 'names no image'),
])
def test_a_list_that_does_not_fit_the_images_is_refused(named_images, tmp_path, lines, named):
    with pytest.raises(InputError, match=named):
        listed_subset(named_images, write_list(tmp_path, *lines))


def test_a_list_needs_a_file_and_images_with_names(tmp_path):
    with pytest.raises(InputError, match=r'label_list=.*use `percent`'):
        listed_subset(Digits('train', 'L'), write_list(tmp_path, '1.png'))
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
    """Folder and results of a run."""
    output = tmp_path_factory.mktemp('semisup') / 'tuned'
    code, results = semisup(
        encoder, output, '--percent', '50', '--lr', '0.3', '--epochs', '8', '--val-interval', '4',
        plots=True)
    assert code == 0
    return output, results


def test_a_run_learns_from_the_labelled_share(tuned):
    output, results = tuned
    assert results['train_images'] == 716 and results['percent'] == pytest.approx(50, abs=0.1)
    assert results['top1'] > 30
    rows = read_summary(output)
    assert [int(r['epoch']) for r in rows] == list(range(8))
    assert [bool(r['eval_top1']) for r in rows] == [i in (3, 7) for i in range(8)]
    for name in ('confusion.png', 'classes.png'):
        assert (output / name).read_bytes().startswith(b'\x89PNG')


def test_export_is_a_timm_classifier_of_the_reported_accuracy(tuned):
    output, results = tuned
    assert exported_top1(output) == pytest.approx(results['top1'], abs=1e-3)


def test_backbone_learns_at_its_own_rate(encoder, tmp_path):
    for lr in ('0', '0.1'):
        assert semisup(encoder, tmp_path / lr, '--percent', '10', '--lr', lr, '--epochs', '1')[0] == 0
    before = load_export(encoder).state_dict()
    still, moved = read_classifier(tmp_path / '0'), read_classifier(tmp_path / '0.1')
    weights = [n for n in before if n.endswith('weight') and before[n].ndim == 4]
    assert all(torch.equal(still[n], before[n]) for n in weights)
    assert not any(torch.equal(moved[n], before[n]) for n in weights)
    # batch statistics are the data's even where no weight moves: the network is in train mode
    assert any(not torch.equal(still[n], before[n]) for n in before if n.endswith('running_mean'))


def test_resumed_run_equals_an_uninterrupted_one(encoder, tmp_path, monkeypatch):
    data = write_damaged(tmp_path / 'images')
    args = ['--percent', '100', '--epochs', '2', '--lr', '0.01', '--val-interval', '1', '-b', '4']
    semisup(encoder, tmp_path / 'whole', *args, data=data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_saving(patch)
        semisup(encoder, tmp_path / 'broken', *args, data=data)
    code, _ = semisup(encoder, tmp_path / 'broken', *args, '--resume', 'auto', data=data)
    assert code == 0
    whole, resumed = read_classifier(tmp_path / 'whole'), read_classifier(tmp_path / 'broken')
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize('percent, lr_head, lr', [(1, 0.5, 1e-4), (10, 0.2, 2e-4)])
def test_recipes_are_those_of_the_paper(percent, lr_head, lr):
    config = str(REPOSITORY / 'configs' / f'eval_semisup_{percent}percent.yaml')
    for argv in (['-c', config], ['--percent', str(percent)]):
        args = script.parser.parse(argv)
        script.choose_settings(args)
        assert (args.percent, args.lr_head, args.lr, args.epochs) == (percent, lr_head, lr, 50)
        assert (args.decay_milestones, args.decay_rate, args.momentum, args.weight_decay) == ([30, 40], 0.1, 0.9, 0)
    assert script.parser.parse(['-c', config]).batch_size == 256


def test_rates_fall_at_milestones_in_any_order():
    args = script.parser.parse(['--percent', '1', '--decay-milestones', '40', '30', '40'])
    script.choose_settings(args)
    assert args.decay_milestones == [30, 40]


def test_a_list_file_chooses_the_images(encoder, named_images, tmp_path, capsys):
    (tmp_path / 'images' / 'train').rename(tmp_path / 'images' / 'validation')
    shutil.copytree(tmp_path / 'images' / 'validation', tmp_path / 'images' / 'train')
    data = ['--data-dir', tmp_path / 'images', '--in-chans', '1', *CPU, '--epochs', '1', '--percent', '1']
    names = write_list(tmp_path, 'cat_1.png', 'dog/dog_2.png', 'dog/shared.png')
    code, results = semisup(encoder, tmp_path / 'listed', '--label-list', names, data=data)
    assert code == 0 and results['train_images'] == 3 and results['lr_head'] == 0.5
    names = write_list(tmp_path, 'cow.png')
    argv = ['--model', f'local-dir:{encoder}', *data, '--label-list', names]
    check_refused(capsys, script, argv, f'--label-list {names}: 1 of 1 names', 'cow.png')


def test_unreadable_images_are_left_out_and_counted(encoder, tmp_path, caplog):
    data = write_damaged(tmp_path / 'images')
    code, results = semisup(encoder, tmp_path / 'run', '--percent', '100', '--epochs', '2', data=data)
    assert code == 0
    assert (results['train_images'], results['train_unreadable']) == (15, 1)
    assert (results['val_images'], results['val_unreadable']) == (7, 1)
    assert caplog.text.count('cat/001.png (') == 1 and caplog.text.count('dog/105.png (') == 1


@pytest.mark.parametrize('args, named', [
    ([], '--percent: say which images are labelled, by it or by --label-list'),
    (['--percent', '101'], 'at most 100'),
    (['--percent', '0'], '--percent'),
    (['--label-list', 'list.txt'], '--label-list list.txt: needs --lr and --lr-head'),
])
def test_bad_input_is_one_line_that_names_the_option(encoder, tmp_path, capsys, args, named):
    argv = ['--model', f'local-dir:{encoder}', *DIGITS, '--output', tmp_path / 'run', *args]
    check_refused(capsys, script, argv, named)
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()


@pytest.mark.slow
def test_two_processes_evaluate_every_image_once(encoder, tmp_path):
    done = run_two_processes(
        'eval_semisup.py', '--model', f'local-dir:{encoder}', *DIGITS, '--batch-size', '64', '--percent', '10',
        '--epochs', '2', '--output', tmp_path / 'two')
    assert done.returncode == 0, done.stderr[-3000:]
    results = printed_results(done.stdout)
    assert results['val_images'] == 364
    assert exported_top1(tmp_path / 'two') == pytest.approx(results['top1'], abs=1e-3)

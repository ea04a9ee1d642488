"""What a run of train.py does, from the command line."""
import os
import re
import subprocess
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from conftest import REPOSITORY
from script_runner import ENV, call_script
from timm_cgh.train.checkpoint import read_checkpoint
from timm_cgh.train.run import Run
from training import TINY, check_ok, command, make_images, read_summary, train


def test_without_data_it_trains_on_digits_and_leaves_all_files(tmp_path):
    text = check_ok(train('--epochs', 2, '--output', tmp_path, '--experiment', 'run', '--hidden-dim', 32, '--workers',
                          0, '--knn-interval', 1, '--model', 'test_resnet', '--device', 'cpu', plots=True))
    folder = tmp_path / 'run'
    assert "UCI's 1,797 handwritten digits" in text
    assert re.search(r'kNN top-1: \d+\.\d+ % before, \d+\.\d+ % after training; raw pixels 9[89]\.\d+ %', text)
    assert re.search(r'per class: \d+\.\d+ % before, \d+\.\d+ % after training; raw pixels 6\d\.\d+ %', text)
    assert f"local-dir:{folder / 'export'}" in text
    assert re.search(r'Files in .* last\.pth\.tar, model_best\.pth\.tar, export/', text)
    assert float(read_summary(folder)[-1]['eval_rankme']) > 5
    for name in ('args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'curves.png', 'export/config.json',
                 'export/model.safetensors'):
        assert (folder / name).stat().st_size > 0, name
    assert not list(folder.glob('.*')) and not list(folder.glob('*.tmp'))
    rows = read_summary(folder)
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert {'train_loss', 'train_loss_gh', 'train_loss_hg', 'train_entropy_hyper', 'train_std_global', 'eval_knn',
            'lr'} <= set(rows[0])

    model = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    plain = timm.create_model('test_resnet', num_classes=0, in_chans=1).eval()
    plain.load_state_dict(read_checkpoint(str(folder / 'last.pth.tar'))['state_dict'])
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.slow  # two whole runs
def test_args_yaml_repeats_the_run(tmp_path, images):
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 2, '--output', tmp_path, '--experiment', 'a',
                   '--momentum-teacher', 0.9))
    check_ok(train('--config', tmp_path / 'a' / 'args.yaml', '--experiment', 'b'))
    first, second = (read_checkpoint(str(tmp_path / name / 'last.pth.tar')) for name in 'ab')
    assert yaml.safe_load((tmp_path / 'b' / 'args.yaml').read_text())['momentum_teacher'] == 0.9
    for key, value in first['state_dict'].items():
        assert torch.equal(value, second['state_dict'][key]), key


@pytest.fixture(scope='module')
def sources(tmp_path_factory, images):
    """name -> arguments of train.py"""
    root = tmp_path_factory.mktemp('sources')
    flat = make_images(root / 'flat', classes=())
    with tarfile.open(root / 'images.tar', 'w') as tar:
        tar.add(images, arcname='.')
    pytest.importorskip('webdataset')
    shards = ['--output', root / 'shards', '--shard-images', '12', '--workers', '0']
    assert call_script('write_shards', '--data-dir', images, *shards) == 0
    return {
        'folder': ['--data-dir', images],
        'flat': ['--data-dir', flat],
        'tar': ['--data-dir', root / 'images.tar'],
        'wds': ['--dataset', 'wds/', '--data-dir', root / 'shards'],
    }


@pytest.mark.parametrize('source', ['folder', 'flat', 'tar', 'wds'])
def test_two_epochs_on_every_source(tmp_path, sources, source):
    text = check_ok(train(*TINY, *sources[source], '--epochs', 2, '--output', tmp_path, '--experiment', 'run'))
    rows = read_summary(tmp_path / 'run')
    assert len(rows) == 2 and all(np.isfinite(float(row['train_loss'])) for row in rows)
    assert (tmp_path / 'run' / 'export' / 'model.safetensors').exists()
    labelled = source in ('folder', 'tar')
    assert ('% after training' in text) == labelled
    assert (tmp_path / 'run' / 'model_best.pth.tar').exists() == labelled


def test_two_epochs_on_cifar10_through_hfds(tmp_path, shared_data):
    env = dict(ENV, HF_HOME=str(tmp_path / 'cache'))
    name = f"hfds/{os.path.relpath(shared_data / 'cifar10', REPOSITORY)}"
    text = check_ok(subprocess.run(
        command(*TINY, '--dataset', name, '--train-split', 'train[:64]', '--knn-images', 32, '--epochs', 2,
                '--output', tmp_path, '--experiment', 'run'),
        env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=240))
    assert 'images of test against' in text and len(read_summary(tmp_path / 'run')) == 2


@pytest.mark.parametrize('options', [
    ['--context', 'same', '--predictor', '--hyper-norm', 'group', '--bn-splits', '4'],
    ['--context', 'global', '--opt', 'adamw', '--opt-betas', '0.9', '0.95', '--no-decay-norm-bias'],
    ['--features-only', '--out-indices', '1', '3', '--drop-path', '0.1'],
    ['--features-only', '--model', 'test_vit', '--img-size', '32'],
    # 40 px: torch's bfloat16 convolution on a CPU reads memory that it has not written where a map has one position
    ['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--clip-grad', '1', '--grad-accum-steps', '2', '--img-size',
     '40'],
    ['--torchcompile', 'eager', '--out-indices', '-4', '-3', '-2', '-1'],
    ['--grad-checkpointing', '--weak-scale', '0.5', '1', '--train-interpolation', 'bicubic'],
    ['--amp', '--img-size', '40'],
])
def test_options_run(tmp_path, images, options):
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 2, '--output', tmp_path, '--experiment', 'run', *options))
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True).eval()
    size = 32 if 'test_vit' in options else 16
    assert model(torch.randn(1, 3, size, size)).shape == (1, model.head_hidden_size)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_milestones_count_from_the_beginning_of_the_run(tmp_path, images):
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 3, '--output', tmp_path, '--experiment', 'run',
                   '--knn-interval', 0,
                   '--sched', 'multistep', '--decay-milestones', 2, 1, '--warmup-epochs', 0.5))
    assert [float(row['lr']) for row in read_summary(tmp_path / 'run')] == pytest.approx([0.003, 0.0003,
                                                                                          0.0003])  # at their ends


def test_wsd_decays_over_the_last_fifth_unless_told_otherwise(tmp_path, images):
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 6, '--output', tmp_path, '--experiment', 'run',
                   '--knn-interval', 0,
                   '--sched', 'wsd', '--warmup-epochs', 1))
    assert [float(row['lr']) for row in read_summary(tmp_path / 'run')] == pytest.approx([0.03] * 5 + [0], abs=1e-6)


def test_poly_falls_in_a_line_unless_told_otherwise(tmp_path, images):
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 4, '--output', tmp_path, '--experiment', 'run',
                   '--knn-interval', 0, '--sched', 'poly', '--warmup-epochs', 0))
    lr = [float(row['lr']) for row in read_summary(tmp_path / 'run')]
    assert lr == pytest.approx([0.0225, 0.015, 0.0075, 0], abs=1e-6)


def test_start_from_weights(tmp_path, images):
    state = timm.create_model('test_resnet', num_classes=5).state_dict()
    torch.save(state, tmp_path / 'w.pth')
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 1, '--output', tmp_path, '--experiment', 'run', '--lr', 0,
                   '--weight-decay', 0, '--initial-checkpoint', tmp_path / 'w.pth'))
    trained = read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))['state_dict']
    assert torch.equal(trained['conv1.0.weight'] if 'conv1.0.weight' in trained else trained['conv1.weight'],
                       state['conv1.0.weight'] if 'conv1.0.weight' in state else state['conv1.weight'])


def test_a_handful_of_images_gives_a_loss_to_learn_from(tmp_path):
    args = [*TINY, '--data-dir', make_images(tmp_path / 'images', count=12), '--batch-size', 4, '--epochs', 1]
    args[args.index('--bank-size'):args.index('--bank-size') + 2] = []
    assert ', bank 2, ' in check_ok(train(*args, '--knn-interval', 0, '--output', tmp_path, '--experiment', 'run'))
    assert float(read_summary(tmp_path / 'run')[0]['train_loss']) > 0.1


def test_unreadable_images_are_named_in_part(caplog):
    run = SimpleNamespace(unreadable=set())
    Run._note_unreadable(run, [f'{number}.jpg' for number in range(1000)] * 2)
    assert caplog.text.count('Unreadable image skipped') == 100 and len(run.unreadable) == 1000


def test_a_corrupt_image_is_named_counted_and_skipped(tmp_path):
    folder = make_images(tmp_path / 'images')
    (folder / 'cat' / '000.jpg').write_bytes((folder / 'cat' / '002.jpg').read_bytes()[:200])
    text = check_ok(train(*TINY, '--data-dir', folder, '--epochs', 2, '--knn-interval', 0, '--output', tmp_path,
                          '--experiment', 'run'))
    assert len(re.findall(r'Unreadable image skipped: \S+cat/000\.jpg', text)) == 1 and '1 unreadable' in text


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto',
            '--hyper-norm', 'none',
            '--model', 'test_vit', '--img-size', 160, '--warmup-epochs', 0]
    check_ok(train(*args, '--epochs', 1))
    done = train(*args, '--epochs', 40, '--lr', '1e20')
    text = done.stdout + done.stderr
    assert done.returncode == 1 and 'The loss is not finite' in text and 'Traceback' not in text
    assert (tmp_path / 'run' / 'last.pth.tar').exists()
    for path in (tmp_path / 'run').glob('*.pth.tar'):
        state = read_checkpoint(str(path))
        assert all(torch.isfinite(v).all() for v in state['state_dict'].values() if v.is_floating_point())


def test_a_killed_run_leaves_the_backbone_of_its_last_checkpoint(tmp_path, images):
    process = subprocess.Popen(
        command(*TINY, '--data-dir', images, '--epochs', 1000, '--knn-interval', 0, '--output', tmp_path,
                '--experiment', 'run'),
        env=ENV, cwd=REPOSITORY, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for line in process.stderr:
        if 'epoch 1: ' in line:
            process.kill()
            break
    process.communicate()
    state = read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))['state_dict']
    exported = load_file(tmp_path / 'run' / 'export' / 'model.safetensors')
    assert exported.keys() == state.keys() and all(torch.equal(exported[name], state[name]) for name in state)


def test_a_collapsed_representation_is_announced(tmp_path, images):
    # nothing is learnt, and a projector without weights gives every image the same embedding
    text = check_ok(train(
        *TINY, '--dataset', 'digits', '--in-chans', 1, '--batch-size', 128, '--epochs', 4, '--output', tmp_path,
        '--experiment', 'run', '--context', 'global', '--lr', 3, '--weight-decay', 0.3, '--momentum-teacher', 0.5,
        '--knn-interval', 4))
    assert float(read_summary(tmp_path / 'run')[-1]['eval_rankme']) < 2
    assert 'collapsed' in text

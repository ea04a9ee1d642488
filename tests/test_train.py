"""train.py by its command line."""
import csv
import importlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from conftest import REPOSITORY
from script_runner import ENV, run_script
from timm_cgh.progress import StopRequest
from timm_cgh.run import leave_files
from timm_cgh.task import read_checkpoint

# a network, heads and a data set small enough that a run is a matter of seconds
TINY = ['--model', 'test_resnet', '--img-size', '16', '--hidden-dim', '16', '--embed-dim', '8', '--bank-size', '16',
        '--batch-size', '8', '--workers', '0', '--lr', '0.03', '--knn-interval', '1', '--device', 'cpu']


def command(*args):
    return [sys.executable, str(REPOSITORY / 'train.py'), *map(str, args)]


def train(*args, cwd=REPOSITORY):
    return run_script('train.py', *args, cwd=cwd)


def check_ok(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def check_refused(capsys, args, *named):
    """In this process: a refusal comes before anything that would be left behind."""
    sys.modules.pop('train', None)
    script = importlib.import_module('train')
    script.parser.prog = 'train.py'
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.cli([str(a) for a in args])
    message = capsys.readouterr().err
    assert stop.value.code == 2, message
    last = message.strip().splitlines()[-1]
    assert last.startswith('train.py: error: '), message
    for name in named:
        assert name in last, last


def make_images(folder, count=24, size=20, classes=('cat', 'dog')):
    """Random images in class folders (or in none): class k is bright in channel k."""
    rng = np.random.default_rng(0)
    for i in range(count):
        name = classes[i % len(classes)] if classes else ''
        pixels = rng.integers(0, 120, (size, size + 3, 3), dtype=np.uint8)
        pixels[..., i % 2] += 100
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f'{i:03d}.jpg')
    return folder


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('data') / 'images')


def rows_of(folder):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


# ---- what a run does


def test_digits_by_default_says_so_and_leaves_all_files(tmp_path):
    text = check_ok(train('--epochs', 2, '--output', tmp_path, '--experiment', 'run', '--hidden-dim', 32, '--workers', 0,
                          '--knn-interval', 1, '--model', 'test_resnet', '--device', 'cpu'))
    folder = tmp_path / 'run'
    assert "scikit-learn's 1,797 handwritten digits" in text
    assert re.search(r'kNN top-1: \d+\.\d+ % before, \d+\.\d+ % after training; raw pixels 9[89]\.\d+ %', text)
    assert f"local-dir:{folder / 'export'}" in text
    for name in ('args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'curves.png', 'export/config.json',
                 'export/model.safetensors'):
        assert (folder / name).stat().st_size > 0, name
    assert not list(folder.glob('.*')) and not list(folder.glob('*.tmp'))
    rows = rows_of(folder)
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
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 2, '--output', tmp_path, '--experiment', 'a', '--momentum-teacher', 0.9))
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
    wds = pytest.importorskip('webdataset')
    (root / 'shards').mkdir()
    with wds.ShardWriter(str(root / 'shards' / 'shard-%06d.tar'), maxcount=12, verbose=0) as sink:
        for i, path in enumerate(sorted(images.rglob('*.jpg'))):
            sink.write({'__key__': f'{i:06d}', 'jpg': path.read_bytes(), 'cls': str(i % 2).encode()})
    return {
        'folder': ['--data-dir', images],
        'flat': ['--data-dir', flat],
        'tar': ['--data-dir', root / 'images.tar'],
        'wds': ['--dataset', 'wds/', '--data-dir', root / 'shards', '--train-split', 'shard-{000000..000001}.tar|24'],
        'digits': ['--dataset', 'digits', '--in-chans', '1', '--hflip', '0', '--batch-size', '128'],
    }


@pytest.mark.parametrize('source', ['folder', 'flat', 'tar', 'wds', 'digits'])
def test_two_epochs_on_every_source(tmp_path, sources, source):
    text = check_ok(train(*TINY, *sources[source], '--epochs', 2, '--output', tmp_path, '--experiment', 'run'))
    rows = rows_of(tmp_path / 'run')
    assert len(rows) == 2 and all(np.isfinite(float(row['train_loss'])) for row in rows)
    assert (tmp_path / 'run' / 'export' / 'model.safetensors').exists()
    labelled = source in ('folder', 'tar', 'digits')
    assert ('% after training' in text) == labelled
    assert (tmp_path / 'run' / 'model_best.pth.tar').exists() == labelled


def test_two_epochs_on_cifar10_through_hfds(tmp_path, shared_data):
    env = dict(ENV, HF_HOME=str(tmp_path / 'cache'))
    name = f"hfds/{os.path.relpath(shared_data / 'cifar10', REPOSITORY)}"
    text = check_ok(subprocess.run(
        command(*TINY, '--dataset', name, '--train-split', 'train[:64]', '--knn-images', 32, '--epochs', 2,
                '--output', tmp_path, '--experiment', 'run'),
        env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=240))
    assert 'images of test against' in text and len(rows_of(tmp_path / 'run')) == 2


@pytest.mark.parametrize('options', [
    ['--context', 'same', '--predictor', '--hyper-norm', 'group', '--bn-splits', '4'],
    ['--context', 'global', '--opt', 'adamw', '--opt-betas', '0.9', '0.95', '--no-decay-norm-bias'],
    ['--features-only', '--out-indices', '1', '3', '--drop-path', '0.1'],
    ['--features-only', '--model', 'test_vit', '--img-size', '32'],
    # 64 px: torch's bfloat16 convolution on a CPU reads memory that it has not written where a map has one position
    ['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--clip-grad', '1', '--grad-accum-steps', '2', '--img-size', '64'],
    ['--torchcompile', 'eager', '--out-indices', '-4', '-3', '-2', '-1'],
    ['--grad-checkpointing', '--weak-scale', '0.5', '1', '--train-interpolation', 'bicubic'],
    ['--amp', '--img-size', '64'],
])
def test_options_run(tmp_path, images, options):
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 2, '--output', tmp_path, '--experiment', 'run', *options))
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True).eval()
    size = 32 if 'test_vit' in options else 16
    assert model(torch.randn(1, 3, size, size)).shape == (1, model.head_hidden_size)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_milestones_count_from_the_beginning_of_the_run(tmp_path, images):
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 3, '--output', tmp_path, '--experiment', 'run', '--knn-interval', 0,
                   '--sched', 'multistep', '--decay-milestones', 1, 2, '--warmup-epochs', 0.5))
    assert [float(row['lr']) for row in rows_of(tmp_path / 'run')] == pytest.approx([0.003, 0.0003, 0.0003])  # at their ends


def test_wsd_decays_over_the_last_fifth_unless_told_otherwise(tmp_path, images):
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 6, '--output', tmp_path, '--experiment', 'run', '--knn-interval', 0,
                   '--sched', 'wsd', '--warmup-epochs', 1))
    assert [float(row['lr']) for row in rows_of(tmp_path / 'run')] == pytest.approx([0.03] * 5 + [0], abs=1e-6)


def test_number_of_workers_changes_no_loss(tmp_path, images):
    rows = []
    for workers in (0, 2):
        check_ok(train(*TINY, '--data-dir', images, '--epochs', 2, '--output', tmp_path, '--experiment', workers,
                       '--workers', workers, '--knn-interval', 0))
        rows.append(rows_of(tmp_path / str(workers)))
    for row in sum(rows, []):
        for measured in ('train_images_per_s', 'train_peak_memory_mib'):
            row.pop(measured)
    assert rows[0] == rows[1] and len({row['train_loss'] for row in rows[0]}) == 2


def test_start_from_weights(tmp_path, images):
    state = timm.create_model('test_resnet', num_classes=5).state_dict()
    torch.save(state, tmp_path / 'w.pth')
    check_ok(train(*TINY, '--data-dir', images, '--epochs', 1, '--output', tmp_path, '--experiment', 'run', '--lr', 0,
                   '--weight-decay', 0, '--initial-checkpoint', tmp_path / 'w.pth'))
    trained = read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))['state_dict']
    assert torch.equal(trained['conv1.0.weight'] if 'conv1.0.weight' in trained else trained['conv1.weight'],
                       state['conv1.0.weight'] if 'conv1.0.weight' in state else state['conv1.weight'])


def test_a_corrupt_image_is_named_counted_and_passed_over(tmp_path):
    folder = make_images(tmp_path / 'images')
    (folder / 'cat' / '000.jpg').write_bytes((folder / 'cat' / '002.jpg').read_bytes()[:200])
    text = check_ok(train(*TINY, '--data-dir', folder, '--epochs', 2, '--knn-interval', 0, '--workers', 1,
                          '--output', tmp_path, '--experiment', 'run'))
    assert len(re.findall(r'Unreadable image passed over: \S+cat/000\.jpg', text)) == 1 and '1 unreadable' in text


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto', '--hyper-norm', 'none',
            '--model', 'test_vit', '--img-size', 160, '--warmup-epochs', 0]
    check_ok(train(*args, '--epochs', 1))
    done = train(*args, '--epochs', 40, '--lr', '1e20')
    text = done.stdout + done.stderr
    assert done.returncode == 1 and 'The loss is not finite' in text and 'Traceback' not in text
    assert (tmp_path / 'run' / 'last.pth.tar').exists()
    for path in (tmp_path / 'run').glob('*.pth.tar'):
        state = read_checkpoint(str(path))
        assert all(torch.isfinite(v).all() for v in state['state_dict'].values() if v.is_floating_point())


def test_a_killed_run_leaves_the_backbone_of_its_last_checkpoint(tmp_path):
    process = subprocess.Popen(
        command(*TINY, '--dataset', 'digits', '--in-chans', 1, '--epochs', 1000, '--knn-interval', 0, '--output', tmp_path,
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
    text = check_ok(train(*TINY, '--data-dir', images, '--epochs', 4, '--output', tmp_path, '--experiment', 'run',
                          '--context', 'global', '--lr', '3', '--weight-decay', '0.3', '--momentum-teacher', '0.5'))
    assert 'collapsed' in text


# ---- resume


def files_equal(first, second):
    a, b = (read_checkpoint(str(folder / 'last.pth.tar')) for folder in (first, second))

    def check(x, y, where):
        assert type(x) is type(y), where
        if isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for key in x:
                check(x[key], y[key], f'{where}.{key}')
        elif isinstance(x, (list, tuple)):
            assert len(x) == len(y), where
            for i, (p, q) in enumerate(zip(x, y)):
                check(p, q, f'{where}[{i}]')
        elif torch.is_tensor(x):
            assert torch.equal(x, y), where
        else:
            assert x == y, where

    for part in ('state_dict', 'task_state', 'optimizer', 'epoch'):
        check(a[part], b[part], part)


RESUMED = [*TINY, '--dataset', 'digits', '--in-chans', 1, '--hflip', 0, '--batch-size', 64, '--epochs', 6, '--drop-path', 0.2,
           '--recovery-interval', 3, '--predictor', '--resume', 'auto', '--knn-interval', 2]


def check_kill_and_resume(tmp_path, kills, seed):
    """Train once through, and once killed `kills` times at random moments; both must end the same."""
    began = time.time()  # of a start like those that are killed
    check_ok(subprocess.run(command(*RESUMED, '--output', tmp_path, '--experiment', 'whole'), env=ENV, cwd=REPOSITORY,
                            capture_output=True, text=True, timeout=240))
    duration = time.time() - began
    rng = random.Random(seed)
    killed = 0
    for _ in range(20 * kills):
        process = subprocess.Popen(command(*RESUMED, '--output', tmp_path, '--experiment', 'killed'), env=ENV, cwd=REPOSITORY,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.3, 1.0) * duration)
            if killed >= kills:
                break
            # it ended before the blow: begin once more, so that every kill hits a run
            for path in sorted((tmp_path / 'killed').rglob('*'), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            if killed >= kills:
                break
    assert killed == kills
    check_ok(train(*RESUMED, '--output', tmp_path, '--experiment', 'killed'))
    files_equal(tmp_path / 'whole', tmp_path / 'killed')
    whole, resumed = rows_of(tmp_path / 'whole'), rows_of(tmp_path / 'killed')
    for row in [*whole, *resumed]:
        for measured in ('train_images_per_s', 'train_peak_memory_mib'):
            row.pop(measured)
    assert whole == resumed
    assert not list((tmp_path / 'killed').glob('recovery*'))


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    check_kill_and_resume(tmp_path, kills=1, seed=0)


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    check_kill_and_resume(tmp_path, kills=10, seed=1)


def test_knn_may_be_switched_on_by_a_resume(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    check_ok(train(*args, '--epochs', 1, '--knn-interval', 0))
    assert re.search(r'raw pixels \d+\.\d+ %$', check_ok(train(*args, '--epochs', 2)), re.MULTILINE)
    assert rows_of(tmp_path / 'run')[1]['eval_knn']


def test_knn_may_be_switched_off_by_a_resume(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    check_ok(train(*args, '--epochs', 1))
    text = check_ok(train(*args, '--epochs', 2, '--knn-interval', 0))
    assert 'kNN: switched off' in text and 'curves.png' in text and not rows_of(tmp_path / 'run')[1]['eval_knn']


def test_a_resume_takes_the_settings_of_the_optimiser_that_it_is_given(tmp_path, images, capsys):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto', '--knn-interval', 0]
    check_ok(train(*args, '--epochs', 1))
    check_ok(train(*args, '--epochs', 2, '--weight-decay', '0.1', '--momentum', '0.5'))
    group, = read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))['optimizer']['param_groups']
    assert (group['weight_decay'], group['momentum']) == (0.1, 0.5)
    check_refused(capsys, [*args, '--epochs', 3, '--opt', 'adamw'], '--resume', 'another optimiser')


def test_banks_larger_than_the_images_may_go_on_but_not_begin(tmp_path, capsys):
    few, many = make_images(tmp_path / 'few', 12), make_images(tmp_path / 'many')
    args = [*TINY, '--output', tmp_path, '--knn-interval', 0]
    check_refused(capsys, [*args, '--epochs', 1, '--data-dir', few], '--bank-size 16', '1 would do')
    check_ok(train(*args, '--epochs', 1, '--data-dir', many, '--experiment', 'many'))
    args += ['--data-dir', few, '--experiment', 'few', '--resume', tmp_path / 'many' / 'last.pth.tar', '--epochs', 2]
    check_refused(capsys, [*args, '--bank-size', 8], '--bank-size 8', 'hold 16')
    check_ok(train(*args))


def test_a_resume_keeps_its_banks_when_there_are_more_images(tmp_path):
    at = TINY.index('--bank-size')
    args = [*TINY[:at], *TINY[at + 2:], '--data-dir', tmp_path / 'images', '--output', tmp_path, '--experiment', 'run',
            '--resume', 'auto', '--knn-interval', 0]
    for epochs, count in ((1, 24), (2, 64)):
        make_images(tmp_path / 'images', count)
        assert ', bank 2, ' in check_ok(train(*args, '--epochs', epochs))


def test_the_schedule_of_a_resume_goes_by_epochs_whatever_their_number_of_batches(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto', '--knn-interval', 0]
    check_ok(train(*args, '--epochs', 2))
    check_ok(train(*args, '--epochs', 4, '--batch-size', 12))
    # one epoch of warm-up, then a cosine over three
    assert [float(row['lr']) for row in rows_of(tmp_path / 'run')[2:]] == pytest.approx([0.03 * 0.25, 0], abs=1e-9)


@pytest.mark.parametrize('signum', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_ends_cleanly_and_the_run_goes_on(tmp_path, signum):
    args = [*TINY, '--dataset', 'digits', '--in-chans', 1, '--hflip', 0, '--batch-size', 64, '--epochs', 4, '--log-interval', 1,
            '--workers', 1, '--knn-interval', 0, '--resume', 'auto', '--output', tmp_path]
    process = subprocess.Popen(command(*args, '--experiment', 'run'), env=ENV, cwd=REPOSITORY, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'epoch 1 [5/' in line:
            os.killpg(process.pid, signum)  # data workers included, as a terminal and a scheduler do it
            break
    lines.extend(process.stdout)
    text = ''.join(lines)
    assert process.wait(60) == 128 + signum, text
    assert f'Stopped by {signum.name}' in text and 'Traceback' not in text
    assert list((tmp_path / 'run').glob('recovery-1-*.pth.tar'))
    text = check_ok(train(*args, '--experiment', 'run'))
    assert re.search(r'Resumed .*recovery-1-\d+\.pth\.tar at epoch 1, batch \d+', text)
    check_ok(train(*args, '--experiment', 'whole'))
    files_equal(tmp_path / 'whole', tmp_path / 'run')


def test_a_run_stopped_in_its_first_epoch_draws_nothing_and_names_only_what_is_there(tmp_path):
    (tmp_path / 'args.yaml').touch()
    (tmp_path / 'export').mkdir()
    assert leave_files(None, str(tmp_path), None, [], {'raw pixels': 10.0}) == ['args.yaml', 'export/']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['args.yaml', 'export']


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch):
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    request = StopRequest()

    def all_reduce(flag, op):
        request._on_signal(signal.SIGTERM, None)

    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'all_reduce', all_reduce)
    assert not request.agreed(torch.device('cpu'))
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda flag, op: None)
    assert request.agreed(torch.device('cpu')) and request.signum == signal.SIGTERM


def test_processes_ask_each_other_in_time_and_not_more_often_than_needed(monkeypatch):
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    now = 0.0
    monkeypatch.setattr(time, 'perf_counter', lambda: now)
    request = StopRequest(patience=5)
    assert request.due(50)  # alone, always: it costs nothing
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda answers, op: None)
    asked = {}
    for seconds in (0.01, 0.5, 2.0, 20.0):
        asked[seconds] = []
        for update in range(150):
            now += seconds
            if request.due(50):
                asked[seconds].append(update)
                assert not request.agreed(torch.device('cpu'))
    gaps = {seconds: updates[-1] - updates[-2] for seconds, updates in asked.items()}
    assert gaps == {0.01: 50, 0.5: 10, 2.0: 2, 20.0: 1}


# ---- many processes


def test_two_processes_train_by_torchrun(tmp_path, images):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(REPOSITORY / 'train.py')]
    args = [*TINY, '--data-dir', images, '--epochs', 2, '--output', tmp_path, '--experiment', 'run', '--batch-size', 4,
            '--shuffle-bn', '--grad-accum-steps', 2, '--log-interval', 1, '--multi-crop', 16, 12, 12]
    done = subprocess.run([*launch, *map(str, args)], env=ENV, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    text = check_ok(done)
    assert '3 batches of 4 x 2 an epoch' in text and text.count('Load the backbone') == 1
    assert len(rows_of(tmp_path / 'run')) == 2 and all(row['eval_knn'] for row in rows_of(tmp_path / 'run'))
    alone = check_ok(train(*args, '--epochs', 1, '--experiment', 'alone'))
    line = r'kNN top-1 of the raw pixels .*'  # and of the backbone before training: shared, the same
    assert re.findall(line, text) == re.findall(line, alone) != []


def test_processes_that_find_different_checkpoints_are_refused(tmp_path, images):
    """Nodes whose --output is on disks of their own."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    args = [*map(str, [*TINY, '--data-dir', images, '--knn-interval', 0, '--output', 'out', '--experiment', 'run'])]
    check_ok(train(*args, '--epochs', 1, cwd=tmp_path / '0'))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '--no-python', 'bash', '-c']
    script = shlex.join(command(*args, '--epochs', 2, '--resume', 'auto'))
    done = subprocess.run([*launch, f'cd "$LOCAL_RANK" && exec {script}'], env=ENV, cwd=tmp_path, capture_output=True,
                          text=True, timeout=240)
    assert done.returncode != 0 and 'process 0 finds epoch 1, batch 0, process 1 no checkpoint' in done.stderr
    assert len(rows_of(tmp_path / '0' / 'out' / 'run')) == 1


@pytest.mark.slow
def test_two_processes_stop_together_where_an_epoch_is_shorter_than_the_log_interval(tmp_path, images):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(REPOSITORY / 'train.py')]
    args = [*TINY, '--data-dir', images, '--epochs', 1000, '--output', tmp_path, '--experiment', 'run', '--batch-size', 4,
            '--knn-interval', 0]
    process = subprocess.Popen([*launch, *map(str, args)], env=ENV, cwd=REPOSITORY, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'epoch 1: ' in line:
            process.terminate()  # torchrun passes it on to both
            break
    lines.extend(process.stdout)
    assert process.wait(60) != 0 and 'Stopped by SIGTERM; state saved' in ''.join(lines)
    assert read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))['progress']['epoch'] == len(rows_of(tmp_path / 'run')) < 1000


# ---- what is refused


@pytest.mark.parametrize('args,named', [
    (['--model', 'resnet51'], ['--model resnet51', 'resnet50']),
    (['--data-dir', 'no/such/folder'], ['--data-dir no/such/folder']),
    (['--data-dir', '{empty}'], ['--data-dir', 'empty']),
    (['--batch-size', '0'], ['--batch-size', 'at least 1']),
    (['--batch-size', '25'], ['--batch-size 25', '24 images']),
    (['--bank-size', '0'], ['--bank-size']),
    (['--bn-splits', '3'], ['--bn-splits 3', '--batch-size 8']),
    (['--bank-size', '4096'], ['--bank-size 4096', '24 images']),
    (['--temp-hyper', '-0.1'], ['--temp-hyper', 'positive']),
    (['--context', 'both'], ['--context', 'cross']),
    (['--out-indices', '9'], ['out_indices', '9']),
    (['--epochs', '2', '--warmup-epochs', '2'], ['--warmup-epochs 2']),
    (['--epochs', '2', '--contrast-warmup-epochs', '5'], ['--contrast-warmup-epochs 5']),
    (['--resume', 'no.pth.tar'], ['--resume no.pth.tar', 'no such file']),
    (['--resume', 'auto'], ['--experiment']),
    (['--output', '/proc/nowhere'], ['--output /proc/nowhere']),
    (['--dataset', 'cifar10'], ['--dataset cifar10', 'torch/cifar10']),
    (['--dataset', 'torch/cifar10', '--data-dir', '{empty}'], ['--dataset-download']),
    (['--val-split', 'exam'], ['--val-split exam']),
    (['--in-chans', '2'], ['--in-chans 2']),
    (['--mean', '0.5', '0.5'], ['--mean']),
    (['--opt', 'sgdd'], ['--opt sgdd']),
    (['--initial-checkpoint', 'no.safetensors'], ['--initial-checkpoint no.safetensors']),
    (['--device', 'cuda:7'], ['--device cuda:7']),
    (['--sync-bn'], ['--sync-bn']),
    (['--scale', '0.9', '0.2'], ['--scale']),
    (['--img-size', '1', '--model', 'test_vit'], ['--img-size', '1']),
    (['--knn-interval', '-1'], ['--knn-interval']),
    (['--config', 'no.yaml'], ['--config no.yaml']),
    (['--multi-crop', '12'], ['--multi-crop 12', '16']),
    (['--multi-crop', '16', '12', '--multi-crop-scale', '0.5', '1'], ['--multi-crop-scale', '2 crops']),
    (['--multi-crop-scale', '0.5', '1'], ['--multi-crop-scale', '--multi-crop']),
    (['--multi-crop', '32', '16', '--img-size', '32', '--model', 'vit_tiny_patch16_224', '--model-kwargs', 'depth=1'],
     ['--multi-crop 16', 'dynamic_img_size']),
    (['--method', 'moco', '--context', 'same'], ['--context', '--method moco']),
    (['--method', 'simclr', '--multi-crop'], ['--multi-crop', '--method simclr']),
    (['--method', 'moco', '--track-relations'], ['--track-relations', '--method moco']),
])
def test_bad_input_is_one_line_and_code_2_and_nothing_is_written(tmp_path, images, capsys, args, named):
    (tmp_path / 'empty').mkdir()
    args = [a.format(empty=tmp_path / 'empty') for a in args]
    given = ['--data-dir', images] if '--data-dir' not in args else []
    check_refused(capsys, [*TINY, *given, '--epochs', 3, '--output', tmp_path / 'out', *args], *named)
    assert not list((tmp_path / 'out').rglob('*.*'))


def test_a_run_is_not_overwritten_and_a_file_of_another_model_not_resumed(tmp_path, images, capsys):
    args = [*TINY, '--data-dir', images, '--epochs', 1, '--output', tmp_path]
    check_ok(train(*args, '--experiment', 'run'))
    before = {p: p.read_bytes() for p in (tmp_path / 'run').rglob('*') if p.is_file()}
    check_refused(capsys, [*args, '--experiment', 'run'], '--experiment run', '--resume auto')
    (tmp_path / 'begun').mkdir()
    shutil.copy(tmp_path / 'run' / 'last.pth.tar', tmp_path / 'begun' / 'recovery-0-2.pth.tar')
    check_refused(capsys, [*args, '--experiment', 'begun'], '--experiment begun', '--resume auto')
    shutil.copy(tmp_path / 'run' / 'last.pth.tar', tmp_path)  # another run's, which must not begin in this one's folder
    check_refused(capsys, [*args, '--experiment', 'run', '--resume', tmp_path / 'last.pth.tar'], '--experiment run')
    other = [*args, '--experiment', 'other', '--resume', tmp_path / 'run' / 'last.pth.tar']
    check_refused(capsys, [*other, '--model', 'test_vit', '--img-size', 160], '--resume', 'test_resnet', 'test_vit')
    check_refused(capsys, [*other, '--embed-dim', 16], '--resume')
    check_refused(capsys, [*other, '--context', 'global'], '--resume')
    assert before == {p: p.read_bytes() for p in (tmp_path / 'run').rglob('*') if p.is_file()}


def test_the_script_itself_exits_with_code_2():
    done = train('--epochs', 0)
    assert done.returncode == 2 and done.stderr == 'train.py: error: argument --epochs: must be a whole number of at least 1, got 0\n'

"""Runs of train.py that are interrupted and resumed."""
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch

from conftest import REPOSITORY
from script_runner import ENV
from timm_cgh.train.checkpoint import read_checkpoint
from training import TINY, check_equal_checkpoints, check_ok, check_refused, command, make_images, read_summary, train


def check_kill_and_resume(tmp_path, images, kills, seed):
    """Train once through, and once killed `kills` times at random moments; both must end the same."""
    args = [*TINY, '--data-dir', make_images(tmp_path / 'images', images), '--epochs', 4, '--drop-path', 0.2,
            '--predictor', '--knn-interval', 2, '--recovery-interval', 3, '--log-interval', 1, '--resume', 'auto',
            '--output', tmp_path, '--experiment']
    lines = len(check_ok(train(*args, 'whole')).splitlines())
    rng = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(command(*args, 'killed'), env=ENV, cwd=REPOSITORY, text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # so many lines that all processes together do not reach the end, however fast the machine is
        for _ in zip(range(rng.randrange(2, lines * 9 // 10 // kills)), process.stderr):
            pass
        time.sleep(rng.uniform(0, 0.1))  # anywhere in a step or a checkpoint
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    check_ok(train(*args, 'killed'))
    check_equal_checkpoints(tmp_path / 'whole', tmp_path / 'killed')
    whole, resumed = read_summary(tmp_path / 'whole'), read_summary(tmp_path / 'killed')
    for row in [*whole, *resumed]:
        for measured in ('train_images_per_s', 'train_data_wait', 'train_peak_memory_mib'):
            row.pop(measured)
    assert whole == resumed
    assert not list((tmp_path / 'killed').glob('recovery*'))


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    check_kill_and_resume(tmp_path, images=100, kills=1, seed=0)


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    check_kill_and_resume(tmp_path, images=400, kills=10, seed=1)


def test_knn_may_be_switched_on_by_a_resume(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    check_ok(train(*args, '--epochs', 1, '--knn-interval', 0))
    assert re.search(r'raw pixels \d+\.\d+ %$', check_ok(train(*args, '--epochs', 2)), re.MULTILINE)
    assert read_summary(tmp_path / 'run')[1]['eval_knn']


def test_knn_may_be_switched_off_by_a_resume(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    check_ok(train(*args, '--epochs', 1))
    text = check_ok(train(*args, '--epochs', 2, '--knn-interval', 0, plots=True))
    assert 'kNN: switched off' in text and 'curves.png' in text and not read_summary(tmp_path / 'run')[1]['eval_knn']


def test_a_resume_takes_the_settings_of_the_optimiser_that_it_is_given(tmp_path, images, capsys):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto',
            '--knn-interval', 0]
    check_ok(train(*args, '--epochs', 1))
    check_ok(train(*args, '--epochs', 2, '--weight-decay', '0.1', '--momentum', '0.5'))
    group, = read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))['optimizer']['param_groups']
    assert (group['weight_decay'], group['momentum']) == (0.1, 0.5)
    check_refused(capsys, [*args, '--epochs', 3, '--opt', 'adamw'], '--resume', 'another optimiser')


def test_banks_larger_than_the_images_may_go_on_but_not_begin(tmp_path, capsys):
    few, many = make_images(tmp_path / 'few', 12), make_images(tmp_path / 'many')
    args = [*TINY, '--output', tmp_path, '--knn-interval', 0]
    check_refused(capsys, [*args, '--epochs', 1, '--data-dir', few], '--bank-size 16', 'at most 2 is advised')
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
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto',
            '--knn-interval', 0]
    check_ok(train(*args, '--epochs', 2))
    check_ok(train(*args, '--epochs', 4, '--batch-size', 12))
    # one epoch of warm-up, then a cosine over three
    assert [float(row['lr']) for row in read_summary(tmp_path / 'run')[2:]] == pytest.approx([0.03 * 0.25, 0], abs=1e-9)


def test_a_run_is_not_overwritten_and_a_checkpoint_of_another_model_is_refused(tmp_path, images, capsys):
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


def test_other_images_than_before_the_kill_start_the_epoch_over(tmp_path):
    args = [*TINY, '--data-dir', tmp_path / 'images', '--output', tmp_path, '--experiment', 'run', '--knn-interval', 0]
    make_images(tmp_path / 'images')
    check_ok(train(*args, '--epochs', 1, '--recovery-interval', 1))
    state = torch.load(tmp_path / 'run' / 'last.pth.tar')  # torch's defaults read it: no objects inside
    state['progress'].update(epoch=0, batch=2, meter=dict(sums=[], counts=[]))
    (tmp_path / 'run' / 'last.pth.tar').unlink()
    torch.save(state, tmp_path / 'run' / 'recovery-0-2.pth.tar')
    cats = tmp_path / 'images' / 'cat'
    (cats / '000.jpg').rename(cats / 'new.jpg')  # as many images, in another order
    text = check_ok(train(*args, '--epochs', 1, '--resume', 'auto'))
    assert 'saved with another order of the images: epoch 0 starts over' in text


def test_resuming_a_finished_run_says_that_it_is(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--knn-interval', 0, '--epochs',
            1]
    check_ok(train(*args))
    assert 'This run is finished: it has all of its 1 epochs' in check_ok(train(*args, '--resume', 'auto'))

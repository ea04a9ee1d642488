"""train.py in several processes."""
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from conftest import REPOSITORY
from script_runner import ENV, run_script
from timm_cgh.train.checkpoint import read_checkpoint
from timm_cgh.train.meter import Meter
from timm_cgh.train.run import Run, Step
from training import TINY, check_ok, read_summary, torchrun, train


def test_two_processes_train_by_torchrun(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--epochs', 2, '--output', tmp_path, '--experiment', 'run', '--batch-size', 4,
            '--shuffle-bn', '--grad-accum-steps', 2, '--log-interval', 1, '--multi-crop', 16, 12, 12]
    done = subprocess.run(torchrun(*args), env=ENV, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    text = check_ok(done)
    assert '3 batches of 4 x 2 an epoch' in text and text.count('Load the backbone') == 1
    assert 'Warning' not in done.stderr
    assert len(read_summary(tmp_path / 'run')) == 2 and all(row['eval_knn'] for row in read_summary(tmp_path / 'run'))
    alone = check_ok(train(*args, '--epochs', 1, '--experiment', 'alone'))
    line = r'kNN top-1: raw pixels .*'  # and of the backbone before training: shared, the same
    assert re.findall(line, text) == re.findall(line, alone) != []


@pytest.mark.parametrize('logged, reads', [(False, 0), (True, 1)])
@pytest.mark.parametrize('terminal', [False, True])
def test_a_terminal_of_rank_zero_changes_no_exchange_between_the_processes(monkeypatch, terminal, logged, reads):
    exchanges, losses = [], []
    monkeypatch.setattr(Meter, '_averaged_sums', lambda meter: exchanges.append(meter) or meter.sums)
    progress = SimpleNamespace(start=0, bar=SimpleNamespace(disable=not terminal, update=lambda: None),
                               report=lambda done, loss, *_: losses.append(loss))
    run = SimpleNamespace(meter=Meter(), progress=progress, optimizer=SimpleNamespace(param_groups=[{'lr': 0.1}]),
                          knn=None)
    run._finite = lambda *loss: Run._finite(run, *loss)
    assert Run.record(run, Step(0, [], torch.zeros(0), 2, update=False, logged=logged), {'loss': torch.tensor(3.5)})
    assert len(exchanges) == reads and losses == [3.5] * (terminal or logged)


def test_processes_that_find_different_checkpoints_are_refused(tmp_path, images):
    """Nodes whose --output is on separate disks."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    args = [*TINY, '--data-dir', images, '--knn-interval', 0, '--output', 'out', '--experiment', 'run']
    check_ok(train(*args, '--epochs', 1, cwd=tmp_path / '0'))
    done = run_script('train.py', *args, '--epochs', 2, '--resume', 'auto', cwd=[tmp_path / '0', tmp_path / '1'],
                      processes=2)
    assert done.returncode != 0 and 'rank 0 finds epoch 1, batch 0, rank 1 no checkpoint' in done.stderr
    assert len(read_summary(tmp_path / '0' / 'out' / 'run')) == 1


@pytest.mark.slow
def test_two_processes_stop_together_where_an_epoch_is_shorter_than_the_log_interval(tmp_path, images):
    args = [*TINY, '--data-dir', images, '--epochs', 1000, '--output', tmp_path, '--experiment', 'run', '--batch-size',
            4,
            '--knn-interval', 0]
    process = subprocess.Popen(torchrun(*args), env=ENV, cwd=REPOSITORY, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'epoch 1: ' in line:
            process.terminate()  # torchrun passes it on to both
            break
    lines.extend(process.stdout)
    assert process.wait(60) != 0 and 'Stopped by SIGTERM; the state is saved' in ''.join(lines)
    state = read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))
    assert state['progress']['epoch'] == len(read_summary(tmp_path / 'run')) < 1000

import os

import pytest
import torch

from timm_cgh import create_task
from timm_cgh.files import Summary
from timm_cgh.train.checkpoint import RunSaver, read_checkpoint
from timm_cgh.train.meter import Meter
from timm_cgh.train.resume import find_checkpoint


def create_saver(task, optimizer, folder):
    return RunSaver(
        task, {'model': 'resnet10t'}, optimizer=optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder),
        max_history=1)


@pytest.fixture
def saver(tmp_path):
    task = create_task('resnet10t', bank_size=16, hidden_dim=8, embed_dim=8)
    optimizer = torch.optim.SGD(task.student.parameters(), lr=0.1)
    saver = create_saver(task, optimizer, tmp_path)
    saver.progress = dict(epoch=1, batch=0)
    return saver


def test_checkpoint_holds_the_plain_model_the_task_and_the_place(saver, tmp_path):
    saver.save_checkpoint(0, metric=50.0)
    state = read_checkpoint(str(tmp_path / 'last.pth.tar'))
    assert state['progress'] == dict(epoch=1, batch=0)
    assert state['state_dict'].keys() == saver.run_task.student.backbone.state_dict().keys()
    assert {'heads', 'teacher', 'banks', 'num_updates'} == state['task_state'].keys()
    assert (tmp_path / 'model_best.pth.tar').exists() and 'state_dict_ema' not in state


def test_last_is_there_at_every_moment_of_a_save(saver, tmp_path, monkeypatch):
    saver.save_checkpoint(0, metric=50.0)
    seen = []
    for name in ('replace', 'unlink', 'link', 'remove'):
        def spy(*args, real=getattr(os, name), **kwargs):  # noqa: B008
            seen.append([(tmp_path / f).exists() for f in ('last.pth.tar', 'model_best.pth.tar')])
            read_checkpoint(str(tmp_path / 'last.pth.tar'))  # raises on a torn file
            result = real(*args, **kwargs)
            seen.append([(tmp_path / f).exists() for f in ('last.pth.tar', 'model_best.pth.tar')])
            return result
        monkeypatch.setattr(os, name, spy)
    saver.save_checkpoint(1, metric=60.0)
    assert len(seen) > 6 and all(all(row) for row in seen)


def test_without_a_metric_there_is_no_best(saver, tmp_path):
    saver.save_checkpoint(0)
    assert (tmp_path / 'last.pth.tar').exists() and not (tmp_path / 'model_best.pth.tar').exists()


def test_the_most_advanced_readable_checkpoint_is_found(saver, tmp_path):
    assert find_checkpoint(str(tmp_path)) is None
    saver.save_checkpoint(0)
    assert find_checkpoint(str(tmp_path)).path.endswith('last.pth.tar')
    for batch in (9, 10):  # '10' sorts before '9' by name
        saver.progress = dict(epoch=1, batch=batch)
        saver.save_recovery(1, batch)
    assert find_checkpoint(str(tmp_path)).path.endswith('recovery-1-10.pth.tar')
    (tmp_path / 'recovery-1-11.pth.tar').write_bytes(b'torn')
    assert find_checkpoint(str(tmp_path)).path.endswith('recovery-1-10.pth.tar')
    saver.progress = dict(epoch=2, batch=0)
    saver.save_checkpoint(1)
    assert sorted(p.name for p in tmp_path.glob('recovery*')) == []


def test_files_that_are_no_run_are_refused_in_one_line(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'model.pth')
    torch.save({'task_state': {}, 'progress': {}, 'x': RunSaver}, tmp_path / 'code.pth')
    (tmp_path / 'torn.pth').write_bytes(b'PK')
    for name, reason in (('model.pth', 'not a checkpoint of a pre-training run'), ('code.pth', 'not a readable'),
                         ('torn.pth', 'not a readable'), ('missing.pth', 'no such file')):
        with pytest.raises(ValueError, match=reason) as error:
            read_checkpoint(str(tmp_path / name))
        assert '\n' not in str(error.value) and name in str(error.value)


def test_ranking_goes_on_after_a_resume_and_a_missing_best_is_made(saver, tmp_path):
    saver.save_checkpoint(0, metric=50.0)
    saver.save_checkpoint(1, metric=60.0)
    (tmp_path / 'model_best.pth.tar').unlink()
    state = read_checkpoint(str(tmp_path / 'last.pth.tar'))
    state['saver']['pending'] = (1, 60.0)
    again = create_saver(saver.run_task, saver.optimizer, tmp_path)
    again.restore(state, str(tmp_path / 'last.pth.tar'), rewind=False)
    assert (again.best_epoch, again.best_metric) == (1, 60.0)
    assert (tmp_path / 'model_best.pth.tar').exists()


@pytest.mark.parametrize('hard_links', (True, False))
def test_a_run_can_be_taken_back_to_its_best(saver, tmp_path, hard_links):
    weight = saver.run_task.student.backbone.layer1[0].conv1.weight
    for epoch, metric in enumerate((50.0, 60.0, 40.0)):
        torch.nn.init.constant_(weight, epoch)
        saver.can_hardlink = hard_links
        saver.progress = dict(epoch=epoch + 1, batch=0)
        saver.save_checkpoint(epoch, metric=metric)
    saver.progress = dict(epoch=3, batch=7)
    saver.save_recovery(3, 7)
    best = str(tmp_path / 'model_best.pth.tar')
    again = create_saver(saver.run_task, saver.optimizer, tmp_path)
    again.can_hardlink = hard_links
    again.restore(read_checkpoint(best), best, rewind=True)
    for name in ('model_best', 'last'):  # the collapsed epoch is in neither
        state = read_checkpoint(str(tmp_path / f'{name}.pth.tar'))
        assert state['progress']['epoch'] == 2 and (state['state_dict']['layer1.0.conv1.weight'] == 1).all(), name
    assert find_checkpoint(str(tmp_path)).path.endswith('last.pth.tar')
    assert not list(tmp_path.glob('recovery*')) and not list(tmp_path.glob('*.tmp'))
    assert (again.best_epoch, again.best_metric) == (1, 60.0)


def test_meter_averages_each_name_over_the_steps_that_had_it():
    meter = Meter()
    meter.update({'loss': torch.tensor(1.0), 'nce': torch.tensor(5.0)})
    meter.update({'loss': torch.tensor(2.0)})
    meter.update({'loss': torch.tensor(6.0)})
    again = Meter()
    again.load_state_dict(meter.state_dict(), torch.device('cpu'))
    assert meter.read() == again.read() == {'loss': 3.0, 'nce': 5.0}


def test_summary_drops_the_rows_that_a_resumed_run_writes_again(tmp_path):
    path = str(tmp_path / 'summary.csv')
    summary = Summary(path)
    for epoch in range(3):
        summary.add({'epoch': epoch, 'train_loss': 1.5})
    summary = Summary(path, start_epoch=2)
    summary.add({'epoch': 2, 'train_loss': 0.5, 'eval_knn': 90.0})
    assert (tmp_path / 'summary.csv').read_text() == 'epoch,train_loss,eval_knn\n0,1.5,\n1,1.5,\n2,0.5,90.0\n'

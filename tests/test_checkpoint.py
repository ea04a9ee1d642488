import copy
import os
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from run_folders import record_disk_calls
from timm_cgh import create_task
from timm_cgh.distributed import Process
from timm_cgh.errors import InputError
from timm_cgh.files import Summary
from timm_cgh.train.checkpoint import RunSaver, read_checkpoint
from timm_cgh.train.meter import Meter
from timm_cgh.train.resume import ResumePoint, claim_folder, find_checkpoint, find_run, restore


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


def test_a_checkpoint_is_on_the_disk_before_anything_older_is_removed(saver, tmp_path, monkeypatch):
    saver.save_checkpoint(0, metric=50.0)
    calls = record_disk_calls(monkeypatch)
    for epoch in (1, 2, 3):
        saver.save_checkpoint(epoch, metric=50.0 + epoch)
        assert calls[0] == ('fsync', os.stat(tmp_path / 'last.pth.tar').st_ino) and len(calls) > 2
        calls.clear()


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
    summary = Summary(path, start=2)
    summary.add({'epoch': 2, 'train_loss': 0.5, 'eval_knn': 90.0})
    assert (tmp_path / 'summary.csv').read_text() == 'epoch,train_loss,eval_knn\n0,1.5,\n1,1.5,\n2,0.5,90.0\n'


def test_a_ranking_from_elsewhere_deletes_no_file_outside_the_folder(saver, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    for name in ('precious.txt', 'checkpoint-9.pth.tar'):
        (tmp_path / name).write_text('mine')
    (folder / 'notes.txt').write_text('mine')
    saver.checkpoint_dir = saver.recovery_dir = str(folder)
    saver.save_checkpoint(0, metric=50.0)
    state = read_checkpoint(str(folder / 'last.pth.tar'))
    names = ['../precious.txt', '../checkpoint-9.pth.tar', str(tmp_path / 'precious.txt'), 'notes.txt', 'last.pth.tar']
    state['saver']['checkpoint_files'] = [(name, 1.0) for name in names]
    again = create_saver(saver.run_task, saver.optimizer, folder)
    again.restore(state, str(folder / 'last.pth.tar'), rewind=False)
    for epoch in range(1, 4):
        again.progress = dict(epoch=epoch + 1, batch=0)
        again.save_checkpoint(epoch, metric=50.0 + epoch)
    assert {path.name for path in tmp_path.iterdir()} == {'run', 'precious.txt', 'checkpoint-9.pth.tar'}
    assert (folder / 'notes.txt').exists() and (folder / 'last.pth.tar').exists()


def test_an_older_checkpoint_serves_where_the_last_one_is_broken(saver, tmp_path):
    for epoch in range(2):
        saver.progress = dict(epoch=epoch + 1, batch=0)
        saver.save_checkpoint(epoch, metric=50.0)
    os.unlink(tmp_path / 'last.pth.tar')  # or the hard link to it would be broken as well
    (tmp_path / 'last.pth.tar').write_bytes(b'torn')
    point = find_checkpoint(str(tmp_path))
    assert point.path.endswith('checkpoint-0.pth.tar') and point.progress['epoch'] == 1


@pytest.mark.parametrize('name', ['milestone-1.pth.tar', 'copy.pth.tar'])
def test_broken_checkpoints_do_not_hide_a_readable_one(saver, tmp_path, name):
    saver.save_checkpoint(0)
    (tmp_path / 'last.pth.tar').rename(tmp_path / name)
    for broken in ('last.pth.tar', 'checkpoint-0.pth.tar'):
        (tmp_path / broken).unlink(missing_ok=True)  # a hard link
        (tmp_path / broken).write_bytes(b'torn')
    for resume in ['auto'] * name.startswith('milestone') + [str(tmp_path / name)]:
        assert find_run(str(tmp_path.parent), tmp_path.name, resume, '')[1].path == str(tmp_path / name)


def test_checkpoints_that_are_all_broken_are_refused_not_overwritten(tmp_path):
    (tmp_path / 'last.pth.tar').write_bytes(b'torn')
    with pytest.raises(InputError, match=r'last\.pth\.tar: not a readable'):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize('name,value', [
    ('epoch', -5), ('epoch', 1e30), ('batch', 'x'), ('batch', None), ('epoch', True)])
def test_a_position_that_no_run_has_is_refused(saver, tmp_path, name, value):
    saver.progress = {**dict(epoch=1, batch=0), name: value}
    saver.save_checkpoint(0)
    with pytest.raises(InputError, match=f'last.pth.tar: broken, its {name} is'):
        read_checkpoint(str(tmp_path / 'last.pth.tar'))


@pytest.mark.parametrize('where,value,named', [
    ('task_state teacher backbone.conv1.0.weight', torch.Tensor.long, 'backbone.conv1.0.weight is torch.int64'),
    ('task_state teacher', None, 'teacher is a NoneType'),
    ('task_state heads', [1], 'heads is a list'),
    ('task_state banks global.embeddings', lambda bank: bank.to(torch.complex64), 'embeddings is torch.complex64'),
    ('task_state banks global.embeddings', torch.Tensor.to_sparse, 'embeddings is not dense'),
    ('task_state banks global.embeddings', lambda bank: bank[:2], r'embeddings is \(2, 8\), not \(16, 8\)'),
    ('task_state banks hyper._extra_state', torch.tensor(16), 'position'),
    ('state_dict', {'conv1.0.weight': 'text'}, 'conv1.0.weight is a str'),
    ('optimizer', [], 'optimizer is a list'),
    ('optimizer state', {0: None}, 'its state'),
    ('optimizer state', {'x': 3}, 'its state'),
    ('optimizer param_groups', [3], 'param_groups is a int'),
    ('optimizer param_groups', [{'params': None}], 'params is a NoneType'),
])
@pytest.mark.filterwarnings('ignore')  # torch's, about sparse tensors
def test_parts_of_a_checkpoint_of_another_type_or_shape_are_refused_in_one_line(saver, where, value, named):
    state = copy.deepcopy({**saver.run_task.get_checkpoint_state(), 'optimizer': saver.optimizer.state_dict()})
    *path, last = where.split()
    part = state
    for name in path:
        part = part[name]
    part[last] = value(part[last]) if callable(value) else value
    with pytest.raises(InputError, match=f'^resume=last: a checkpoint of .* that does not fit .*{named}') as error:
        restore(ResumePoint('last', state), saver.run_task, saver.optimizer)
    assert '\n' not in str(error.value)


def test_a_checkpoint_that_a_kill_prevented_is_made_at_the_resume(saver, tmp_path):
    for epoch, metric in ((0, 50.0), (1, 60.0)):
        shutil.rmtree(tmp_path / 'kept', ignore_errors=True)
        (tmp_path / 'kept').mkdir()
        for path in tmp_path.glob('*.pth.tar'):
            shutil.copy(path, tmp_path / 'kept')
        saver.progress = dict(epoch=epoch + 1, batch=0)
        saver.save_checkpoint(epoch, metric=metric)
    whole = sorted(path.name for path in tmp_path.glob('*.pth.tar'))
    killed = tmp_path / 'kept'  # after the rename of `last`, before the others
    shutil.copy(tmp_path / 'last.pth.tar', killed)
    again = create_saver(saver.run_task, saver.optimizer, killed)
    again.restore(read_checkpoint(str(killed / 'last.pth.tar')), str(killed / 'last.pth.tar'), rewind=False)
    assert sorted(path.name for path in killed.glob('*.pth.tar')) == whole
    assert read_checkpoint(str(killed / 'model_best.pth.tar'))['progress']['epoch'] == 2


@pytest.mark.parametrize('error', [
    OSError(28, 'No space left on device'),
    RuntimeError('[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3'),
])
def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(saver, tmp_path, monkeypatch, error):
    saver.save_checkpoint(0)
    before = (tmp_path / 'last.pth.tar').read_bytes()

    def half(state, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise error

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(InputError, match=r'last good checkpoint is .*last\.pth\.tar'):
        saver.save_checkpoint(1)
    assert (tmp_path / 'last.pth.tar').read_bytes() == before and not (tmp_path / 'tmp.pth.tar').exists()


def test_a_bug_in_saving_keeps_its_traceback(saver, monkeypatch):
    def broken(state, path):
        raise RuntimeError('something else')

    monkeypatch.setattr(torch, 'save', broken)
    with pytest.raises(RuntimeError, match='something else'):
        saver.save_checkpoint(0)


def meter_rank(rank, folder):
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    meter, resumed = Meter(), Meter()
    for step in range(4):
        if step == 2:
            resumed.load_state_dict(meter.state_dict(), torch.device('cpu'))
        for each in (meter, resumed) if step >= 2 else (meter,):
            each.update({'loss': torch.tensor(float(10 * rank + step))})
    assert meter.read() == resumed.read() == {'loss': 6.5}
    dist.destroy_process_group()


def test_the_averages_of_several_processes_survive_a_resume_in_the_middle_of_an_epoch(tmp_path):
    mp.start_processes(meter_rank, (str(tmp_path),), nprocs=2, start_method='forkserver')


@pytest.mark.parametrize('state', [
    {},
    {'sums': [(['loss'], torch.zeros(2))], 'counts': [(['loss'], 1)]},
    {'sums': [(['loss'], torch.zeros(1))], 'counts': []},
    {'sums': [(['loss'], torch.zeros(1))], 'counts': [(['loss'], 'x')]},
])
def test_a_broken_meter_is_refused(state):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Meter().load_state_dict(state, torch.device('cpu'))


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    with claim_folder(str(tmp_path / 'run'), str(tmp_path), True, True, Process()) as folder:
        (tmp_path / 'run' / '.args.yaml.123.tmp').touch()
        with pytest.raises(InputError, match='experiment=run: another process is training'), \
                claim_folder(folder, str(tmp_path), True, True, Process()):
            pass
        assert (tmp_path / 'run' / '.args.yaml.123.tmp').exists()  # it may be the other's
    (tmp_path / 'run' / '.export-abc').mkdir()
    (tmp_path / 'run' / '.export-abc' / 'model.safetensors').touch()
    for name in ('tmp.pth.tar', 'recovery_tmp.pth.tar', 'model_best.pth.tar.tmp'):
        (tmp_path / 'run' / name).touch()
    with claim_folder(folder, str(tmp_path), True, True, Process()):
        assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == ['.lock']
    assert not list((tmp_path / 'run').iterdir())


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    name = str(tmp_path / 'new' / '20240101-120000-resnet50-224')
    with claim_folder(name, str(tmp_path / 'new'), False, True, Process()) as first, \
            claim_folder(name, str(tmp_path / 'new'), False, True, Process()) as second:
        assert (first, second) == (name, f'{name}-2')


def test_a_run_that_was_finished_meanwhile_is_not_overwritten(saver, tmp_path):
    saver.save_checkpoint(0)
    with pytest.raises(InputError, match='holds a run'), \
            claim_folder(str(tmp_path), str(tmp_path.parent), True, True, Process()):
        pass


@pytest.mark.parametrize('name', ['run[1]', 'a*b', '[ab]', 'what?'])
def test_checkpoints_are_found_in_folders_of_any_name(saver, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    saver.checkpoint_dir = saver.recovery_dir = str(folder)
    saver.progress = dict(epoch=0, batch=7)
    saver.save_recovery(0, 7)
    assert find_checkpoint(str(folder)).path == str(folder / 'recovery-0-7.pth.tar')
    saver.save_checkpoint(0)
    assert sorted(path.name for path in folder.iterdir()) == ['checkpoint-0.pth.tar', 'last.pth.tar']

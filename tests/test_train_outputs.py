"""What a run writes about itself, and the options of its evaluations."""
import importlib.machinery
import shutil
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml

import train as script
from script_runner import call_script
from timm_cgh.data import ViewLoader
from timm_cgh.progress import Progress
from timm_cgh.train.checkpoint import read_checkpoint
from timm_cgh.train.monitor import QualityMonitor
from timm_cgh.train.outputs import describe_epoch
from training import TINY, check_refused, make_images, read_summary


@pytest.fixture(scope='module')
def loose(tmp_path_factory):
    """Images without labels."""
    return make_images(tmp_path_factory.mktemp('loose') / 'images', classes=())


def train(*args, plots=False):
    return call_script('train', *TINY, *args, plots=plots)


def test_a_run_describes_itself(images, tmp_path):
    args = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--checkpoint-interval', 2]
    assert train(*args, '--epochs', 3) == 0
    folder = tmp_path / 'run'
    resolved = yaml.safe_load((folder / 'resolved.yaml').read_text())
    options = resolved['options']
    assert options.keys() == vars(script.parser.parse_args([])).keys() and options['bank_size'] == 16
    assert options['warmup_epochs'] == 0.75 and options['contrast_warmup_epochs'] == 0.75  # settled from the epochs
    assert resolved['images'] == 24 and resolved['input_size'] == [3, 16, 16] and resolved['processes'] == 1
    assert resolved['versions']['torch'].startswith(torch.__version__.split('+')[0])
    log = (folder / 'train.log').read_text().splitlines()
    assert sum(' INFO epoch 0: loss' in line for line in log) == 1
    assert sum('test_resnet (' in line for line in log) == 1  # from before the folder was there
    assert {path.name for path in folder.glob('milestone-*')} == {'milestone-2.pth.tar'}
    assert read_checkpoint(str(folder / 'milestone-2.pth.tar'))['progress']['epoch'] == 2
    assert all(0 <= float(row['train_data_wait']) <= 100 for row in read_summary(folder))

    assert train(*args, '--epochs', 4, '--resume', 'auto') == 0
    assert [path.name for path in sorted(folder.glob('milestone-*'))] == ['milestone-2.pth.tar', 'milestone-4.pth.tar']
    log = (folder / 'train.log').read_text()
    assert log.count(' epoch 0: ') == 1 and log.count(' epoch 3: ') == 1


def test_the_data_wait_is_that_for_the_loader_alone(images, tmp_path, monkeypatch):
    timed, waiting = [], Progress.waiting

    def record(progress, batches):
        timed.append(batches)
        return waiting(progress, batches)

    monkeypatch.setattr(Progress, 'waiting', record)
    assert train('--data-dir', images, '--output', tmp_path, '--epochs', 2) == 0
    assert len(timed) == 2 and all(isinstance(batches, ViewLoader) for batches in timed)


def test_the_evaluation_is_no_part_of_the_data_wait(images, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Progress, 'data_wait', property(lambda _: asked.append('wait') or 0.0))
    monkeypatch.setattr(QualityMonitor, '__call__', lambda *_: asked.append('evaluation') or {})
    assert train('--data-dir', images, '--output', tmp_path, '--epochs', 1) == 0
    assert 'wait' in asked and asked[-1] == 'evaluation'


def test_an_unlabelled_run_ends_with_its_nearest_neighbours(loose, tmp_path):
    assert train('--data-dir', loose, '--output', tmp_path, '--experiment', 'run', '--epochs', 1, plots=True) == 0
    report = (tmp_path / 'run' / 'report.html').read_text()
    assert (tmp_path / 'run' / 'neighbours.png').exists() and 'Nearest neighbours' in report and 'kNN' not in report
    row, = read_summary(tmp_path / 'run')
    assert float(row['eval_rankme']) > 1 and 'eval_knn' not in row


def test_a_milestone_that_a_kill_prevented_is_made_at_the_resume(images, tmp_path):
    args = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--checkpoint-interval', 2]
    assert train(*args, '--epochs', 2) == 0
    (tmp_path / 'run' / 'milestone-2.pth.tar').unlink()
    assert train(*args, '--epochs', 3, '--resume', 'auto') == 0
    assert read_checkpoint(str(tmp_path / 'run' / 'milestone-2.pth.tar'))['progress']['epoch'] == 2


@pytest.mark.parametrize('split', [False, True])
def test_labelled_images_of_another_folder_serve_the_knn_evaluation(images, loose, tmp_path, split, capsys):
    labelled = tmp_path / 'labelled'
    for name in ('train', 'val') if split else ('.',):
        shutil.copytree(images, labelled / name, dirs_exist_ok=True)
    args = ['--data-dir', loose, '--knn-dir', labelled, '--epochs', 1, '--output', tmp_path, '--experiment', 'run']
    assert train(*args) == 0
    assert float(read_summary(tmp_path / 'run')[-1]['eval_knn']) > 0
    counts = (24, 24) if split else (4, 20)
    assert f'kNN: {counts[0]} images of {labelled} against {counts[1]} others' in capsys.readouterr().err


def test_a_knn_folder_that_cannot_be_used_is_refused(images, loose, tmp_path, capsys):
    args = [*TINY, '--data-dir', images, '--output', tmp_path]
    check_refused(capsys, [*args, '--knn-dir', loose], '--knn-dir', 'fewer than two classes')
    check_refused(capsys, [*args, '--knn-dir', tmp_path / 'missing'], '--knn-dir', 'missing')


def test_knn_may_see_larger_images_than_the_training(images, tmp_path):
    args = script.parser.parse([*map(str, TINY), '--data-dir', str(images), '--knn-img-size', '20'])
    dataset = script.open_dataset(**script.arguments_of(script.open_dataset, args))
    config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')
    model = timm.create_model('test_resnet', num_classes=0)
    monitor = script.build_monitor(args, dataset, model, config, script.init_process('cpu'))
    assert monitor.extractor.data_config['input_size'] == (3, 20, 20) and config['input_size'] == (3, 16, 16)


def test_the_line_of_an_epoch_fits_100_columns():
    row = dict(
        epoch=399, train_loss=12.345, train_loss_gh=12.345, train_loss_hg=12.345, train_loss_nce=12.345,
        eval_knn=99.99, eval_rankme=1024.0, train_images_per_s=10000.0)
    assert len(describe_epoch(row)) <= 100
    assert describe_epoch(dict(epoch=1, train_loss=3.0, train_images_per_s=9.6)) == 'epoch 1: loss 3.000, 10 images/s'


def test_a_resumed_run_goes_on_in_its_wandb_run(images, tmp_path, monkeypatch):
    class Wandb:
        """Stands in for the package, which would ask for a login."""
        __spec__ = importlib.machinery.ModuleSpec('wandb', None)
        calls, rows, finished = [], [], []

        def init(self, id=None, **kwargs):
            self.calls.append({'id': id, **kwargs})
            return SimpleNamespace(id=id or 'new', log=self.rows.append, finish=lambda: self.finished.append(id))

    monkeypatch.setitem(sys.modules, 'wandb', fake := Wandb())
    args = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    for epochs in (1, 2):
        assert train(*args, '--epochs', epochs, '--log-wandb', '--wandb-project', 'birds') == 0
    assert [call['id'] for call in fake.calls] == fake.finished == [None, 'new']
    assert [row['epoch'] for row in fake.rows] == [0, 1]
    assert all((call['project'], call['name'], call['resume']) == ('birds', 'run', 'allow') for call in fake.calls)
    assert fake.calls[0]['config']['options']['bank_size'] == 16

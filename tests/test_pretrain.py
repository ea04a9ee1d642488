"""Pre-training from Python, and the console script."""
import logging
import signal
from pathlib import Path

import pytest
import torch

import timm_cgh
from conftest import REPOSITORY
from input_errors import refused
from timm_cgh import __main__ as console
from timm_cgh.scripts import train as script
from training import make_images

OPTIONS = dict(
    img_size=16, hidden_dim=16, embed_dim=8, bank_size=16, batch_size=8, workers=0, knn_interval=1, device='cpu',
    epochs=1)


@pytest.fixture
def images(tmp_path):
    return str(make_images(tmp_path / 'images'))


def test_two_runs_in_one_process_are_equal_and_leave_nothing_behind(images, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), logging.root.level
    handlers, logging.root.handlers = logging.root.handlers, []  # pytest's, as if there were none
    try:
        first, second = (
            timm_cgh.pretrain(images, 'test_resnet', output=str(tmp_path), experiment=name, **OPTIONS)
            for name in ('a', 'b'))
        assert not logging.root.handlers
    finally:
        logging.root.handlers = handlers
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), logging.root.level) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('epoch 0: ')]
    assert len(lines) == 2
    assert first.folder == str(tmp_path / 'a') and first.knn is not None and len(first.epochs) == 1
    assert first.epochs[0]['train_loss'] == second.epochs[0]['train_loss']
    for (name, a), b in zip(first.backbone.state_dict().items(), second.backbone.state_dict().values()):
        assert torch.equal(a, b), name
    assert first.backbone(torch.rand(1, 3, 16, 16)).shape == (1, first.backbone.num_features)


def test_a_resume_gives_numbers_and_lets_go_of_its_checkpoint(images, tmp_path, monkeypatch):
    options = {**OPTIONS, 'experiment': 'run', 'output': str(tmp_path), 'resume': 'auto', 'opt': 'adamw'}
    timm_cgh.pretrain(images, 'test_resnet', **{**options, 'knn_interval': 0})
    step, mapped = script.train_one_epoch, []

    def look(args, run, epoch):
        mapped.append('last.pth.tar' in Path('/proc/self/maps').read_text())
        step(args, run, epoch)

    if Path('/proc/self/maps').exists():
        monkeypatch.setattr(script, 'train_one_epoch', look)
    before, after = timm_cgh.pretrain(images, 'test_resnet', **{**options, 'epochs': 2}).epochs
    assert all(isinstance(value, (int, float)) for value in before.values()) and not any(mapped)
    assert 'eval_knn' in after.keys() - before.keys() and (before['epoch'], after['epoch']) == (0, 1)


@pytest.mark.parametrize('options, named', [
    (dict(epoch=1), ['epoch', 'no such option']),
    (dict(epochs=0), ['epochs', 'at least 1']),
    (dict(context='both'), ['context', 'not one of']),
    (dict(bank_size=1000), ['bank_size=1000']),
    (dict(config='missing.yaml'), ['config=missing.yaml']),
])
def test_errors_name_the_parameter(images, tmp_path, options, named):
    with refused(*named):
        timm_cgh.pretrain(images, 'test_resnet', output=str(tmp_path), **{**OPTIONS, **options})


def test_a_loss_that_is_not_finite_is_raised(images, tmp_path, caplog):
    with pytest.raises(FloatingPointError):
        timm_cgh.pretrain(
            images, 'test_resnet', output=str(tmp_path), **OPTIONS, lr=1e30, warmup_epochs=0, sched='constant')
    assert 'The loss is not finite in epoch 0: stopped. No state was saved yet' in caplog.text


def test_ctrl_c_is_raised_once_the_state_is_saved(images, tmp_path, monkeypatch):
    step, before = script.train_one_epoch, signal.getsignal(signal.SIGINT)

    def interrupted(args, run, epoch):
        signal.raise_signal(signal.SIGINT)
        step(args, run, epoch)

    monkeypatch.setattr(script, 'train_one_epoch', interrupted)
    with pytest.raises(KeyboardInterrupt, match='SIGINT'):
        timm_cgh.pretrain(images, 'test_resnet', output=str(tmp_path), experiment='run', **OPTIONS)
    assert list((tmp_path / 'run').glob('recovery-*.pth.tar'))
    assert signal.getsignal(signal.SIGINT) is before


def test_console_script_runs_the_root_scripts(capsys):
    assert console.main(['--version']) == 0
    assert capsys.readouterr().out.strip() == timm_cgh.__version__
    assert console.main([]) == 0 and 'usage: timm-cgh COMMAND' in capsys.readouterr().out
    assert console.main(['trian']) == 2 and 'no such command: trian' in capsys.readouterr().err
    for command in console._COMMANDS:
        with pytest.raises(SystemExit) as done:
            console.main([command, '--help'])
        assert done.value.code == 0 and capsys.readouterr().out.startswith(f'usage: timm-cgh {command}')
    assert script.__file__ == str(REPOSITORY / 'train.py')


def test_console_script_finds_the_configurations_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('cifar10.yaml', 'configs/cifar10.yaml'):
        assert script.parser.parse(['-c', name]).model == 'resnet18_s1'
    with refused('config=other/cifar10.yaml'):
        script.parser.parse(['-c', 'other/cifar10.yaml'])

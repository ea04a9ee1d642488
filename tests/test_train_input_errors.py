"""Bad options and files: one line that names the option, exit code 2, nothing written."""
import importlib.util

import pytest

from training import TINY, check_refused, make_images, train


@pytest.mark.parametrize('args,named', [
    (['--model', 'resnet51'], ['--model resnet51', 'resnet50']),
    (['--data-dir', 'no/such/folder'], ['--data-dir no/such/folder']),
    (['--data-dir', '{empty}'], ['--data-dir', 'empty']),
    (['--data-dir', ''], ['--data-dir']),
    (['--batch-size', '0'], ['--batch-size', 'at least 1']),
    (['--batch-size', '25'], ['--batch-size 25', '24 images']),
    (['--bank-size', '0'], ['--bank-size']),
    (['--bn-splits', '3'], ['--bn-splits 3', '--batch-size 8']),
    (['--bank-size', '4096'], ['--bank-size 4096', '24 images']),
    (['--temp-hyper', '-0.1'], ['--temp-hyper', 'positive']),
    (['--context', 'both'], ['--context', 'cross']),
    (['--out-indices', '9'], ['--out-indices', '9']),
    (['--epochs', '2', '--warmup-epochs', '2'], ['--warmup-epochs 2']),
    (['--epochs', '2', '--contrast-warmup-epochs', '5'], ['--contrast-warmup-epochs 5']),
    (['--resume', 'no.pth.tar'], ['--resume no.pth.tar', 'no such file']),
    (['--resume', 'auto'], ['--resume auto', '--experiment']),
    (['--output', '/proc/nowhere'], ['--output /proc/nowhere']),
    (['--dataset', 'cifar10'], ['--dataset cifar10', 'torch/cifar10']),
    (['--dataset', 'torch/cifar10', '--data-dir', '{empty}'], ['--dataset-download']),
    (['--val-split', 'exam'], ['--val-split exam']),
    (['--in-chans', '2'], ['its shape is (20, 23, 3), --in-chans is 2']),
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
    (['--knn-img-size', '48', '--img-size', '32', '--model', 'vit_tiny_patch16_224', '--model-kwargs', 'depth=1'],
     ['--knn-img-size 48', '32']),
    (['--method', 'moco', '--context', 'same'], ['--context', 'method moco']),
    (['--method', 'simclr', '--multi-crop'], ['--multi-crop', 'method simclr']),
    (['--method', 'moco', '--track-relations'], ['--track-relations', 'method moco']),
    (['--batch-size', '1'], ['--batch-size 1: must be at least 2']),
    (['--data-dir', '{single}'], ['--data-dir', 'a single image']),
    (['--bank-size', '1'], ['--bank-size 1: must be at least 2']),
    (['--seed', '4294967296'], ['--seed', 'at most 4294967295']),
    (['--mean', '127'], ['--mean', 'at most 1']),
    (['--mean', 'nan'], ['--mean', 'from 0 to 1']),
    (['--std', '1e-320'], ['--std', 'above 0']),
    (['--std', '58.4'], ['--std', 'at most 1']),
    (['--gaussian-blur-sigma', '1', '1e30'], ['--gaussian-blur-sigma', '100']),
    (['--device', 'meta'], ['--device meta']),
    (['--device', 'xpu'], ['--device xpu']),
    (['--device', 'mps'], ['--device mps']),
    (['--batch-size', '1' + '0' * 30], ['--batch-size', 'at most 2147483647']),
    (['--opt', 'adahessian'], ['--opt adahessian']),
    (['--opt', 'kron'], ['--opt kron: needs the opt_einsum package']),
    (['--opt-kwargs', 'nesterov=abc'], ['--opt momentum']),
    (['--opt-kwargs', 'nesterov'], ['--opt-kwargs', 'KEY=VALUE']),
    (['--model-kwargs', 'foo'], ['--model-kwargs', 'KEY=VALUE']),
    (['--model-kwargs', 'in_chans=5'], ['--model-kwargs: must not hold in_chans, --in-chans sets it']),
    (['--model', '{export}'], ['--model', 'did you mean local-dir:{export}?']),
    (['--torchcompile', 'nonsense'], ['--torchcompile nonsense']),
    (['--log-wandb'], ["--log-wandb: needs the wandb package (pip install 'timm-cgh[wandb]')"]),
    (['--log-tensorboard'], ["--log-tensorboard: needs the tensorboard package (pip install 'timm-cgh[tensorboard]')"]),
])
def test_bad_input_is_one_line_and_code_2_and_nothing_is_written(tmp_path, images, capsys, monkeypatch, args, named):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'export').mkdir()
    (tmp_path / 'export' / 'config.json').touch()
    if '{single}' in args:
        make_images(tmp_path / 'single', count=1)
    if args[0].startswith('--log-') or 'kron' in args:
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    args, named = (
        [part.format(**{name: tmp_path / name for name in ('empty', 'export', 'single')}) for part in parts]
        for parts in (args, named))
    given = ['--data-dir', images] if '--data-dir' not in args else []
    check_refused(capsys, [*TINY, *given, '--epochs', 3, '--output', tmp_path / 'out', *args], *named)
    assert not list((tmp_path / 'out').rglob('*.*'))


def test_the_script_itself_exits_with_code_2():
    done = train('--epochs', 0)
    assert done.returncode == 2
    assert done.stderr == 'train.py: error: argument --epochs: must be a whole number of at least 1, got 0\n'

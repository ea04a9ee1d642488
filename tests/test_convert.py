"""convert.py: the same features in torchvision, detectron2 and ONNX."""
import json
from functools import cache

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

import convert as script
from backbones import equal, randomise
from input_errors import check_refused
from timm_cgh import create_task
from timm_cgh.models import create_backbone
from timm_cgh.models.export import export_backbone

CONFIG = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), tag='cgh_test')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """`run(name)`: a run's folder, its images and the features that timm gives."""
    @cache
    @torch.no_grad()
    def make(name):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        model = randomise(create_backbone(name)).eval()
        export_backbone(model, folder / 'export', input_size=(3, 64, 64), **CONFIG)
        images = torch.randn(2, 3, 64, 64)
        return folder, images, model(images)
    return make


def convert(*args):
    return script.parser.run(script.main, [str(arg) for arg in args])


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_torchvisions_own_model_gives_the_same_features(run, name, tmp_path):
    folder, images, features = run(name)
    file = tmp_path / 'made' / 'model.safetensors'
    assert convert(folder, '--to', 'torchvision', '--output', file) == 0
    model = getattr(torchvision.models, name)()
    model.fc = torch.nn.Identity()
    model.load_state_dict(load_file(file))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), features)
    with safe_open(file, 'pt') as opened:
        assert json.loads(opened.metadata()['mean']) == [0.1, 0.2, 0.3]
    assert [path.name for path in file.parent.iterdir()] == ['model.safetensors']


def detectron2_resnet(weights, x, groups=1):
    """detectron2's modeling/backbone/resnet.py by the names of its modules: BasicStem, BasicBlock or BottleneckBlock
    with STRIDE_IN_1X1 False, (frozen) batch norm; the names that it asks for are taken out of `weights`."""
    def conv(x, name, stride=1, groups=1):
        kernel = weights.pop(f'{name}.weight')
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        norm = [weights.pop(f'{name}.norm.{part}') for part in ('running_mean', 'running_var', 'weight', 'bias')]
        return F.batch_norm(x, *norm, eps=1e-5)

    x = F.max_pool2d(conv(x, 'stem.conv1', stride=2).relu(), kernel_size=3, stride=2, padding=1)
    for stage in ('res2', 'res3', 'res4', 'res5'):
        for i in range(len({name.split('.')[1] for name in weights if name.startswith(stage)})):
            block, stride = f'{stage}.{i}', 2 if i == 0 and stage != 'res2' else 1
            if f'{block}.conv3.weight' in weights:
                out = conv(conv(x, f'{block}.conv1').relu(), f'{block}.conv2', stride, groups).relu()
                out = conv(out, f'{block}.conv3')
            else:
                out = conv(conv(x, f'{block}.conv1', stride).relu(), f'{block}.conv2')
            x = (out + (conv(x, f'{block}.shortcut', stride) if f'{block}.shortcut.weight' in weights else x)).relu()
    return x


@pytest.mark.parametrize('name, depth, groups', [('resnet18', 18, 1), ('resnext50_32x4d', 50, 32)])
def test_detectron2s_resnet_gives_the_same_features(run, name, depth, groups, tmp_path, caplog):
    folder, images, features = run(name)
    file = tmp_path / 'model.pth'
    with caplog.at_level('INFO', 'hub'):
        assert convert(folder / 'export', '--to', 'detectron2', '-o', file) == 0
    content = torch.load(file, weights_only=True)
    assert content['matching_heuristics'] is True and content['__author__'] == 'timm-cgh'
    weights = content['model']
    assert {'stem.conv1.weight', 'stem.conv1.norm.weight', 'res2.0.conv1.weight', 'res3.0.shortcut.norm.weight',
            'res5.1.conv2.norm.running_var'} <= weights.keys()
    # its checkpointer matches by suffix: no name may end another
    assert not any(a != b and a.endswith(f'.{b}') for a in weights for b in weights)
    maps = detectron2_resnet(weights, images, groups)
    assert not weights  # each name has its place
    torch.testing.assert_close(maps.mean(dim=(2, 3)), features)
    for setting in ('FORMAT: RGB', 'PIXEL_MEAN: [25.5, 51.0, 76.5]', 'PIXEL_STD: [102.0, 127.5, 153.0]',
                    f'DEPTH: {depth}', 'STRIDE_IN_1X1: false'):
        assert setting in caplog.text
    assert ('NUM_GROUPS: 32, WIDTH_PER_GROUP: 4' in caplog.text) == (groups == 32)
    assert ('RES2_OUT_CHANNELS: 64' in caplog.text) == (depth == 18)


def test_onnxruntime_gives_the_same_features(run, tmp_path):
    folder, images, features = run('test_resnet')
    assert convert(folder, '--to', 'onnx', '-o', tmp_path / 'model.onnx') == 0
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    for batch, wanted in ((images, features), (images[:1], features[:1])):
        found, = session.run(None, {'images': batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
    config = json.loads(session.get_modelmeta().custom_metadata_map['input_config'])
    assert config['architecture'] == 'test_resnet' and config['input_size'] == [3, 64, 64]
    assert config['mean'] == [0.1, 0.2, 0.3] and config['tag'] == 'cgh_test'


def test_onnx_keeps_the_head_of_a_classifier_and_its_class_names(tmp_path):
    model = randomise(create_backbone('test_resnet', num_classes=3)).eval()
    names = ['ant', 'bee', 'cow']
    export_backbone(model, tmp_path, input_size=(3, 32, 32), label_names=names, **CONFIG)
    assert convert(tmp_path, '--to', 'onnx', '-o', tmp_path / 'model.onnx') == 0
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, = session.run(['logits'], {'images': images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map['input_config'])['label_names'] == names


def test_checkpoint_of_a_run_converts_with_the_runs_image_settings(tmp_path):
    task = create_task('resnet18', bank_size=16, hidden_dim=8, embed_dim=8)
    args = dict(model='resnet18', img_size=48, in_chans=3, mean=CONFIG['mean'], std=CONFIG['std'])
    torch.save({**task.get_checkpoint_state(), 'args': args}, tmp_path / 'last.pth.tar')
    assert convert(tmp_path / 'last.pth.tar', '--to', 'torchvision', '-o', tmp_path / 'out.safetensors') == 0
    state, found = task.student.backbone.state_dict(), load_file(tmp_path / 'out.safetensors')
    assert equal(found, state)
    with safe_open(tmp_path / 'out.safetensors', 'pt') as opened:
        metadata = opened.metadata()
    assert json.loads(metadata['mean']) == [0.1, 0.2, 0.3] and json.loads(metadata['input_size']) == [3, 48, 48]
    assert json.loads(metadata['crop_pct']) == 1 and 'tag' not in metadata  # the stock weights': 0.95, a1_in1k


@pytest.mark.parametrize('name, kwargs, to, output, part', [
    ('test_resnet', {}, 'torchvision', 'm.safetensors', 'torchvision has no test_resnet'),
    ('resnet18', {'in_chans': 1}, 'detectron2', 'm.pth', "--to: differs from torchvision's resnet18: conv1.weight"),
    ('resnet18', {'output_stride': 8}, 'torchvision', 'm.safetensors', 'resnet18 computes other features'),
    ('resnet18', {}, 'detectron2', 'm.pkl', '--output m.pkl: must end in .pth for --to detectron2'),
    (None, {}, 'onnx', 'm.onnx', 'SOURCE run: no such file'),
])
def test_models_that_a_format_does_not_support_are_refused(
        name, kwargs, to, output, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if name:
        chans = kwargs.get('in_chans', 3)
        model = create_backbone(name, **kwargs)
        export_backbone(model, 'run/export', input_size=(chans, 64, 64), mean=(0.5,) * chans, std=(0.5,) * chans)
    error = check_refused(capsys, script, ['run', '--to', to, '-o', output], part)
    assert error.count('\n') == 1 and not (tmp_path / output).exists()


def test_weights_that_one_onnx_file_does_not_hold_are_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('timm_cgh.hub.convert._MAX_ONNX', 1e7)
    check_refused(
        capsys, script, [run('resnet18')[0], '--to', 'onnx', '-o', tmp_path / 'out.onnx'],
        '--to onnx: the weights have 0.04 GB, one file holds 0.01')
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_name_their_model_are_refused(tmp_path, capsys):
    torch.save(create_backbone('test_resnet').state_dict(), tmp_path / 'weights.pth')
    args = [tmp_path / 'weights.pth', '--to', 'torchvision', '-o', tmp_path / 'out.safetensors']
    check_refused(capsys, script, args, 'weights.pth: weights of an unknown model')


def test_a_broken_export_is_refused_and_the_old_file_stays(run, tmp_path, capsys):
    folder, _, _ = run('resnet18')
    (tmp_path / 'config.json').write_bytes((folder / 'export' / 'config.json').read_bytes())
    (tmp_path / 'model.safetensors').write_bytes((folder / 'export' / 'model.safetensors').read_bytes()[:-10])
    (tmp_path / 'out.safetensors').write_text('old')
    args = [tmp_path, '--to', 'torchvision', '-o', tmp_path / 'out.safetensors']
    check_refused(capsys, script, args, 'not a complete safetensors file')
    assert (tmp_path / 'out.safetensors').read_text() == 'old'

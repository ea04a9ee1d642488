"""load_backbone: the model that an evaluation names, with the settings of the run that it is from."""
import argparse
import importlib

import pytest
import timm
import torch
import yaml

from backbones import equal
from input_errors import refused
from timm_cgh import create_task
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.models.checkpoints import weights_digest
from timm_cgh.models.export import export_backbone


def save_run(path, task, **args):
    """Checkpoint of a run as train.py leaves it."""
    defaults = dict(
        model='test_resnet', model_kwargs={}, img_size=32, in_chans=3, mean=None, std=None, features_only=False,
        out_indices=None, train_interpolation='bilinear')
    torch.save({**task.get_checkpoint_state(), 'args': argparse.Namespace(**{**defaults, **args})}, path)
    return str(path)


@pytest.fixture
def run(tmp_path):
    """Checkpoint of a run on grey images, and its task."""
    torch.manual_seed(0)
    task = create_task('test_resnet', bank_size=16, hidden_dim=8, embed_dim=8, in_chans=1)
    with torch.no_grad():
        for value in task.teacher.parameters():
            value.add_(1)
    path = save_run(tmp_path / 'last.pth.tar', task, img_size=24, in_chans=1, mean=[0.3], std=[0.4],
                    train_interpolation='bicubic')
    return path, task


@pytest.mark.parametrize('teacher', [False, True])
def test_student_and_teacher_of_a_run_load_with_its_settings(run, teacher):
    path, task = run
    backbone = load_backbone(checkpoint=path, teacher=teacher)
    assert equal(backbone.model.state_dict(), (task.teacher if teacher else task.student).backbone.state_dict())
    assert backbone.data_config == dict(input_size=(1, 24, 24), mean=(0.3,), std=(0.4,), interpolation='bicubic')
    assert backbone.name == 'test_resnet' and backbone.weights == 'last.pth.tar' + ', teacher' * teacher
    assert backbone.digest == weights_digest(backbone.model) and not backbone.model.training


@pytest.mark.parametrize('script', [
    'eval_knn', 'eval_linear', 'eval_semisup', 'finetune', 'embed', 'neighbours', 'predict'])
def test_images_are_decoded_as_in_the_run_unless_told_otherwise(script, tmp_path):
    decoding = dict(pixel_range=[0.0, 4095.0], max_pixels=600, exif_orientation=False)
    torch.save(dict(task_state={}, args=dict(model='test_resnet', **decoding)), tmp_path / 'last.pth.tar')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(decoding))
    (tmp_path / 'export').mkdir()
    (tmp_path / 'eval.yaml').write_text('max_pixels: 700')
    parser = importlib.import_module(script).parser
    weights = [['--model', f"local-dir:{tmp_path / 'export'}"]]
    if script != 'predict':
        weights += [['--checkpoint', str(tmp_path / 'last.pth.tar')], ['--checkpoint', str(tmp_path)]]
    for options in weights:
        options += ['--output', 'out']
        found = vars(parser.parse(options))
        assert {name: found[name] for name in decoding} == decoding and found['config'] is None
        options += ['--pixel-range', '1', '2', '--exif-orientation', '-c', str(tmp_path / 'eval.yaml')]
        args = parser.parse(options)
        assert (args.pixel_range, args.max_pixels, args.exif_orientation) == ([1, 2], 700, True)
    args = parser.parse(['--model', 'test_resnet', '--output', 'out'])
    assert (args.pixel_range, args.max_pixels, args.exif_orientation) == (None, None, True)
    (tmp_path / 'args.yaml').write_text('pixel_range: many')
    with refused(tmp_path / 'args.yaml', 'pixel_range'):
        parser.parse(weights[0])


def test_given_settings_replace_those_of_the_run(run):
    backbone = load_backbone(checkpoint=run[0], img_size=32, mean=[0.1], std=[0.2])
    assert backbone.data_config == dict(input_size=(1, 32, 32), mean=(0.1,), std=(0.2,), interpolation='bicubic')


def test_settings_of_a_run_do_not_apply_to_another_model(run):
    with refused('checkpoint', 'does not fit', ' in the file, '):  # built for colour images
        load_backbone('test_resnet.r160_in1k', run[0])


def test_features_only_run_loads_as_a_plain_model(tmp_path):
    wrapper = timm.create_model('test_resnet', features_only=True, out_indices=(-2, -1))
    task = create_task(wrapper, bank_size=16, hidden_dim=8, embed_dim=8)
    path = save_run(tmp_path / 'last.pth.tar', task, features_only=True)
    model = load_backbone(checkpoint=path).model
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = task.student.backbone.eval()(images)
        torch.testing.assert_close(model(images), maps[-1].mean(dim=(2, 3)))


def test_an_export_is_loaded_with_the_preparation_of_its_images(tmp_path):
    model = timm.create_model('test_resnet', num_classes=0, in_chans=1)
    name = f"local-dir:{export_backbone(model, tmp_path / 'export', input_size=(1, 16, 16), mean=(0.3,), std=(0.4,))}"
    backbone = load_backbone(name)
    assert equal(backbone.model.state_dict(), model.state_dict()) and backbone.weights == 'its own'
    assert backbone.data_config == dict(input_size=(1, 16, 16), mean=(0.3,), std=(0.4,), interpolation='bilinear')
    for given in (None, 'test_resnet', 'test_resnet.r160_in1k'):
        loaded = load_backbone(given, checkpoint=str(tmp_path))  # the folder of a run, for its weights
        assert loaded.data_config == backbone.data_config and loaded.digest == backbone.digest
    dilated = timm.create_model('test_resnet', num_classes=0, in_chans=1, output_stride=8).eval()
    export_backbone(dilated, tmp_path / 'export', input_size=(1, 16, 16), mean=(0.3,), std=(0.4,))  # changes no weight
    images = torch.randn(2, 1, 16, 16)
    for given in (None, 'test_resnet', 'test_resnet.r160_in1k'):
        assert torch.equal(load_backbone(given, checkpoint=str(tmp_path)).model(images), dilated(images))
    config = load_backbone(name, img_size=20, in_chans=3, mean=[0.1, 0.2, 0.3], std=[1.0]).data_config
    assert config['input_size'] == (3, 20, 20) and config['mean'] == (0.1, 0.2, 0.3) and config['std'] == (1, 1, 1)


@pytest.mark.parametrize('arguments, parameter, part', [
    (dict(model='resnet5O'), 'model', 'did you mean'),
    (dict(model='local-dir:nowhere'), 'model', 'no config.json in nowhere'),
    (dict(model='test_resnet', checkpoint='nowhere.pth'), 'checkpoint', 'nowhere.pth: no such file'),
    (dict(model='test_resnet', teacher=True), 'teacher', '`checkpoint`'),
    ({}, 'model', 'say which'),
    (dict(model='resnet18_s1'), 'model', 'timm has no weights for it; `checkpoint` FILE gives some'),
    (dict(model='test_resnet', no_pretrained=True, in_chans=0), 'in_chans', '0: must be 3'),
    (dict(model='test_resnet', no_pretrained=True, mean=[0.5, 0.5]), 'mean', '2 values'),
    (dict(model='test_vit', no_pretrained=True, img_size=7), 'img_size', '7'),
    (dict(model='test_resnet', no_pretrained=True, model_kwargs=dict(nonsense=1)), 'model', 'nonsense'),
    (dict(model='test_vit', no_pretrained=True, model_kwargs=dict(act_layer='nonsense')), 'model', 'nonsense'),
    (dict(model='test_resnet', no_pretrained=True, model_kwargs=dict(global_pool='')), 'model', 'no pooled feature'),
])
def test_models_that_cannot_be_loaded_are_refused(arguments, parameter, part):
    with refused(parameter, part):
        load_backbone(**arguments)

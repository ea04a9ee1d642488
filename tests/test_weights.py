"""models/checkpoints.py, the one reader of weights: files of many origins, folders, both kinds of backbones."""
import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from backbones import equal, randomise, state_dict
from input_errors import refused
from timm_cgh import create_task
from timm_cgh.errors import InputError
from timm_cgh.models import create_backbone, plain_backbone
from timm_cgh.models.checkpoints import load_weights, read_file, run_arguments, weights_digest
from timm_cgh.models.export import export_backbone
from timm_cgh.train.build import build_backbone


def under(prefix, state):
    return {f'{prefix}{name}': value for name, value in state.items()}


TRAINED, AVERAGED = state_dict(1), state_dict(2)
CLASSIFIER = {'fc.weight': torch.zeros(5, 96), 'fc.bias': torch.zeros(5)}
MOCO = {
    **under('module.encoder_q.', TRAINED),
    **under('module.encoder_k.', AVERAGED),
    'module.encoder_q.fc.0.weight': torch.zeros(4, 4),
    'module.encoder_k.fc.0.weight': torch.zeros(4, 4),
    'module.queue': torch.zeros(4, 8),
    'module.queue_ptr': torch.zeros(1),
}
CHILDREN = [name for name, _ in timm.create_model('test_resnet').named_children()]
NUMBERED = {'.'.join((str(CHILDREN.index(name.split('.')[0])), *name.split('.')[1:])): v for name, v in TRAINED.items()}
ORIGINS = {
    'plain': TRAINED,
    'torchvision': {**TRAINED, **CLASSIFIER},
    'timm': {'state_dict': {**TRAINED, **CLASSIFIER}, 'arch': 'test_resnet', 'epoch': 7},
    'DDP': {'state_dict': under('module.', TRAINED)},
    'torch.compile': {'model': under('_orig_mod.', TRAINED)},
    'DDP and torch.compile': {'state_dict': under('module._orig_mod.', TRAINED)},
    'MoCo': {'state_dict': MOCO, 'arch': 'test_resnet'},
    'solo-learn': {'state_dict': {
        **under('backbone.', TRAINED), **under('momentum_backbone.', AVERAGED),
        'projector.0.weight': torch.zeros(2, 2)}},
    'mmselfsup': {'meta': {}, 'state_dict': {**under('backbone.', TRAINED), 'neck.fc0.weight': torch.zeros(2, 2)}},
    'SwAV': {
        **under('module.', TRAINED), 'module.projection_head.0.weight': torch.zeros(2, 2),
        'module.prototypes.weight': torch.zeros(2, 2)},
    'transformers': under('timm_model.', TRAINED),
    'lightly': {'state_dict': {
        **under('backbone.', NUMBERED), 'projection_head.layers.0.weight': torch.zeros(2, 2)}},
    'VISSL': {'classy_state_dict': {'base_model': {'meta': {}, 'model': {
        'heads': {'0.clf.weight': torch.zeros(2, 2)}, 'trunk': under('_feature_blocks.', TRAINED)}}}},
    'old torch': {name: value for name, value in TRAINED.items() if 'num_batches_tracked' not in name},
    'half precision': {name: value.half() for name, value in TRAINED.items()},
}
DINO = dict(
    student=under('module.backbone.', TRAINED),
    teacher={**under('backbone.', AVERAGED), 'head.last_layer.weight_v': torch.zeros(2, 2)},
    args=argparse.Namespace(arch='test'),
    epoch=3,
)


def load(path, model='test_resnet', **kwargs):
    """State dict of a new backbone with the weights of a file."""
    backbone = timm.create_model(model, num_classes=0)
    load_weights(backbone, path, **kwargs)
    return backbone.state_dict()


# ---- files

@pytest.mark.parametrize('origin', ORIGINS)
def test_checkpoints_of_many_origins_load_as_the_start_of_a_run(origin, tmp_path):
    torch.save(ORIGINS[origin], tmp_path / 'weights.pth')
    found = build_backbone('test_resnet', initial_checkpoint=tmp_path / 'weights.pth').module.state_dict()
    for name, value in TRAINED.items():
        assert torch.equal(found[name], value.half().to(value.dtype) if origin == 'half precision' else value), name


@pytest.mark.parametrize('in_chans', [1, 4])
@pytest.mark.parametrize('origin', ['torchvision', 'lightly'])
@pytest.mark.parametrize('features_only', [False, True])
def test_colour_weights_become_those_for_other_channels_as_in_timm(in_chans, origin, features_only, tmp_path):
    save_file(TRAINED, tmp_path / 'timm.safetensors')
    torch.save(ORIGINS[origin], tmp_path / 'weights.pth')
    wanted = timm.create_model(
        'test_resnet', pretrained=True, in_chans=in_chans, num_classes=0,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'timm.safetensors'), num_classes=0)).state_dict()
    found = build_backbone(
        'test_resnet', in_chans, initial_checkpoint=tmp_path / 'weights.pth', features_only=features_only).module
    assert equal(plain_backbone(found, in_chans=in_chans).state_dict(), wanted)


@pytest.mark.parametrize('content, teacher, where', [
    (DINO, False, 'teacher.backbone'),
    (DINO, True, 'teacher.backbone'),
    ({'state_dict': MOCO}, True, 'state_dict.module.encoder_k'),
])
def test_averaged_networks_load(content, teacher, where, tmp_path):
    torch.save(content, tmp_path / 'weights.pth')
    model = timm.create_model('test_resnet', num_classes=0)
    assert load_weights(model, tmp_path / 'weights.pth', teacher=teacher) == where
    assert equal(model.state_dict(), AVERAGED)


def test_safetensors_load(tmp_path):
    save_file({**TRAINED, **CLASSIFIER}, tmp_path / 'model.safetensors')
    assert equal(load(tmp_path / 'model.safetensors'), TRAINED)


def test_vision_transformer_of_another_size_loads(tmp_path):
    state = timm.create_model('test_vit', num_classes=0).state_dict()
    torch.save({'state_dict': state}, tmp_path / 'vit.pth')
    model = create_backbone('test_vit', img_size=96)
    load_weights(model, tmp_path / 'vit.pth')
    found = model.state_dict()
    assert found['pos_embed'].shape != state['pos_embed'].shape
    assert all(torch.equal(value, found[name]) for name, value in state.items() if name != 'pos_embed')


@pytest.mark.parametrize('name', [
    'test_resnet', 'convnext_atto', 'efficientnet_lite0', 'test_vit', 'swin_tiny_patch4_window7_224'])
def test_features_only_wrapper_takes_its_own_names_and_those_of_the_plain_model(name, tmp_path):
    plain = randomise(timm.create_model(name, num_classes=5)).eval()
    torch.save({'state_dict': under('module.', plain.state_dict())}, tmp_path / 'plain.pth')
    wrapper = create_backbone(name, features_only=True, out_indices=(-2, -1)).eval()
    load_weights(wrapper, tmp_path / 'plain.pth')
    images = torch.randn(1, *plain.pretrained_cfg['input_size'])
    with torch.no_grad():
        maps = wrapper(images)
        wanted = plain.forward_intermediates(images, indices=[-2, -1], intermediates_only=True)
    for found, other in zip(maps, wanted):
        torch.testing.assert_close(found if found.shape == other.shape else found.permute(0, 3, 1, 2), other)

    torch.save(wrapper.state_dict(), tmp_path / 'own.pth')
    again = create_backbone(name, features_only=True, out_indices=(-2, -1))
    load_weights(again, tmp_path / 'own.pth')
    assert equal(again.state_dict(), wrapper.state_dict())


# ---- runs and folders

@pytest.mark.parametrize('teacher', [False, True])
def test_student_and_teacher_of_a_training_checkpoint_load(teacher, tmp_path):
    torch.manual_seed(0)
    task = create_task('test_resnet', bank_size=16, hidden_dim=8, embed_dim=8)
    with torch.no_grad():
        for value in task.teacher.parameters():
            value.add_(1)
    torch.save(task.get_checkpoint_state(), tmp_path / 'last.pth.tar')
    network = task.teacher if teacher else task.student
    assert equal(load(tmp_path / 'last.pth.tar', teacher=teacher), network.backbone.state_dict())


def test_folder_of_a_run_and_its_export_load(tmp_path):
    model = timm.create_model('test_resnet', num_classes=0)
    model.load_state_dict(TRAINED)
    export_backbone(model, tmp_path / 'export', input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    for source in (tmp_path, tmp_path / 'export'):
        assert equal(load(source), TRAINED)


@pytest.mark.parametrize('args', [argparse.Namespace(model='test_resnet'), dict(model='test_resnet')])
def test_arguments_are_found_in_the_checkpoints_of_runs_only(args, tmp_path):
    torch.save({'state_dict': {}, 'task_state': {}, 'args': args}, tmp_path / 'run.pth.tar')
    assert run_arguments(read_file(tmp_path / 'run.pth.tar')) == dict(model='test_resnet')
    assert run_arguments(dict(DINO, args=args)) == {}


# ---- what is refused

@pytest.mark.parametrize('change, part', [
    (lambda s: s.pop('layer1.0.conv1.weight'), 'the file lacks layer1.0.conv1.weight'),
    (lambda s: s.update({'layer9.weight': torch.zeros(1), 'layer9.bias': torch.zeros(1)}),
     'no place for layer9.weight, layer9.bias (2 such)'),
    (lambda s: s.update({'conv1.0.weight': torch.zeros(1, 2)}), 'conv1.0.weight is (1, 2) in the file, ('),
])
def test_weights_that_do_not_fit_are_named(change, part, tmp_path):
    state = dict(TRAINED)
    change(state)
    torch.save({'state_dict': under('module.', state)}, tmp_path / 'weights.pth')
    with refused('initial_checkpoint', 'weights.pth: does not fit test_resnet: ', part):
        load(tmp_path / 'weights.pth', parameter='initial_checkpoint')


def test_weights_of_another_architecture_are_refused_with_counts(tmp_path):
    torch.save(timm.create_model('test_vit', num_classes=0).state_dict(), tmp_path / 'vit.pth')
    with refused('checkpoint', 'test_resnet: the file lacks ', ' such); the model has no place for '):
        load(tmp_path / 'vit.pth')


class Surprise:
    pass


@pytest.mark.parametrize('content, part', [
    ({'state_dict': TRAINED, 'surprise': Surprise()}, 'not a readable safetensors or weights-only torch file'),
    ([TRAINED], 'holds a list, must hold a dictionary'),
    ({'epoch': 3, 'arch': 'resnet18'}, 'no weights, only arch, epoch'),
])
def test_files_without_weights_are_refused(content, part, tmp_path):
    torch.save(content, tmp_path / 'weights.pth')
    with refused('checkpoint', 'weights.pth: ', part):
        load(tmp_path / 'weights.pth')


@pytest.mark.parametrize('odd, part', [
    (torch.Tensor.to_sparse, 'is not a dense tensor'),
    (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), 'is not a dense tensor'),
    (lambda v: torch.nested.nested_tensor([v[0], v[1]]), 'is not a dense tensor'),
    (lambda v: v.to('meta'), 'is not a dense tensor'),
    (lambda v: v.to(torch.complex64), 'is torch.complex64 in the file, torch.float32 in the model'),
    (lambda v: v.long(), 'is torch.int64 in the file'),
    (lambda v: v * float('nan'), 'is not finite'),
    (lambda v: v[:0], 'is (0, 3, 3, 3) in the file'),
    (lambda v: 'text', 'the file lacks conv1.0.weight'),
])
@pytest.mark.filterwarnings('ignore')  # torch's, about its own kinds of tensors
def test_odd_tensors_are_refused(odd, part, tmp_path):
    torch.save({'state_dict': {**TRAINED, 'conv1.0.weight': odd(TRAINED['conv1.0.weight'])}}, tmp_path / 'weights.pth')
    with refused('checkpoint', 'weights.pth: ', part):
        load(tmp_path / 'weights.pth')


@pytest.mark.parametrize('content', [
    {}, {1: torch.zeros(2)}, {'state_dict': None}, {'state_dict': {'a': {'b': torch.zeros(2)}}}, {'task_state': None},
    {'task_state': {'teacher': 3}}, {'model': {'model': {'model': {}}}}, {'x' * 10 ** 5: 1},
])
@pytest.mark.parametrize('teacher', [False, True])
def test_odd_dictionaries_are_refused_in_a_short_line(content, teacher, tmp_path):
    torch.save(content, tmp_path / 'weights.pth')
    with pytest.raises(InputError, match=r'weights\.pth: no weights, only .{1,60}$'):
        load(tmp_path / 'weights.pth', teacher=teacher)


@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors'])
def test_broken_files_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b'no weights')
    with refused('checkpoint', f'{name}: not a readable'):
        read_file(tmp_path / name)


def test_sources_that_do_not_exist_are_refused(tmp_path):
    with refused('checkpoint', 'absent.pth: no such file'):
        load(tmp_path / 'absent.pth')
    with refused('checkpoint', 'no config.json there'):
        load(tmp_path)


def test_teacher_that_a_file_does_not_hold_is_refused(tmp_path):
    torch.save({'state_dict': TRAINED}, tmp_path / 'weights.pth')
    with refused('checkpoint', 'holds no teacher'):
        load(tmp_path / 'weights.pth', teacher=True)


# ---- reading

@pytest.mark.parametrize('zipped', [True, False])
def test_mmap_reads_files_of_either_format(zipped, tmp_path):
    torch.save({'state_dict': TRAINED}, tmp_path / 'weights.pth', _use_new_zipfile_serialization=zipped)
    assert equal(read_file(tmp_path / 'weights.pth', mmap=True)['state_dict'], TRAINED)


def test_digest_tells_single_bits_apart():
    model = timm.create_model('test_resnet', num_classes=0)
    model.load_state_dict(TRAINED)
    digest = weights_digest(model)
    model.to(memory_format=torch.channels_last)
    assert weights_digest(model) == digest
    with torch.no_grad():
        model.conv1[0].weight[0, 0, 0, 0].nextafter_(torch.tensor(9.0))
    assert weights_digest(model) != digest

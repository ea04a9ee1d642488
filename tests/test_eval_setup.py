"""What the evaluation scripts share: checkpoints of many origins, labelled data, results."""
import argparse
import csv
import json
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file

from data_files import write_classes, write_images
from timm_cgh import create_task
from timm_cgh.arguments import Parser
from timm_cgh.errors import InputError
from timm_cgh.eval.extract import block_indices, extract_distributed
from timm_cgh.eval.setup import (
    add_common_arguments, check_classes, init_run, load_backbone, open_labelled, write_results)
from timm_cgh.hub import export_backbone

CPU = ['--device', 'cpu', '--workers', '0']


def arguments(*args):
    parser = Parser()
    add_common_arguments(parser)
    handlers = list(logging.getLogger().handlers)
    args = parser.parse([*map(str, args), *CPU])
    args.device_found = init_run(args)
    logging.getLogger().handlers = handlers
    return args


def loaded(path, *args, model='test_resnet'):
    return load_backbone(arguments('--model', model, '--checkpoint', path, *args))[0].state_dict()


def network(seed):
    torch.manual_seed(seed)
    return timm.create_model('test_resnet', num_classes=0).state_dict()


def under(prefix, state):
    return {f'{prefix}{name}': value for name, value in state.items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


TRAINED, AVERAGED = network(1), network(2)
CLASSIFIER = {'fc.weight': torch.zeros(5, 96), 'fc.bias': torch.zeros(5)}
MOCO = {
    **under('module.encoder_q.', TRAINED),
    **under('module.encoder_k.', AVERAGED),
    'module.encoder_q.fc.0.weight': torch.zeros(4, 4),
    'module.encoder_k.fc.0.weight': torch.zeros(4, 4),
    'module.queue': torch.zeros(4, 8),
    'module.queue_ptr': torch.zeros(1),
}
DINO = dict(
    student=under('module.backbone.', TRAINED),
    teacher={**under('backbone.', AVERAGED), 'head.last_layer.weight_v': torch.zeros(2, 2)},
    args=argparse.Namespace(arch='test'),
    epoch=3,
)


# ---- checkpoints

@pytest.mark.parametrize('content', [
    TRAINED,
    {**TRAINED, **CLASSIFIER},  # torchvision's
    {'state_dict': {**TRAINED, **CLASSIFIER}, 'arch': 'test_resnet', 'epoch': 7},  # timm's
    {'state_dict': under('module.', TRAINED)},
    {'model': under('_orig_mod.', TRAINED)},
    {'state_dict': under('module._orig_mod.', TRAINED)},
    {'state_dict': MOCO, 'arch': 'test_resnet'},
    {'state_dict': {**under('backbone.', TRAINED), 'projector.0.weight': torch.zeros(2, 2)}},
    {**under('module.', TRAINED), 'module.projection_head.0.weight': torch.zeros(2, 2),
     'module.prototypes.weight': torch.zeros(2, 2)},  # SwAV's
    {name: value for name, value in TRAINED.items() if 'num_batches_tracked' not in name},  # of an old torch
])
def test_checkpoints_of_many_origins_load(content, tmp_path):
    torch.save(content, tmp_path / 'weights.pth')
    assert same(loaded(tmp_path / 'weights.pth'), TRAINED)


def test_safetensors_load(tmp_path):
    save_file({**TRAINED, **CLASSIFIER}, tmp_path / 'model.safetensors')
    assert same(loaded(tmp_path / 'model.safetensors'), TRAINED)


@pytest.mark.parametrize('content, args', [(DINO, []), (DINO, ['--teacher']), ({'state_dict': MOCO}, ['--teacher'])])
def test_averaged_networks_load(content, args, tmp_path):
    torch.save(content, tmp_path / 'weights.pth')
    assert same(loaded(tmp_path / 'weights.pth', *args), AVERAGED)


@pytest.fixture
def run(tmp_path):
    """Checkpoint of a run, as train.py leaves it, and its task."""
    torch.manual_seed(0)
    task = create_task('test_resnet', bank_size=16, hidden_dim=8, embed_dim=8, in_chans=1)
    with torch.no_grad():
        for value in task.teacher.parameters():
            value.add_(1)
    args = argparse.Namespace(
        model='test_resnet', model_kwargs={}, img_size=24, in_chans=1, mean=[0.3], std=[0.4], features_only=False,
        out_indices=None, train_interpolation='bicubic')
    torch.save({**task.get_checkpoint_state(), 'args': args, 'arch': 'test_resnet'}, tmp_path / 'last.pth.tar')
    return tmp_path / 'last.pth.tar', task


@pytest.mark.parametrize('teacher', [False, True])
def test_student_and_teacher_of_a_run_load_with_its_settings(run, teacher):
    path, task = run
    args = arguments('--checkpoint', path, *['--teacher'] * teacher)
    model, config = load_backbone(args)
    assert same(model.state_dict(), (task.teacher if teacher else task.student).backbone.state_dict())
    assert config == dict(input_size=(1, 24, 24), mean=(0.3,), std=(0.4,), interpolation='bicubic')
    assert (args.model, args.in_chans) == ('test_resnet', 1)


def test_features_only_run_loads_as_a_plain_model(tmp_path):
    wrapper = timm.create_model('test_resnet', features_only=True, out_indices=(-2, -1))
    task = create_task(wrapper, bank_size=16, hidden_dim=8, embed_dim=8)
    args = argparse.Namespace(
        model='test_resnet', model_kwargs={}, img_size=32, in_chans=3, mean=None, std=None, features_only=True,
        out_indices=None, train_interpolation='bilinear')
    torch.save({**task.get_checkpoint_state(), 'args': args}, tmp_path / 'last.pth.tar')
    model, _ = load_backbone(arguments('--checkpoint', tmp_path / 'last.pth.tar'))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = task.student.backbone.eval()(images)
        torch.testing.assert_close(model(images), maps[-1].mean(dim=(2, 3)))


def test_vision_transformer_of_another_size_loads(tmp_path):
    state = timm.create_model('test_vit', num_classes=0).state_dict()
    torch.save({'state_dict': state}, tmp_path / 'vit.pth')
    found = loaded(tmp_path / 'vit.pth', '--img-size', '96', model='test_vit')
    assert found['pos_embed'].shape != state['pos_embed'].shape
    assert all(torch.equal(value, found[name]) for name, value in state.items() if name != 'pos_embed')


@pytest.mark.parametrize('change, named', [
    (lambda s: s.pop('layer1.0.conv1.weight'), 'the file lacks layer1.0.conv1.weight'),
    (lambda s: s.update({'layer9.weight': torch.zeros(1), 'layer9.bias': torch.zeros(1)}),
     r'no place for layer9.weight, layer9.bias \(2 such\)'),
    (lambda s: s.update({'conv1.0.weight': torch.zeros(1, 2)}), r'conv1.0.weight is \(1, 2\) in the file, \('),
])
def test_checkpoint_that_does_not_fit_is_named_with_its_keys(change, named, tmp_path):
    state = dict(TRAINED)
    change(state)
    torch.save({'state_dict': under('module.', state)}, tmp_path / 'weights.pth')
    with pytest.raises(InputError, match=named):
        loaded(tmp_path / 'weights.pth')


def test_checkpoint_of_another_architecture_is_refused_with_counts(tmp_path):
    torch.save(timm.create_model('test_vit', num_classes=0).state_dict(), tmp_path / 'vit.pth')
    words = r'does not fit --model test_resnet: the file lacks .* such\); the model has no place'
    with pytest.raises(InputError, match=words):
        loaded(tmp_path / 'vit.pth')


def test_file_that_would_run_code_is_refused(tmp_path):
    torch.save({'state_dict': TRAINED, 'parser': argparse.ArgumentParser}, tmp_path / 'evil.pth')
    with pytest.raises(InputError, match='evil.pth: not a readable'):
        loaded(tmp_path / 'evil.pth')


@pytest.mark.parametrize('args, named', [
    (['--model', 'resnet5O'], 'did you mean'),
    (['--model', 'local-dir:nowhere'], 'no config.json in nowhere'),
    (['--model', 'test_resnet', '--checkpoint', 'nowhere.pth'], 'nowhere.pth: no such file'),
    (['--model', 'test_resnet', '--teacher'], '--teacher'),
    ([], '--model'),
    (['--model', 'resnet18_s1'], 'resnet18_s1'),  # nobody has published weights
    (['--model', 'test_resnet', '--no-pretrained', '--in-chans', '2'], '--in-chans 2'),
    (['--model', 'test_resnet', '--no-pretrained', '--mean', '0.5', '0.5'], '--mean: 2 values'),
    (['--model', 'test_vit', '--no-pretrained', '--img-size', '7'], '--'),
])
def test_models_that_cannot_be_had_are_refused(args, named):
    with pytest.raises(InputError, match=named):
        load_backbone(arguments(*args))


def test_teacher_that_is_not_there_is_refused(tmp_path):
    torch.save({'state_dict': TRAINED}, tmp_path / 'weights.pth')
    with pytest.raises(InputError, match='holds no teacher'):
        loaded(tmp_path / 'weights.pth', '--teacher')


def test_export_says_how_its_images_are_prepared(tmp_path):
    model = timm.create_model('test_resnet', num_classes=0, in_chans=1)
    export = export_backbone(model, tmp_path / 'export', input_size=(1, 16, 16), mean=(0.3,), std=(0.4,))
    found, config = load_backbone(arguments('--model', f'local-dir:{export}'))
    assert same(found.state_dict(), model.state_dict()) and not found.training
    assert config == dict(input_size=(1, 16, 16), mean=(0.3,), std=(0.4,), interpolation='bilinear')
    other = ['--img-size', '20', '--in-chans', '3', '--mean', '0.1', '0.2', '0.3', '--std', '1']
    _, config = load_backbone(arguments('--model', f'local-dir:{export}', *other))
    assert config['input_size'] == (3, 20, 20) and config['mean'] == (0.1, 0.2, 0.3) and config['std'] == (1, 1, 1)


# ---- data

def folder(tmp_path, train=('cat', 'dog'), val=('cat', 'dog')):
    write_classes(tmp_path / 'train', 3, train)
    write_classes(tmp_path / 'val', 2, val, first=100)
    return arguments('--data-dir', tmp_path)


def both(args):
    return open_labelled(args, args.train_split), open_labelled(args, args.val_split)


def test_folder_of_splits_opens(tmp_path):
    train, val = both(folder(tmp_path))
    assert (len(train), len(val), check_classes(train, val)) == (6, 4, 2)


@pytest.mark.parametrize('train, val, named', [
    (('cat', 'dog'), ('cat', 'cow'), r'1 classes that the training images have not \(cow\)'),
    (('ant', 'cat', 'dog'), ('cat', 'dog'), 'cat is another number there'),
    (('cat',), ('cat',), 'all of one class'),
])
def test_classes_that_do_not_match_are_refused(train, val, named, tmp_path):
    with pytest.raises(InputError, match=named):
        check_classes(*both(folder(tmp_path, train, val)))


def test_images_without_class_folders_are_refused(tmp_path):
    write_images(tmp_path / 'train', 3)
    write_images(tmp_path / 'val', 3)
    with pytest.raises(InputError, match='one class'):
        check_classes(*both(arguments('--data-dir', tmp_path)))


@pytest.mark.parametrize('args, named', [
    (['--val-split', 'train'], 'is the training split'),
    (['--val-split', 'test'], '--val-split test'),
    (['--train-split', 'training2'], '--train-split training2'),
])
def test_splits_that_are_not_there_are_refused(args, named, tmp_path):
    folder(tmp_path)
    with pytest.raises(InputError, match=named):
        both(arguments('--data-dir', tmp_path, *args))


def test_training_images_are_not_looked_for_among_the_others(tmp_path):
    write_classes(tmp_path / 'val', 2)
    with pytest.raises(InputError, match='--train-split train: no such folder'):
        open_labelled(arguments('--data-dir', tmp_path), 'train')


def test_unlabelled_images_are_left_out_or_refused(monkeypatch):
    from timm_cgh.data import Digits
    digits = Digits('train', 'L')
    digits.targets = [target if i % 2 else -1 for i, target in enumerate(digits.targets)]
    monkeypatch.setattr('timm_cgh.eval.setup.open_dataset', lambda *args, **kwargs: digits)
    args = arguments('--dataset', 'digits', '--in-chans', '1')
    labelled = open_labelled(args, 'train')
    assert len(labelled) == len(digits) // 2 and labelled[0][1] == digits.targets[1]
    digits.targets = [-1] * len(digits)
    with pytest.raises(InputError, match='has no labels'):
        open_labelled(args, 'train')


# ---- features over processes

@pytest.mark.parametrize('count, size, world_size', [(103, 8, 1), (103, 8, 2), (103, 8, 3), (5, 8, 3), (16, 8, 2)])
def test_every_image_is_looked_at_once(count, size, world_size):
    shares = [block_indices(count, size, rank, world_size) for rank in range(world_size)]
    assert sorted(torch.cat(shares).tolist()) == list(range(count))


def test_unreadable_image_gives_way_to_the_same_one_in_any_share(tmp_path, caplog):
    args = folder(tmp_path)
    (tmp_path / 'train' / 'cat' / '001.png').write_bytes(b'no image')
    args.batch_size = 2
    train, model = open_labelled(args, 'train'), timm.create_model('test_resnet', num_classes=0)
    config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')
    features, labels = extract_distributed(model, train, config, args, torch.device('cpu'))
    assert torch.equal(features[1], features[4]) and labels.tolist() == [0, 1, 0, 1, 1, 1]
    assert '001.png' in caplog.text


# ---- results

@pytest.mark.parametrize('name', ['results.json', 'results.csv'])
def test_results_are_printed_and_written(name, tmp_path, capsys):
    args = arguments('--results-file', tmp_path / 'made' / name)
    results = dict(model='a', top1=91.5, knn={'10': 91.5, '20': 90.0})
    write_results(args, results)
    printed = capsys.readouterr().out
    assert printed.startswith('--result\n') and json.loads(printed.partition('\n')[2]) == results
    with open(tmp_path / 'made' / name, newline='') as file:
        if name.endswith('.json'):
            assert json.load(file) == results
        else:
            assert list(csv.DictReader(file)) == [dict(model='a', top1='91.5', knn_10='91.5', knn_20='90.0')]


@pytest.mark.parametrize('args, named', [
    (['--results-file', 'results.txt'], '.json or .csv'),
    (['--output', '/dev/null/here'], '--output /dev/null/here: cannot write'),
    (['--device', 'tpu9'], '--device'),
])
def test_places_that_cannot_be_written_are_refused(args, named):
    parser = Parser()
    add_common_arguments(parser)
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(InputError, match=named):
        init_run(parser.parse([*CPU, *args]))
    logging.getLogger().handlers = handlers

"""What publish.py writes before it uploads: folder, model card, arguments, the training state."""
import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm import create_model

import train
from input_errors import refused
from run_folders import change_file
from timm_cgh.data import data_name
from timm_cgh.errors import InputError
from timm_cgh.hub.publish import check_repo_id, portable_args, read_args, write_folder
from timm_cgh.models import create_backbone
from timm_cgh.models.checkpoints import weights_digest
from timm_cgh.models.export import export_backbone
from timm_cgh.train.portable import read_portable, write_portable

CONFIG = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
TOKEN = 'hf_abcdefghijklmnopqrstuvwxyz'
KNN = dict(protocol='knn', top1=61.5, k=20, knn={'10': 61.0, '20': 61.5}, temperature=0.07, num_classes=3,
           train_images=50, val_images=40, img_size=32, crop_pct=1.0, interpolation='bilinear', weights='its own',
           dataset='cifar10', val_split='test')


@pytest.fixture
def run(tmp_path):
    """`run(model, **arguments)`: a run's folder as train.py leaves it."""
    def make(model='test_resnet', **changes):
        args = {**vars(train.parser.parse_args([])), 'model': model, 'data_dir': '/secret/place/birds/train', **changes}
        folder = tmp_path / 'runs' / 'birds'
        torch.manual_seed(0)
        export_backbone(create_backbone(model), folder / 'export', **CONFIG)
        (folder / 'args.yaml').write_text(yaml.safe_dump(args))
        (folder / 'summary.csv').write_text('epoch,train_loss,eval_knn\n0,5.0,40.5\n1,4.0,\n2,3.5,44.25\n')
        return folder
    return make


def write(folder, **kwargs):
    write_folder(folder / 'export', folder / 'hub', 'me/birds', **kwargs)
    return (folder / 'hub' / 'README.md').read_text()


def results(folder, name='knn.json', **changes):
    path = folder / name
    path.write_text(json.dumps({**KNN, 'model': f'local-dir:{folder}/export'}))
    change_file(path, **changes)
    return str(path)


def test_card_has_the_values_that_the_run_settled_on(run):
    folder = run(bank_size=None)
    assert '| Memory bank | the power of two' in write(folder)
    (folder / 'resolved.yaml').write_text('options: {bank_size: 64, lr: 0.125, warmup_epochs: 5.0}\nprocesses: 2')
    card = write(folder)
    for row in ('| Memory bank | 64 |', '| Learning rate | 0.125 |', '| Warm-up epochs | 5.0 |',
                '| Batch size | 256 x 2 processes |'):
        assert row in card


def test_recipe_and_results_come_from_the_run(run):
    progress = dict(knn_before=33.3, order=dict(world_size=4))
    checkpoint = dict(progress=progress, state_dict={})
    card = write(run(epochs=5, hidden_dim=77, momentum_teacher=0.987), checkpoint=checkpoint)
    for row in ('| Epochs | 3 of 5 |', '| Heads | hidden width 77, embeddings 512 |', '| Teacher momentum | 0.987 |',
                '| Batch size | 256 x 4 processes |', '| Initial weights | random |', 'not finished: 3 of 5 epochs.',
                '| kNN after epoch 3 | birds | 44.25 |', '| kNN before training | birds | 33.30 |'):
        assert row in card, row
    assert ModelCard(card).data.datasets == ['birds']


def test_recipe_names_the_initial_weights(run):
    assert "| Initial weights | timm's pretrained weights |" in write(run(pretrained=True))
    assert '| Initial weights | from a checkpoint |' in write(run(initial_checkpoint='/secret/w.pth'))


@pytest.mark.parametrize('method, rows', [
    ('cgh', {'InfoNCE warm-up epochs', 'Teacher momentum', 'Temperatures', 'Memory bank', 'Hypercolumn stages'}),
    ('moco', {'Teacher momentum', 'Memory bank'}),
    ('byol', {'Teacher momentum'}),
    ('simclr', set()),
])
def test_recipe_has_the_settings_of_the_method_only(run, method, rows):
    card = write(run(method=method))
    named = {'InfoNCE warm-up epochs', 'Teacher momentum', 'Temperatures', 'Memory bank', 'Hypercolumn stages'}
    assert {name for name in named if f'| {name} |' in card} == rows


def test_epochs_of_a_run_resumed_in_another_folder_are_counted(run):
    folder = run(epochs=5)
    (folder / 'summary.csv').write_text('epoch,train_loss\n3,5.0\n4,4.0\n')
    assert '| Epochs | 5 of 5 |' in write(folder)


def test_an_export_older_than_the_checkpoint_is_refused(run):
    folder = run()
    state = load_file(folder / 'export' / 'model.safetensors')
    progress = dict(knn_before=None, order=dict(world_size=1))
    write(folder, checkpoint=dict(progress=progress, state_dict=state))
    later = {name: value + 1 for name, value in state.items()}
    with refused('export', 'older than the last checkpoint of the run'):
        write(folder, checkpoint=dict(progress=progress, state_dict=later))


def test_each_result_has_its_protocol(run):
    folder = run()
    more = dict(epochs=100, lr=0.3, top5=90.0)
    card = write(folder, results=[
        results(folder),
        results(folder, 'random.json', weights='random', top1=20.0),
        results(folder, 'pixels.json', weights='pixels', top1=30.0),
        results(folder, 'linear.json', protocol='linear, cached features', heads={'0.1': 0, '0.3': 0}, **more),
        results(folder, 'semisup.json', protocol='semi-supervised', percent=10, lr_head=1.0, **more),
    ])
    images = '50 labelled training images, 40 validation images of 3 classes (split test); 32 px, 100 % centre crop'
    vote = 'weighted by exp(similarity / 0.07); the best of k = 10, 20 on the validation images'
    rows = {row.split(' | ')[0][2:]: row for row in card.splitlines() if row.startswith('| ')}
    for name, data, protocol in (
            ('kNN, k = 20', 'cifar10 | 61.50 |  |', vote),
            ('kNN, k = 20, random weights', 'cifar10 | 20.00 |  |', vote),
            ('kNN, k = 20, raw pixels, at most 32 px', 'cifar10 | 30.00 |  |', vote),
            ('Linear', 'cifar10 | 61.50 | 90.00 |', '100 epochs on cached features of centre crops, learning'),
            ('Fine-tuned on 10 % of the labels', 'cifar10 | 61.50 | 90.00 |', 'fine-tuned for 100 epochs, learning')):
        assert data in rows[name] and protocol in rows[name] and images in rows[name], name
    values = {(r.metric_name, r.metric_value): r.metric_args for r in ModelCard(card).data.eval_results}
    # leaderboards would list baselines
    assert not any(word in name for name, _ in values for word in ('random', 'pixels', 'before'))
    assert values['Linear, top-5', 90.0]['lr'] == 0.3 and values['kNN, k = 20, top-1', 61.5]['temperature'] == 0.07


@pytest.mark.parametrize('change, part', [
    (dict(model='local-dir:/elsewhere/dogs/export'), 'measured on local-dir:/elsewhere/dogs/export'),
    (dict(model='resnet50'), 'measured on resnet50'),
    (dict(model='resnet50', weights='random'), 'measured on resnet50'),
    (dict(weights='last.pth.tar, teacher'), 'last.pth.tar, teacher weights'),
    (dict(protocol='detection'), 'not what eval_knn.py'),
    (dict(top1=None), 'not what eval_knn.py'),
    (dict(top1='many'), 'not what eval_knn.py'),
    (dict(protocol=['knn']), 'not what eval_knn.py'),
    (dict(knn=3), 'not what eval_knn.py'),
    (dict(model=None), 'measured on None'),
    (dict(crop_pct='x'), 'not what eval_knn.py'),
    (dict(k={'a': 1}, temperature=[]), 'not what eval_knn.py'),
    (dict(top5='x'), 'not what eval_knn.py'),
    (dict(dataset=...), 'not what eval_knn.py'),  # "not recorded" is no name that the Hub's metadata may have
])
def test_results_of_other_models_are_refused(run, change, part):
    folder = run()
    with refused('results', part):
        write(folder, results=[results(folder, **change)])
    assert not (folder / 'hub').exists()


def test_results_of_a_run_behind_a_link_are_accepted(run):
    folder = run()
    folder.rename(folder.parent / 'run7')
    folder.symlink_to('run7')
    assert '| kNN, k = 20 | cifar10 | 61.50 |' in write(folder, results=[results(folder)])


def test_results_of_a_run_that_was_moved_are_accepted(run):
    folder = run()
    path = results(folder, model='local-dir:old/birds/export')
    assert '| kNN, k = 20 | cifar10 | 61.50 |' in write(folder, results=[path])


def test_recipe_lists_other_options_that_change_the_training(run):
    card = write(run(lr_base_scale='sqrt', relation_weight=0.25, bn_splits=8, no_decay_norm_bias=True))
    assert '| Learning rate | 0.05 x sqrt(global batch / 256) |' in card
    other = next(row for row in card.splitlines() if row.startswith('| Other options |'))
    for text in ('relation_weight 0.25', 'bn_splits 8', 'no_decay_norm_bias', 'momentum 0.9', 'contrast_temp 0.2'):
        assert text in other, text
    assert 'sync_bn' not in other


def test_results_of_weights_that_a_run_had_earlier_are_refused(run):
    folder = run()
    digest = weights_digest(create_model(f'local-dir:{folder}/export', pretrained=True))
    write(folder, results=[results(folder, digest=digest)])
    write(folder, results=[results(folder, digest=digest, model='local-dir:/before/it/was/renamed')])
    with refused('results', 'measured on other weights than those in'):
        write(folder, results=[results(folder, digest='0' * 64)])
    write(folder, results=[results(folder, digest='0' * 64, weights='random')])


def test_knn_checks_of_earlier_epochs_do_not_reach_leaderboards(run):
    folder = run()
    (folder / 'summary.csv').write_text('epoch,train_loss,eval_knn\n0,5.0,40.5\n1,4.0,\n')
    card = write(folder)
    assert '| kNN after epoch 1 | birds | 40.50 |' in card and not ModelCard(card).data.eval_results


def test_card_of_a_small_image_resnet_imports_this_package(run):
    card = write(run('resnet18_s1'))
    assert 'import timm, timm_cgh' in card and 'torchvision' not in card and '--to detectron2' not in card
    assert 'import timm, timm_cgh' not in write(run('test_resnet'))


def test_neither_paths_nor_credentials_are_published(run, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'secret-of-another-form')
    folder = run(
        dataset='wds/', data_dir=f'pipe:curl -H "Authorization: Bearer {TOKEN}" https://host/shards-{{0..9}}.tar',
        model_kwargs={'act_layer': 'secret-of-another-form'}, initial_checkpoint='/secret/w.pth', output='/secret/runs')
    card = write(folder, include_task=True)
    kept = yaml.safe_dump(portable_args(read_args(folder), 'test_resnet'))
    for text in (card, kept, (folder / 'hub' / 'config.json').read_text()):
        assert 'secret' not in text and 'hf_abc' not in text and 'Bearer' not in text
    assert 'act_layer=<token>' in card and ModelCard(card).data.datasets == ['images']


@pytest.mark.parametrize('name, root, shown', [
    ('digits', None, 'digits'), ('torch/cifar10', '/data', 'cifar10'), ('hfds/owner/name', None, 'owner/name'),
    ('hfds/../shared/data/cifar10', None, 'cifar10'), ('', '/home/me/photos/', 'photos'),
    ('', '/data/in1k/train', 'in1k'), ('', 'images.tar', 'images.tar'), ('', '..', 'images'),
    ('wds/', 'https://me:pass@host/{00..99}.tar', 'images'),
])
def test_data_sets_are_shown_by_name_without_their_path(name, root, shown):
    assert data_name(name, root) == shown


def test_portable_arguments_are_options_of_train_py(run):
    args = read_args(run(dataset='hfds/../shared/data/cifar10'))
    kept = portable_args({**args, 'model': 'local-dir:/secret/export'}, 'resnet18')
    assert kept.keys() <= {action.dest for action in train.parser._actions}
    assert kept['dataset'] == '' and kept['model'] == 'resnet18'
    assert not {'train_split', 'val_split', 'input_key', 'target_key'} & kept.keys()
    args = read_args(run(dataset='hfds/owner/name', train_split='train[:100]'))
    assert portable_args(args, 'resnet18')['train_split'] == 'train[:100]'


@pytest.mark.parametrize('spoil, message', [
    (lambda folder: (folder / 'args.yaml').unlink(), 'args.yaml: No such file'),
    (lambda folder: (folder / 'args.yaml').write_text('lr: 1'), 'not the arguments of a run'),
    (lambda folder: change_file(folder / 'args.yaml', model=18), 'args.yaml: its model is damaged'),
    (lambda folder: change_file(folder / 'args.yaml', ratio=[1, None]), 'args.yaml: its ratio is damaged'),
    (lambda folder: change_file(folder / 'args.yaml', model_kwargs='a'), 'args.yaml: its model_kwargs is damaged'),
    (lambda folder: (folder / 'resolved.yaml').write_text('options: 3'), 'resolved.yaml: not of a run'),
    (lambda folder: (folder / 'summary.csv').write_text('epoch,train_loss\n0,many\n'), 'summary.csv: row 1'),
    (lambda folder: (folder / 'export' / 'config.json').write_text('[]'), 'config.json: must hold'),
    (lambda folder: change_file(folder / 'export' / 'config.json', architecture=3), 'not the configuration'),
    (lambda folder: change_cfg(folder, mean=[0.5, 'x', 0.5]), 'config.json: its mean is'),
    (lambda folder: change_cfg(folder, mean=[0.5, float('nan'), 0.5]), 'config.json: its mean is'),
    (lambda folder: change_cfg(folder, std=[0.5, 0, 0.5]), 'config.json: its std is'),
    (lambda folder: change_cfg(folder, std=[0.5, 0.5]), 'config.json: its std is'),
    (lambda folder: change_cfg(folder, input_size=[3, 0, 32]), 'config.json: its input_size is'),
    (lambda folder: change_cfg(folder, input_size=[3, 32.5, 32]), 'config.json: its input_size is'),
    (lambda folder: change_cfg(folder, input_size=None), 'config.json: its input_size is'),
    (lambda folder: change_cfg(folder, tag=...), 'config.json: has no tag'),
    (lambda folder: (folder / 'export' / 'config.json').unlink(), 'has no config.json'),
    (lambda folder: poke(folder, float('nan')), 'is not finite'),
])
def test_incomplete_or_broken_runs_are_refused_before_the_card_is_written(run, spoil, message):
    folder = run()
    spoil(folder)
    with pytest.raises(InputError, match=message) as error:
        write(folder)
    assert '\n' not in str(error.value) and not (folder / 'hub' / 'README.md').exists()


def change_cfg(folder, **values):
    path = folder / 'export' / 'config.json'
    cfg = {**json.loads(path.read_text())['pretrained_cfg'], **values}
    change_file(path, pretrained_cfg={name: value for name, value in cfg.items() if value is not ...})


def poke(folder, value):
    state = load_file(folder / 'export' / 'model.safetensors')
    next(v for v in state.values() if v.is_floating_point()).view(-1)[0] = value
    save_file(state, folder / 'export' / 'model.safetensors', metadata={'format': 'pt'})


def test_float16_that_would_overflow_is_refused(run):
    folder = run()
    poke(folder, 1e6)
    with refused(folder / 'export' / 'model.safetensors', 'is not finite in float16'):
        write(folder, float16=True)
    write(folder)  # float32 can represent it


def test_arguments_of_another_version_are_refused(run):
    folder = run()
    change_file(folder / 'args.yaml', grad_accum_steps=...)
    with refused('args.yaml', 'has no grad_accum_steps'):
        write(folder)


@pytest.mark.parametrize('name', ['name', 'a/b/c', '../up/x', 'me/na me', '/abs', 'me/..'])
def test_repository_ids_are_owner_and_name(name):
    with refused('repo_id'):
        check_repo_id(name)


def test_license_and_data_can_be_named(run):
    data = ModelCard(write(run(), license='cc-by-4.0', dataset='me/birds-525')).data
    assert data.license == 'cc-by-4.0' and data.datasets == ['me/birds-525']


@pytest.mark.parametrize('place', ['', 'export', '../other'])
def test_a_folder_of_a_run_is_not_written_to(run, place):
    folder = run()
    (folder.parent / 'other').mkdir()
    (folder.parent / 'other' / 'summary.csv').touch()
    before = {path: path.read_bytes() for path in folder.rglob('*.*')}
    with refused('output', 'holds a run'):
        write_folder(folder / 'export', folder / place, 'me/birds')
    assert {path: path.read_bytes() for path in folder.rglob('*.*')} == before


# ---- the training state

def test_portable_state_gives_back_every_tensor_and_value(tmp_path):
    shared = torch.arange(6.0)
    state = {
        'state_dict': {'a': shared.view(2, 3).T, 'b': shared[:2], 'scalar': torch.tensor(3)},
        'optimizer': {
            'state': {0: {'momentum_buffer': torch.zeros(2, 0), 'step': 7}},
            'param_groups': [{'lr': 0.1, 'params': [0]}],
        },
        'task_state': {'teacher': {}, 'num_updates': 5},
        'progress': {'epoch': 1, 'meter': {'sums': [(['loss'], torch.ones(1, dtype=torch.float16))]}, 'knn': None},
    }
    write_portable({**state, 'args': object(), 'saver': {'path': '/secret'}}, tmp_path / 'task.safetensors')
    again = read_portable(tmp_path / 'task.safetensors')
    assert again.keys() == state.keys() and again['optimizer']['state'][0]['step'] == 7
    assert torch.equal(again['state_dict']['a'], state['state_dict']['a']) and again['state_dict']['scalar'] == 3
    assert again['optimizer']['state'][0]['momentum_buffer'].shape == (2, 0)
    assert again['optimizer']['param_groups'] == [{'lr': 0.1, 'params': [0]}]
    (names, sums), = again['progress']['meter']['sums']
    assert names == ['loss'] and sums.dtype == torch.float16 and again['progress']['knn'] is None
    with safe_open(tmp_path / 'task.safetensors', 'pt') as file:
        assert 'secret' not in str(file.metadata())

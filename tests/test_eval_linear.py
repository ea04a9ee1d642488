"""Linear evaluation: its parts, and eval_linear.py by its command line."""
import os
import re
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import eval_linear as script
from conftest import REPOSITORY
from data_files import write_classes
from evaluations import (
    CONFIG, DIGITS, evaluate, exported_top1, load_export, printed_results, stop_after_saving, write_damaged)
from input_errors import check_refused, refused
from script_runner import run_two_processes
from timm_cgh.data import Digits, open_dataset
from timm_cgh.errors import InputError
from timm_cgh.eval import FeatureExtractor
from timm_cgh.eval.classifier import as_classifier, top_accuracy
from timm_cgh.eval.crops import BlockSampler, CropLoader
from timm_cgh.eval.linear import FeatureLoader, LinearHeads, best_head, evaluate_heads, head_losses
from timm_cgh.models.checkpoints import weights_digest
from training import read_summary


def linear(encoder, output, *args, **options):
    """Exit code and results of a run in this process."""
    return evaluate('eval_linear', encoder, output, *args, **options)


def read_heads(output):
    return torch.load(output / 'last.pth.tar', weights_only=True)['heads']


def fit(heads, loader, lrs, epochs=3):
    optimizer = torch.optim.SGD([dict(g, lr=lr) for g, lr in zip(heads.param_groups(), lrs)], momentum=0.9)
    for epoch in range(epochs):
        for features, labels, count in loader.epoch(epoch):
            (head_losses(heads(features), labels).sum() / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    return heads


def random_features(count=150, width=12, classes=7):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, width, generator=generator), torch.randint(classes, (count,), generator=generator)


# ---- the parts

def test_every_head_learns_what_it_would_alone():
    features, labels = random_features()
    lrs = [0.01, 0.3, 3.0]
    together = fit(LinearHeads(12, 7, lrs), FeatureLoader(features, labels, batch_size=32), lrs)
    for i, lr in enumerate(lrs):
        alone = torch.nn.Linear(12, 7).double()
        start = LinearHeads(12, 7, [lr])
        alone.load_state_dict({'weight': start.weights[0], 'bias': start.biases[0]})
        optimizer = torch.optim.SGD(alone.parameters(), lr=lr, momentum=0.9)
        for epoch in range(3):
            for x, y, _ in FeatureLoader(features, labels, batch_size=32).epoch(epoch):
                optimizer.zero_grad()
                F.cross_entropy(alone(x.double()), y).backward()
                optimizer.step()
        torch.testing.assert_close(together.weights[i].double(), alone.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(together.biases[i].double(), alone.bias, rtol=1e-3, atol=1e-4)


def test_a_head_that_diverges_does_not_affect_the_others():
    features, labels = random_features()
    loader = FeatureLoader(features, labels, batch_size=32)
    both = fit(LinearHeads(12, 7, [0.1, 1e38]), loader, [0.1, 1e38])
    one = fit(LinearHeads(12, 7, [0.1]), loader, [0.1])
    assert not both.weights[1].isfinite().all()
    torch.testing.assert_close(both.weights[0], one.weights[0])
    results = evaluate_heads(both, features, labels)
    assert results[1].top1 == 0 and results[1].diverged and best_head(results) == 0


def test_heads_start_small_and_equal():
    heads = LinearHeads(2000, 10, [0.1, 1.0])
    assert torch.equal(heads.weights[0], heads.weights[1])
    assert heads.weights[0].std().item() == pytest.approx(0.01, rel=0.05)
    assert not heads.biases[0].any()


def test_accuracy_of_the_heads_equals_a_naive_count():
    features, labels = random_features(501)
    heads = LinearHeads(12, 7, [0.1, 1.0], seed=5)
    torch.nn.init.normal_(heads.weights[1])
    for i, result in enumerate(evaluate_heads(heads, features, labels, chunk=100)):
        logits = features @ heads.weights[i].T + heads.biases[i]
        order = logits.argsort(dim=1, descending=True)
        top1 = sum(int(o[0] == y) for o, y in zip(order, labels))
        top5 = sum(int(y in o[:5]) for o, y in zip(order, labels))
        assert result.top1 == pytest.approx(100 * top1 / 501, abs=1e-9)
        assert result.top5 == pytest.approx(100 * top5 / 501, abs=1e-9)
        assert torch.equal(result.predictions, order[:, 0])


def test_top5_of_three_classes_counts_all():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [1, 3, 2]])
    assert top_accuracy(logits, torch.tensor([0, 0, 0])) == (pytest.approx(100 / 3), 100)


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_every_image_comes_once_an_epoch_over_all_processes(world_size):
    samplers = [BlockSampler(51, 8, 1, rank, world_size) for rank in range(world_size)]
    parts = [list(s.blocks()) for s in samplers]
    assert sorted(torch.cat([i for p in parts for i in p]).tolist()) == list(range(51))
    one = list(BlockSampler(51, 8 * world_size, 1).blocks())
    for batch, block in enumerate(one):
        together = torch.cat([p[batch] for p in parts])
        assert sorted(together.tolist()) == sorted(block.tolist())
        assert len(block) == samplers[0].block_size(batch)


def test_last_batch_with_too_few_images_for_a_process_is_dropped():
    assert [len(BlockSampler(n, 4, 1, 0, 2, least=2)) for n in (16, 19, 20)] == [2, 2, 3]
    with pytest.raises(InputError, match='3 images to train on are too few: 4 are needed, 2 for each process'):
        BlockSampler(3, 4, 1, 0, 2, least=2)


def test_crops_depend_on_seed_epoch_and_image_alone():
    def batches(epoch, **kwargs):
        torch.rand(3)  # the state of the global generator does not matter
        loader = CropLoader(digits, CONFIG, **{'batch_size': 16, 'seed': 1, **kwargs})
        return [(x, y) for x, y, _ in loader.epoch(epoch)]

    digits = torch.utils.data.Subset(Digits('train', 'L'), range(40))
    first = batches(0)
    assert [len(x) for x, _ in first] == [16, 16, 8] and first[0][0].shape[1:] == (1, 16, 16)
    for other in (batches(0), batches(0, workers=2)):
        for (x, y), (x2, y2) in zip(first, other):
            assert torch.equal(x, x2) and torch.equal(y, y2)
    assert not torch.equal(first[0][0], batches(1)[0][0])
    assert not torch.equal(first[0][0], batches(0, seed=2)[0][0])


@pytest.mark.parametrize('name', [
    'test_resnet', 'test_vit', 'test_efficientnet', 'test_convnext', 'mobilenetv3_small_050', 'levit_128s',
    'deit_tiny_distilled_patch16_224'])
def test_backbone_and_head_are_one_timm_classifier(name):
    backbone = timm.create_model(name, num_classes=0).eval()
    size = backbone.pretrained_cfg['input_size']
    weight, bias = torch.randn(6, backbone.head_hidden_size), torch.randn(6)
    digest = weights_digest(backbone)
    model = as_classifier(backbone, weight, bias, dict(input_size=size))
    images = torch.randn(2, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), F.linear(backbone(images), weight, bias), rtol=1e-3, atol=1e-3)
    assert model.num_classes == 6 and weights_digest(backbone) == digest


def test_digest_changes_with_a_single_bit():
    model = timm.create_model('test_resnet', num_classes=0)
    before = weights_digest(model)
    next(model.buffers()).view(-1)[0].add_(1e-7)
    assert weights_digest(model) != before


# ---- the command line

RATES = ['3', '30', '100']


@pytest.fixture(scope='module')
def augmented(encoder, tmp_path_factory):
    """Folder and results of a run with augmentation."""
    output = tmp_path_factory.mktemp('linear') / 'augmented'
    code, results = linear(
        encoder, output, '-b', '64', '--epochs', '4', '--val-interval', '2', '--lr', *RATES, plots=True)
    assert code == 0
    return output, results


def test_run_reports_the_best_and_all_heads(augmented):
    output, results = augmented
    assert list(results['heads']) == RATES
    assert results['top1'] == max(head['top1'] for head in results['heads'].values())
    assert results['top1'] > 20 and results['top5'] >= results['top1']
    assert results['top1_err'] == pytest.approx(100 - results['top1'])
    rows = read_summary(output)
    assert [r['epoch'] for r in rows] == ['0', '1', '2', '3']
    assert [bool(r['eval_top1_lr3']) for r in rows] == [False, True, False, True]
    for name in ('confusion.png', 'classes.png'):
        assert (output / name).read_bytes().startswith(b'\x89PNG')


def test_backbone_is_bit_identical_after_training(encoder, augmented):
    before = load_file(encoder / 'model.safetensors')
    after = load_file(augmented[0] / 'export' / 'model.safetensors')
    assert set(after) - set(before) == {'fc.weight', 'fc.bias'}
    assert any('running_mean' in name for name in before)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_export_is_a_timm_classifier_of_the_reported_accuracy(augmented):
    output, results = augmented
    model = load_export(output / 'export')
    assert model.num_classes == 10
    assert model.pretrained_cfg['label_names'] == [str(i) for i in range(10)]
    assert exported_top1(output) == pytest.approx(results['top1'], abs=1e-3)


def test_cached_features_learn_the_digits(encoder, tmp_path):
    code, results = linear(encoder, tmp_path / 'cached', '--cache-features', '--epochs', '40')
    assert code == 0 and results['protocol'] == 'linear, cached features'
    assert results['top1'] > 60 and len(results['heads']) == 7


@pytest.mark.parametrize('cached', [[], ['--cache-features']])
def test_resumed_run_equals_an_uninterrupted_one(encoder, tmp_path, monkeypatch, cached):
    data = write_damaged(tmp_path / 'images')
    args = ['--epochs', '2', '--lr', '1', '10', '--val-interval', '1', '-b', '4', *cached]
    linear(encoder, tmp_path / 'whole', *args, data=data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_saving(patch)
        linear(encoder, tmp_path / 'broken', *args, data=data)
    assert torch.load(tmp_path / 'broken' / 'last.pth.tar', weights_only=True)['epoch'] == 1
    code, _ = linear(encoder, tmp_path / 'broken', *args, '--resume', 'auto', data=data)
    assert code == 0
    whole, resumed = read_heads(tmp_path / 'whole'), read_heads(tmp_path / 'broken')
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert [r['epoch'] for r in read_summary(tmp_path / 'broken')] == ['0', '1']


@pytest.mark.parametrize('cached', [[], ['--cache-features']])
def test_unreadable_images_are_left_out_and_counted(encoder, tmp_path, caplog, cached):
    data = write_damaged(tmp_path / 'images')
    args = ['--epochs', '2', '--lr', '1', '-b', '4', *cached]
    code, results = linear(encoder, tmp_path / 'run', *args, data=data)
    assert code == 0
    assert (results['train_images'], results['train_unreadable']) == (15, 1)
    assert (results['val_images'], results['val_unreadable']) == (7, 1)
    assert 'cat/001.png' in caplog.text and 'dog/105.png' in caplog.text
    assert cached or re.search(r'data wait [1-9]', caplog.text)
    (tmp_path / 'images' / 'train' / 'cat' / '001.png').unlink()
    (tmp_path / 'images' / 'val' / 'dog' / '105.png').unlink()
    assert linear(encoder, tmp_path / 'without', *args, data=data)[1]['top1'] == results['top1']
    for name, value in read_heads(tmp_path / 'run').items():
        assert torch.equal(value, read_heads(tmp_path / 'without')[name])


def test_an_image_that_becomes_unreadable_ends_the_training_in_one_line(tmp_path):
    paths = sorted(write_classes(tmp_path, 2).glob('*/*.png'))
    loader = CropLoader(open_dataset('', str(tmp_path)), CONFIG, batch_size=4)
    paths[0].write_bytes(b'no image')
    with refused('data_dir', 'could be read before, but not now'):
        next(loader.epoch(0))


def test_finished_run_is_not_overwritten(encoder, augmented, tmp_path, capsys):
    argv = ['--model', f'local-dir:{encoder}', *DIGITS, '--output', augmented[0], '--epochs', '4']
    check_refused(capsys, script, argv, f'--output {augmented[0]}: holds a run; --resume auto')
    other = shutil.copy(augmented[0] / 'last.pth.tar', tmp_path)
    check_refused(capsys, script, [*argv, '--resume', other], f'--output {augmented[0]}: holds another run')


@pytest.mark.parametrize('args, named', [
    (['--resume', 'auto', '--lr', *RATES, '--epochs', '5'], 'other settings: epochs'),
    (['--resume', 'auto', '--lr', '1', '--epochs', '4'], 'other settings: lr'),
    (['--resume', 'auto', '--lr', *RATES, '--epochs', '4', '-b', '64', '--momentum', '0.5'],
     'other settings: optimization'),
    (['--resume', 'auto', '--lr', *RATES, '--epochs', '4', '-b', '64', '--scale', '0.5', '1'],
     'other settings: augmentation'),
    (['--resume', 'auto', '--lr', *RATES, '--epochs', '4', '-b', '64', '--mean', '0.1'], 'other settings: input'),
    (['--resume', 'missing.pth.tar'], 'no such file'),
    (['--lr', '-1'], '--lr'),
    (['--scale', '0.1', '2'], '--scale 0.1 2: must be 0 < min <= max <= 1'),
    (['--scale', '0.9', '0.2'], '--scale 0.9 0.2: must be 0 < min <= max <= 1'),
])
def test_bad_input_is_one_line_that_names_the_option(encoder, augmented, capsys, args, named):
    argv = ['--model', f'local-dir:{encoder}', *DIGITS, '--output', augmented[0], *args]
    check_refused(capsys, script, argv, named)


@pytest.mark.skipif(os.name != 'posix', reason='limits of POSIX')
def test_a_full_disk_is_one_line_and_leaves_no_temporary(encoder, tmp_path, capsys):
    import resource
    output = tmp_path / 'run'
    argv = ['--model', f'local-dir:{encoder}', *DIGITS, '--cache-features', '--epochs', '1', '--output', output]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))  # the checkpoint is larger
    try:
        check_refused(capsys, script, argv, f'no space left on the disk, for {output}/last.pth.tar')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in output.iterdir()] == ['summary.csv']


def test_crops_with_features_beyond_float16_run_again_in_float32(encoder):
    model, images = load_export(encoder), torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)][-1].weight.mul_(1e7)
        wanted = model(images)
    found = FeatureExtractor(CONFIG, amp_dtype=torch.float16).batch_features(model, images)
    assert wanted.max() > 65504 and torch.equal(found, wanted)


def test_a_run_whose_heads_all_diverge_ends_with_exit_code_1(encoder, tmp_path, caplog):
    code, results = linear(encoder, tmp_path / 'wild', '--cache-features', '--epochs', '3', '--lr', '1e38')
    assert code == 1 and results is None
    assert 'diverged' in caplog.text


@pytest.mark.parametrize('config, lr', [('small', 3.0), ('imagenet', 0.3)])
def test_configs_hold_the_protocols_of_the_paper(config, lr):
    args = script.parser.parse(['-c', str(REPOSITORY / 'configs' / f'eval_linear_{config}.yaml')])
    assert (args.lr, args.epochs, args.batch_size, args.momentum, args.weight_decay) == ([lr], 100, 256, 0.9, 0)
    assert args.scale == [0.08, 1.0] and not args.cache_features


def test_two_processes_equal_one_with_the_same_global_batch(encoder, tmp_path):
    args = ['--epochs', '2', '--lr', '1', '10']
    code, one = linear(encoder, tmp_path / 'one', *args)
    assert code == 0
    done = run_two_processes(
        'eval_linear.py', '--model', f'local-dir:{encoder}', *DIGITS, '--batch-size', '128', *args,
        '--output', tmp_path / 'two')
    assert done.returncode == 0, done.stderr[-3000:]
    for name, value in read_heads(tmp_path / 'one').items():
        torch.testing.assert_close(read_heads(tmp_path / 'two')[name], value, rtol=1e-3, atol=1e-4)
    assert printed_results(done.stdout)['top1'] == pytest.approx(one['top1'], abs=0.3)  # one image at the border

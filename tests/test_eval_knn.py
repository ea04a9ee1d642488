"""eval_knn.py by its command line."""
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor

import eval_knn as script
from data_files import write_classes
from evaluations import CONFIG, DIGITS, evaluate, load_export, printed_results, write_damaged
from input_errors import check_refused
from script_runner import call_script, run_two_processes
from timm_cgh.data import Digits
from timm_cgh.eval import best_knn, create_eval_loader, extract_features, knn_accuracy
from timm_cgh.models.export import export_backbone


def arguments(encoder, *args):
    return ['--model', f'local-dir:{encoder}', *DIGITS, '--batch-size', '64', *args]


@pytest.fixture(scope='module')
def evaluated(encoder, tmp_path_factory):
    """Folder and results of a run with everything that it can write."""
    output = tmp_path_factory.mktemp('knn') / 'run'
    code, results = evaluate(
        'eval_knn', encoder, output, '--batch-size', '64', '--save-features', output / 'features', plots=True)
    assert code == 0
    return output, results


def test_accuracy_is_that_of_the_features(encoder, evaluated):
    model, sets = load_export(encoder), [Digits(split, 'L') for split in ('train', 'validation')]
    features = [extract_features(model, create_eval_loader(s, CONFIG, batch_size=64)) for s in sets]
    accuracy = knn_accuracy(*features[0], *features[1])
    results = evaluated[1]
    assert results['knn'] == {str(k): pytest.approx(value, abs=1e-3) for k, value in accuracy.items()}
    assert (results['k'], results['top1']) == (best_knn(accuracy)[0], pytest.approx(best_knn(accuracy)[1], abs=1e-3))
    assert results['top1'] > 50 and results['num_classes'] == 10


def test_saved_features_give_the_accuracy_again(evaluated):
    output, results = evaluated
    train, val = (load_file(output / 'features' / f'{name}.safetensors') for name in ('train', 'validation'))
    assert len(train['features']) == results['train_images'] and len(val['labels']) == results['val_images']
    accuracy = knn_accuracy(train['features'], train['labels'], val['features'], val['labels'], ks=(20,))
    assert accuracy[20] == pytest.approx(results['knn']['20'], abs=1e-4)
    with safe_open(output / 'features' / 'train.safetensors', 'pt') as file:
        assert json.loads(file.metadata()['class_names']) == [str(i) for i in range(10)]


def test_plots_are_written_to_the_output_folder(evaluated):
    for name in ('retrieval.png', 'classes.png'):
        with Image.open(evaluated[0] / name) as plot:
            assert min(plot.size) > 300


def test_only_the_given_k_are_tried(encoder, capsys):
    assert call_script('eval_knn', *arguments(encoder, '--k', '3', '1', '3')) == 0
    assert list(printed_results(capsys.readouterr().out)['knn']) == ['1', '3']


def test_raw_pixels_are_evaluated_with_the_same_protocol(encoder, capsys):
    assert call_script('eval_knn', *arguments(encoder, '--pixels', '--k', '5')) == 0
    results = printed_results(capsys.readouterr().out)
    parts = []
    for split in ('train', 'validation'):
        images, labels = zip(*(Digits(split, 'L')[i][:2] for i in range(len(Digits(split, 'L')))))
        images = [to_tensor(image.resize((16, 16), Image.Resampling.BILINEAR)).flatten() for image in images]
        parts += [torch.stack(images), torch.tensor(labels)]
    assert results['top1'] == pytest.approx(knn_accuracy(*parts, ks=(5,))[5], abs=1e-3)
    assert (results['weights'], results['num_features']) == ('pixels', 256)


@pytest.mark.parametrize('args, named', [
    (['--k', '10', '5000'], '--k 5000: there are only 1433 training images'),
    (['--k', '0'], '--k: must be a whole number of at least 1'),
    (['--temperature', '0'], '--temperature'),
    (['--batch-size', '1e30'], '--batch-size: must be a whole number of at least 1'),
    (['--batch-size', '1' + '0' * 30], '--batch-size: must be at most 2147483647'),
    (['--val-split', 'test'], '--val-split test: digits has the splits train and validation'),
    (['--save-features', '/dev/null/here'], '--save-features /dev/null/here'),
    (['--checkpoint', 'nowhere.pth'], 'nowhere.pth: no such file'),
    (['--pixels', '--checkpoint', 'nowhere.pth'], '--pixels: use no weights, not with --checkpoint'),
])
def test_bad_input_is_one_line_that_names_the_option(encoder, capsys, args, named):
    check_refused(capsys, script, arguments(encoder, *args), named)


def test_unreadable_images_are_left_out_and_counted(encoder, tmp_path, caplog):
    data = write_damaged(tmp_path / 'images')
    args = ['--batch-size', '3', '--save-features']
    code, results = evaluate('eval_knn', encoder, tmp_path / 'one', *args, tmp_path / 'one', data=data)
    assert code == 0
    assert (results['train_images'], results['train_unreadable']) == (15, 1)
    assert (results['val_images'], results['val_unreadable']) == (7, 1)
    assert 'cat/001.png' in caplog.text and 'dog/105.png' in caplog.text
    saved = [load_file(tmp_path / 'one' / f'{split}.safetensors') for split in ('train', 'validation')]
    assert [len(s['features']) for s in saved] == [15, 7]

    done = run_two_processes(
        'eval_knn.py', '--model', f'local-dir:{encoder}', *data, *args, tmp_path / 'two', '--output',
        tmp_path / 'plots')
    assert done.returncode == 0, done.stderr[-3000:]
    two = printed_results(done.stdout)
    assert (two['knn'], two['train_unreadable'], two['val_unreadable']) == (results['knn'], 1, 1)
    assert done.stderr.count('Unreadable image left out: ') == 2 and done.stdout.count('--result') == 1
    for (split, one) in zip(('train', 'validation'), saved):
        two = load_file(tmp_path / 'two' / f'{split}.safetensors')
        assert torch.equal(one['features'], two['features']) and torch.equal(one['labels'], two['labels'])

    (tmp_path / 'images' / 'train' / 'cat' / '001.png').unlink()
    (tmp_path / 'images' / 'val' / 'dog' / '105.png').unlink()
    without = evaluate('eval_knn', encoder, tmp_path / 'without', '--batch-size', '3', data=data)[1]
    assert without['knn'] == results['knn'] and without['val_unreadable'] == 0


@pytest.mark.parametrize('workers', ['0', '1'])
def test_images_that_cannot_be_read_end_in_one_line_from_any_process(tmp_path, capsys, workers):
    for split in ('train', 'validation'):
        for path in write_classes(tmp_path / split, 2).glob('*/*.png'):
            path.write_bytes(b'no image')
    argv = [
        '--model', 'test_resnet', '--no-pretrained', '--data-dir', tmp_path, '--device', 'cpu', '--workers', workers]
    stderr = check_refused(capsys, script, argv, '--data-dir: none of 4 images can be read')
    assert 'Traceback' not in stderr


def test_features_that_are_not_finite_are_refused(encoder, tmp_path, capsys):
    model = load_export(encoder)
    torch.nn.init.constant_(model.layer4[0].conv1.weight, float('nan'))
    export = export_backbone(model, tmp_path / 'export', **CONFIG)
    check_refused(capsys, script, arguments(export), f'--model local-dir:{export}', 'are not finite')

"""predict.py: the most probable classes of new images, by name."""
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

import predict as script
from data_files import picture
from evaluations import CONFIG, CPU, load_export
from input_errors import check_refused
from run_folders import read_table
from script_runner import call_script, run_two_processes
from timm_cgh.apply.predictions import load_classifier
from timm_cgh.data import open_dataset
from timm_cgh.eval import create_eval_loader
from timm_cgh.models.export import export_backbone

CLASSES = ['cat', 'dog, small', 'Käfer']


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """Export folder of a classifier of three classes."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3, in_chans=1).eval()
    with torch.no_grad():  # a classifier that finds different classes in dark and bright images
        model.fc.weight.mul_(30)
        model.fc.bias.copy_(-model(torch.tensor([-0.8, 1.9]).view(2, 1, 1, 1).expand(2, 1, 16, 16)).mean(dim=0))
    return export_backbone(model, tmp_path_factory.mktemp('classifier') / 'export', **CONFIG, label_names=CLASSES)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """12 images, from dark to bright, and one that is unreadable."""
    folder = tmp_path_factory.mktemp('photos')
    for number in range(12):
        picture(number).point(lambda value, number=number: value / 8 + 20 * number).save(folder / f'{number:03d}.png')
    (folder / '0055.png').write_bytes(b'no image')
    return folder


@pytest.fixture(scope='module')
def expected(classifier, photos):
    """File name -> probabilities, by timm's model."""
    dataset = open_dataset('', str(photos), in_chans=1)
    (images, _), = create_eval_loader(dataset, CONFIG, batch_size=64)
    with torch.no_grad():
        probabilities = load_export(classifier)(images).softmax(dim=1)
    return dict(zip((name for name in dataset.filenames() if name != '0055.png'), probabilities))


def predict(classifier, photos, output, *args):
    assert call_script(
        'predict', '--model', f'local-dir:{classifier}', '--data-dir', photos, *CPU, '--batch-size', '5', '--output',
        output, *args) == 0
    assert Path(f'{output}.unreadable.txt').read_text().startswith('0055.png\t')


def check(predictions, probabilities, count):
    """(class name, probability) pairs are the `count` most probable ones."""
    top = probabilities.topk(count)
    assert [name for name, _ in predictions] == [CLASSES[index] for index in top.indices]
    assert [value for _, value in predictions] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_csv_has_a_row_per_readable_image_with_its_classes_by_name(classifier, photos, expected, tmp_path):
    predict(classifier, photos, tmp_path / 'out.csv', '--top', '2')
    rows = read_table(tmp_path / 'out.csv')
    assert list(rows[0]) == ['file_name', 'class_1', 'probability_1', 'class_2', 'probability_2']
    assert [row['file_name'] for row in rows] == list(expected)
    assert len({row['class_1'] for row in rows}) > 1
    for row in rows:
        check([(row[f'class_{place}'], float(row[f'probability_{place}'])) for place in (1, 2)],
              expected[row['file_name']], 2)


@pytest.mark.parametrize('ending', ['json', 'jsonl'])
def test_json_holds_all_classes_where_there_are_fewer_than_asked_for(classifier, photos, expected, tmp_path, ending):
    predict(classifier, photos, tmp_path / f'out.{ending}')
    text = (tmp_path / f'out.{ending}').read_text(encoding='utf-8')
    items = json.loads(text) if ending == 'json' else [json.loads(line) for line in text.splitlines()]
    assert [item['file_name'] for item in items] == list(expected)
    for item in items:
        check([(p['class'], p['probability']) for p in item['predictions']], expected[item['file_name']], 3)


def test_classes_of_imagenet_have_their_names(tmp_path):
    config = dict(CONFIG, input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    for count, name in ((1000, 'tench, Tinca tinca'), (7, '0')):
        model = timm.create_model('test_resnet', num_classes=count)
        folder = export_backbone(model, tmp_path / str(count), **config)
        assert load_classifier(f'local-dir:{folder}').names[0] == name


def test_images_are_cropped_as_the_classifier_was_trained(classifier, photos, tmp_path):
    shutil.copytree(classifier, tmp_path / 'export')
    path = tmp_path / 'export' / 'config.json'
    content = json.loads(path.read_text())
    content['pretrained_cfg'].update(crop_pct=0.6, crop_mode='border')
    path.write_text(json.dumps(content))
    config = load_classifier(f'local-dir:{path.parent}').data_config
    dataset = open_dataset('', str(photos), in_chans=1)
    (images, _), = create_eval_loader(dataset, config, batch_size=64)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=content['pretrained_cfg']))
    assert torch.equal(images[0], transform(dataset[0][0].convert('L')))
    assert 'crop_pct' not in load_classifier(f'local-dir:{path.parent}', img_size=24).data_config


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(classifier, photos, tmp_path):
    predict(classifier, photos, tmp_path / 'one.csv')
    done = run_two_processes(
        'predict.py', '--model', f'local-dir:{classifier}', '--data-dir', photos, *CPU, '--batch-size', '5', '--output',
        tmp_path / 'two.csv')
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ('{}.csv', '{}.csv.unreadable.txt'):
        assert (tmp_path / name.format('one')).read_bytes() == (tmp_path / name.format('two')).read_bytes()


@pytest.mark.parametrize('args, named', [
    (['--output', 'out.txt'], '--output out.txt: must end in .csv'),
    (['--output', 'out.csv', '--model', 'local-dir:ENCODER'], 'has no classifier; fine-tune it first'),
    (['--output', 'out.csv', '--model', 'test_resnet18'], '--model test_resnet18: timm has no such model'),
    (['--output', 'out.csv', '--model', 'resnet50_mlp'], '--model resnet50_mlp: timm has no weights for it'),
    (['--output', 'out.csv'], '--data-dir: say which images'),
])
def test_bad_input_is_one_line_that_names_the_option(classifier, encoder, tmp_path, capsys, monkeypatch, args, named):
    monkeypatch.chdir(tmp_path)
    args = [arg.replace('ENCODER', str(encoder)) for arg in args]
    check_refused(capsys, script, ['--model', f'local-dir:{classifier}', *CPU, *args], named)

"""finetune.py: which images validate, the rates of the layers, and the classifier of the best epoch."""
import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from timm.data import resolve_data_config

import finetune as script
import publish
from backbones import equal
from data_files import write_images
from evaluations import CPU, load_export, stop_after_saving
from input_errors import check_refused
from script_runner import call_script
from timm_cgh.data import read_labels
from timm_cgh.eval import FeatureExtractor, create_eval_loader
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.eval.datasets import hold_out, open_labelled_datasets
from training import make_images, read_summary

TINY = ['--model', 'test_resnet', '--no-pretrained', '--img-size', '16', '--batch-size', '16', *CPU]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """40 images of cats and dogs, without a validation folder, and an unreadable one."""
    folder = make_images(tmp_path_factory.mktemp('photos') / 'photos', count=40)
    (folder / 'cat' / 'broken.jpg').write_bytes(b'no image')
    return folder


def finetune(output, *args, plots=False):
    """Exit code and results of a run in this process."""
    results = output.parent / f'{output.name}.json'
    code = call_script('finetune', *TINY, '--output', output, '--results-file', results, *args, plots=plots)
    return code, json.loads(results.read_text()) if results.exists() else None


# ---- images that validate

def test_a_fifth_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2, 3, 4], [50, 10, 4, 2, 1])
    chosen = hold_out(labels)
    assert np.bincount(labels[chosen], minlength=5).tolist() == [10, 2, 1, 1, 0]
    assert np.array_equal(chosen, hold_out(labels)) and not np.array_equal(chosen, hold_out(labels, seed=1))


def test_held_out_images_are_not_trained_on(photos, tmp_path):
    config = dict(input_size=(3, 16, 16))
    data = open_labelled_datasets(config, data_dir=str(photos), val_split=None)
    assert (len(data.train), len(data.val), data.val_split) == (33, 8, 'a fifth of the training images')
    assert not {*data.train.indices} & {*data.val.indices}
    assert np.bincount(read_labels(data.val)).tolist() == [4, 4] and data.class_names == ['cat', 'dog']

    # a validation folder is taken where there is one
    make_images(tmp_path / 'train')
    make_images(tmp_path / 'valid', count=4)
    data = open_labelled_datasets(config, data_dir=str(tmp_path), val_split=None)
    assert (len(data.train), len(data.val), data.val_split) == (24, 4, 'validation')


# ---- the command line

def test_rates_fall_from_the_classifier_to_the_first_layer(photos):
    args = script.parser.parse([*TINY, '--data-dir', str(photos), '--output', 'none', '--lr', '0.01'])
    script.choose_settings(args)
    backbone = load_backbone('test_resnet', no_pretrained=True, img_size=16)
    data = open_labelled_datasets(backbone.data_config, data_dir=str(photos), val_split=None)
    args.amp_dtype = None
    tuning = script.create_tuning(args, backbone, data, data.train, FeatureExtractor(backbone.data_config))
    tuning.scheduler.step_update(args.warmup_epochs * len(tuning.loader))
    rates = {
        id(parameter): group['lr'] for group in tuning.optimizer.param_groups for parameter in group['params']}
    named = {name: rates[id(parameter)] for name, parameter in tuning.classifier.named_parameters()}
    assert max(named.values()) == named['fc.weight'] > named['layer4.0.conv1.weight'] > named['conv1.0.weight']
    assert named['fc.weight'] == pytest.approx(0.01, rel=0.1)  # the cosine has begun
    assert len(rates) == len(named)


@pytest.fixture(scope='module')
def tuned(photos, tmp_path_factory):
    """Folder and results of a run."""
    output = tmp_path_factory.mktemp('finetune') / 'tuned'
    code, results = finetune(output, '--data-dir', photos, '--epochs', '6', '--lr', '0.01', plots=True)
    assert code == 0
    return output, results


def test_a_run_learns_the_classes_and_keeps_their_names(tuned):
    output, results = tuned
    assert results['top1'] == 100 and results['protocol'] == 'fine-tuned'
    assert (results['train_images'], results['train_unreadable'], results['val_images']) == (32, 1, 8)
    assert results['val_split'] == 'a fifth of the training images'
    config = json.loads((output / 'export' / 'config.json').read_text())
    assert config['label_names'] == ['cat', 'dog'] and config['num_classes'] == 2
    best = next(row for row in read_summary(output) if float(row['eval_top1']) == 100)
    assert results['epoch'] == int(best['epoch'])
    for name in ('confusion.png', 'classes.png'):
        assert (output / name).read_bytes().startswith(b'\x89PNG')


def test_export_is_a_classifier_of_the_reported_accuracy(photos, tuned):
    output, results = tuned
    model = load_export(output / 'export')
    config = resolve_data_config({}, model=model)
    data = open_labelled_datasets(config, data_dir=str(photos), val_split=None)
    (images, labels), = create_eval_loader(data.val, config, batch_size=8)
    with torch.no_grad():
        assert 100 * (model(images).argmax(dim=1) == labels).double().mean() == results['top1']


def test_a_classifier_is_published_with_its_classes_and_result(tuned, tmp_path):
    output, results = tuned
    args = [output / 'export', '--repo-id', 'me/pets', '--output', tmp_path / 'hub', '--dry-run', '--dataset', 'pets']
    assert call_script('publish', *args, '--results', f'{output}.json') == 0
    card = ModelCard.load(tmp_path / 'hub' / 'README.md')
    assert card.data.pipeline_tag == 'image-classification' and 'on pets into a classifier of 2 classes' in card.content
    assert 'cat, dog' in card.content and f"| {results['top1']:.2f} |" in card.content
    published, exported = load_export(tmp_path / 'hub'), load_export(output / 'export')
    assert published.pretrained_cfg['label_names'] == ['cat', 'dog'] and published.pretrained_cfg['license']
    assert equal(published.state_dict(), exported.state_dict())


def test_what_is_not_of_that_classifier_is_not_published_with_it(tuned, tmp_path, capsys):
    output, results = tuned
    args = [output / 'export', '--repo-id', 'me/pets', '--output', tmp_path / 'hub', '--dry-run', '--results']
    others = {'measured on another classifier': {**results, 'classifier': 'x'}}
    others['has no classifier'] = {name: value for name, value in results.items() if name != 'classifier'}
    for named, content in others.items():
        (tmp_path / 'r.json').write_text(json.dumps(content))
        check_refused(capsys, publish, [*args, tmp_path / 'r.json'], f"--results {tmp_path / 'r.json'}: {named}")
    shutil.copytree(output / 'export', tmp_path / 'export')
    config = tmp_path / 'export' / 'config.json'
    config.write_text(config.read_text().replace('"finetune"', '"semisup"'))
    named = 'must be a classifier of finetune.py, its tag is semisup'
    check_refused(capsys, publish, [config.parent, *args[1:-1]], named)
    content = json.loads((output / 'export' / 'config.json').read_text())
    del content['label_names']
    config.write_text(json.dumps(content))
    assert call_script('publish', config.parent, *args[1:-1]) == 0
    assert 'label_names' not in (tmp_path / 'hub' / 'README.md').read_text()  # the usage there would fail


def test_the_best_epoch_is_exported_not_the_last(photos, tmp_path, monkeypatch):
    accuracy = iter([(50.0, 100.0), (90.0, 100.0), (10.0, 100.0)])
    monkeypatch.setattr('timm_cgh.eval.fine_tuning.top_accuracy', lambda *_: next(accuracy))
    saved, export = [], script.export_classifier
    monkeypatch.setattr(script, 'export_classifier', lambda model, *args: (
        saved.append(model.fc.weight.detach().clone()), export(model, *args)))
    code, results = finetune(tmp_path / 'run', '--data-dir', photos, '--epochs', '3', '--lr', '0.01')
    assert code == 0 and (results['epoch'], results['top1']) == (1, 90)
    assert len(saved) == 2 and torch.equal(load_export(tmp_path / 'run' / 'export').fc.weight, saved[1])


def test_resumed_run_equals_an_uninterrupted_one(photos, tmp_path, monkeypatch):
    args = ['--data-dir', photos, '--epochs', '3']
    _, whole = finetune(tmp_path / 'whole', *args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_saving(patch)
        finetune(tmp_path / 'broken', *args)
    code, resumed = finetune(tmp_path / 'broken', *args, '--resume', 'auto')
    assert code == 0 and {**whole, 'seconds': 0} == {**resumed, 'seconds': 0}
    a, b = (torch.load(tmp_path / run / 'last.pth.tar', weights_only=True) for run in ('whole', 'broken'))
    for name, value in a['classifier'].items():
        assert torch.equal(value, b['classifier'][name]), name
    assert read_summary(tmp_path / 'whole') == read_summary(tmp_path / 'broken')
    # another folder, where no classifier is exported as none is better: the results are the same
    code, again = finetune(tmp_path / 'other', *args, '--resume', tmp_path / 'whole' / 'last.pth.tar')
    assert code == 0 and {**whole, 'seconds': 0} == {**again, 'seconds': 0}


@pytest.mark.parametrize('args, named', [
    ([], '--output: say where'),
    (['--output', 'run', '--val-split', 'test'], '--val-split test: '),
    (['--output', 'run', '--epochs', '2', '--warmup-epochs', '2'], '--warmup-epochs 2: must be below --epochs, 2'),
    (['--output', 'run', '--opt', 'adamx'], '--opt adamx: '),
    (['--output', 'run', '--data-dir', 'flat'], '--train-split train: has no labels'),
])
def test_bad_input_is_one_line_that_names_the_option(photos, tmp_path, capsys, monkeypatch, args, named):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'flat', 2)
    check_refused(capsys, script, [*TINY, '--data-dir', photos, *args], named)

"""eval_detection.py by its command line."""
import json
import re
import sys
from functools import partial

import pytest
import timm
import torch
import yaml

import eval_detection as script
from conftest import REPOSITORY
from detection_data import coco_content, make_image, make_masks, make_voc, voc_object, write_coco, write_voc
from evaluations import stop_after_saving
from input_errors import check_refused
from run_folders import read_table
from script_runner import call_script, run_two_processes
from timm_cgh.eval import detection
from timm_cgh.eval.detection import load_detector
from training import read_summary

MODEL = ['--model', 'test_resnet', '--no-pretrained', '--workers', '0', '--device', 'cpu']
TINY = [
    '--head', 'fpn', '--channels', '16', '--rois', '8', '--train-proposals', '50', '20', '--test-proposals', '50', '20',
    '--min-size', '48', '64', '--test-size', '48', '--max-size', '96', '--batch-size', '2', '--iterations', '4',
    '--log-interval', '2', '--bn-iterations', '1']


@pytest.fixture(scope='module')
def streets(tmp_path_factory):
    """Images with masks, and the options that name them."""
    folder = make_masks(tmp_path_factory.mktemp('streets'))
    return ['--dataset', 'masks', '--data-dir', str(folder)]


def detect(output, *args):
    """Exit code and results of a run in this process."""
    results = output.parent / f'{output.name}.json'
    code = call_script('eval_detection', *MODEL, *TINY, '--output', output, '--results-file', results, *args)
    return code, json.loads(results.read_text())


def figures(results):
    return {name: value for name, value in results.items() if 'AP' in name}


@pytest.fixture(scope='module')
def trained(streets, tmp_path_factory):
    """A run with masks: its folder and results."""
    output = tmp_path_factory.mktemp('detection') / 'run'
    code, results = detect(output, *streets, '--masks', '--val-interval', '2', '--pictures', '2')
    assert code == 0
    return output, results


def test_run_leaves_its_files(trained):
    output, results = trained
    assert set(figures(results)) == {'AP', 'AP50', 'AP75', 'mask_AP', 'mask_AP50', 'mask_AP75'}
    assert (results['metric'], results['protocol']) == ('coco', 'detection, fpn')
    assert (results['train_images'], results['val_images'], results['num_classes']) == (7, 3, 1)
    assert results['dropped'] == dict(train={}, validation={})
    rows = read_summary(output)
    assert [row['iteration'] for row in rows] == ['1', '3'] and all(row['eval_AP'] for row in rows)
    assert float(rows[1]['eval_AP50']) == results['AP50']
    assert {'lr', 'train_loss', 'train_loss_mask', 'train_loss_rpn_box_reg'} <= set(rows[0])
    classes = read_table(output / 'classes.csv')
    assert [row['class'] for row in classes] == ['object']
    assert float(classes[0]['bbox_AP50']) == pytest.approx(results['AP50'], abs=1e-3) and 'segm_AP75' in classes[0]
    detections = json.loads((output / 'detections.json').read_text())
    assert detections and set(detections[0]) == {'image_id', 'category_id', 'bbox', 'score', 'segmentation'}
    assert (output / 'detections.png').read_bytes().startswith(b'\x89PNG')


def test_detector_and_backbone_load_in_a_few_lines(trained):
    output, _ = trained
    detector = load_detector(output / 'detector.safetensors')
    with torch.no_grad():
        found = detector([torch.rand(3, 60, 90)])[0]
    assert set(found) == {'boxes', 'scores', 'labels', 'masks'} and detector.classes == ['object']
    backbone = timm.create_model(f'local-dir:{output}/export', pretrained=True)
    ours = detector.backbone.body.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in backbone.state_dict().items())


def evaluate_only(detector, streets, output):
    """Results and `detections.json` of --eval-only in this process."""
    args = [*streets, '--eval-only', detector, '--workers', '0', '--device', 'cpu', '--output', output]
    assert call_script('eval_detection', *args, '--results-file', output.with_suffix('.json')) == 0
    return json.loads(output.with_suffix('.json').read_text()), (output / 'detections.json').read_text()


def test_evaluation_of_the_file_gives_the_figures_of_the_run(trained, streets, tmp_path):
    output, results = trained
    alone, detections = evaluate_only(output / 'detector.safetensors', streets, tmp_path / 'alone')
    assert figures(alone) == figures(results) and alone['weights'] == 'detector.safetensors'
    assert detections == (output / 'detections.json').read_text()


@pytest.mark.parametrize('head', [[], ['--head', 'c4']])
def test_killed_and_resumed_run_is_that_of_one_sitting(streets, tmp_path, monkeypatch, head):
    args = [*streets, '--iterations', '6', '--val-interval', '4', *head]
    detect(tmp_path / 'whole', *args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_saving(patch)
        detect(tmp_path / 'killed', *args)
    assert torch.load(tmp_path / 'killed' / 'last.pth.tar', weights_only=True)['iteration'] == 4
    code, results = detect(tmp_path / 'killed', *args, '--resume', 'auto')
    assert code == 0
    for name in ('detector.safetensors', 'summary.csv', 'detections.json'):
        assert (tmp_path / 'killed' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name
    again = detect(tmp_path / 'killed', *args, '--resume', 'auto')[1]  # a finished run
    assert figures(again) == figures(results)


@pytest.mark.slow
def test_two_processes_end_with_equal_parameters_and_evaluate_as_one_does(streets, tmp_path):
    done = run_two_processes(
        'tests/detection_worker.py', tmp_path, *MODEL, *TINY, *streets, '--batch-size', '1', '--masks')
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f'parameters-{rank}.pt', weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    one, detections = evaluate_only(tmp_path / 'run' / 'detector.safetensors', streets, tmp_path / 'one')
    two = json.loads((tmp_path / 'two.json').read_text())
    assert figures(one) == figures(two) and one['val_images'] == two['val_images'] == 3
    assert detections == (tmp_path / 'two' / 'detections.json').read_text()


def test_gain_over_another_run_comes_with_an_interval(trained, streets, tmp_path, monkeypatch):
    output, results = trained
    monkeypatch.setattr(detection, 'bootstrap_ap50', partial(detection.bootstrap_ap50, samples=20))
    (tmp_path / 'nothing.json').write_text('[]')
    args = [*streets, '--eval-only', output / 'detector.safetensors', '--workers', '0', '--device', 'cpu']
    assert call_script(
        'eval_detection', *args, '--baseline', tmp_path / 'nothing.json', '--results-file', tmp_path / 'r.json') == 0
    gain = json.loads((tmp_path / 'r.json').read_text())['AP50_gain']
    assert gain['gain'] == pytest.approx(results['AP50'], abs=0.01) and gain['low'] <= gain['gain'] <= gain['high']


@pytest.mark.parametrize('text', [
    '{"image_id": 1}', '[1]', '[{"image_id": 1, "category_id": 1, "score": 1, "bbox": [0, 0, 5, 5]}]',
    '[{"image_id": 77, "category_id": 1, "score": 1, "bbox": [0, 0, 5, 5], "segmentation": {}}]'])
def test_a_baseline_that_is_not_of_this_data_is_refused_before_training(streets, tmp_path, capsys, text):
    (tmp_path / 'other.json').write_text(text)
    args = [*MODEL, *TINY, *streets, '--masks', '--baseline', tmp_path / 'other.json']
    check_refused(capsys, script, args, f'--baseline {tmp_path / "other.json"}')


def test_voc_is_trained_and_tested_by_its_own_metric(tmp_path):
    make_voc(tmp_path)
    code, results = detect(tmp_path / 'run', '--dataset', 'voc', '--data-dir', tmp_path, '--head', 'c4')
    assert code == 0 and (results['metric'], results['protocol']) == ('voc07', 'detection, c4')
    assert (results['train_images'], results['val_images'], results['num_classes']) == (3, 2, 2)


def test_parameters_behind_the_last_map_are_named_and_counted(streets, tmp_path, caplog):
    with caplog.at_level('INFO', 'eval'):
        _, results = detect(tmp_path / 'run', *streets, '--model', 'test_efficientnet', '--iterations', '1')
    frozen = results['unused_parameters']
    model = timm.create_model('test_efficientnet', num_classes=0)
    assert frozen == sum(p.numel() for n, p in model.named_parameters() if n.startswith(('conv_head', 'bn2')))
    assert f'{100 * frozen / sum(p.numel() for p in model.parameters()):.1f} %' in caplog.text
    assert 'conv_head.weight' in caplog.text
    assert re.search(r'data wait [1-9]', caplog.text)


@pytest.mark.slow
def test_digits_are_found_in_unseen_scenes(tmp_path):
    code = call_script(
        'eval_detection', '-c', REPOSITORY / 'configs' / 'eval_digits_fpn.yaml', *MODEL, '--model', 'resnet10t',
        '--results-file', tmp_path / 'results.json')
    results = json.loads((tmp_path / 'results.json').read_text())
    assert code == 0 and results['val_images'] == 100 and results['AP50'] >= 65


# ---- the protocol

def test_defaults_and_config_are_those_of_moco_on_voc():
    path = REPOSITORY / 'configs' / 'eval_voc_c4.yaml'
    values = yaml.safe_load(path.read_text())
    args, defaults = script.parser.parse(['-c', str(path)]), script.parser.parse(['--dataset', 'voc'])
    for parsed in (args, defaults):
        script.choose_settings(parsed)
    for name in values:
        if name not in ('anchor_sizes', 'train_proposals', 'test_proposals'):  # defaults of the head
            assert getattr(args, name) == getattr(defaults, name), name
    assert args.min_size == list(range(480, 801, 32)) and args.decay_milestones == [18000, 22000]
    assert (args.lr, args.batch_size, args.iterations) == (0.02, 16, 24000)
    assert (args.warmup_iterations, args.warmup_factor, args.bn_iterations) == (100, 0.001, 200)


@pytest.mark.parametrize('name', ['eval_coco_c4_1x', 'eval_coco_fpn_1x'])
def test_coco_configs_are_the_1x_schedule(name):
    args = script.parser.parse(['-c', str(REPOSITORY / 'configs' / f'{name}.yaml')])
    script.choose_settings(args)
    assert args.masks and args.metric == 'coco' and args.head == name.split('_')[2]
    assert (args.iterations, args.decay_milestones, args.warmup_iterations) == (90000, [60000, 80000], 1000)


@pytest.mark.parametrize('name', ['eval_digits_fpn', 'eval_penn_fudan'])
def test_small_configs_are_read(name):
    script.choose_settings(script.parser.parse(['-c', str(REPOSITORY / 'configs' / f'{name}.yaml')]))


# ---- bad input: one line, exit code 2, nothing trained

@pytest.mark.parametrize('args, named', [
    (['--decay-milestones', '3', '9'], ['--decay-milestones', '9', '--iterations 4']),
    (['--min-size', '64', '128'], ['--min-size 128', '--max-size 96']),
    (['--test-size', '128'], ['--test-size 128', '--max-size 96']),
    (['--metric', 'voc07'], ['--metric voc07', '--dataset voc']),
    (['--bn', 'sync'], ['--bn sync', 'local']),
    (['--head', 'c4', '--model', 'test_vit'], ['--head c4', 'take fpn']),
    (['--anchor-sizes', '8'], ['--anchor-sizes', '5 maps']),
    (['--eval-only', 'missing.safetensors'], ['missing.safetensors', 'No such file']),
    (['--val-images', '10'], ['--val-images 10']),
    (['--train-split', 'night'], ['--train-split night']),
    (['--model', 'resnet_18'], ['--model resnet_18']),
    (['--in-chans', '4'], ['--in-chans 4: detectors take 3 (colour) or 1 (grey)']),
    (['--baseline', 'missing.json'], ['--baseline missing.json', 'No such file']),
])
def test_options_that_do_not_fit_are_refused(streets, tmp_path, capsys, args, named):
    check_refused(capsys, script, [*MODEL, *TINY, *streets, '--output', tmp_path / 'run', *args], *named)
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()


def refused_data(capsys, dataset, data_dir, *args):
    return check_refused(
        capsys, script, [*MODEL, *TINY, '--dataset', dataset, '--data-dir', data_dir, *args[:-1]], *args[-1])


def test_data_that_is_not_there_or_does_not_fit_is_refused(tmp_path, capsys):
    refused_data(capsys, 'voc', tmp_path, ['--train-split', 'Dataset not found'])
    make_voc(tmp_path)
    refused_data(capsys, 'voc', tmp_path, '--train-split', '2031_trainval', ['--train-split 2031_trainval', '2031'])
    refused_data(capsys, 'voc', tmp_path, '--val-split', '2007_best', ['--val-split 2007_best', 'best'])
    refused_data(capsys, 'voc', tmp_path, '--val-split', '2012_trainval', [
        '--val-split 2012_trainval: 1 of its images are trained on', 'c.jpg'])
    refused_data(capsys, 'voc', tmp_path, '--masks', ['--masks', 'have none'])
    write_voc(tmp_path, 2007, 'val', f=[voc_object('horse', 4, 4, 20, 20)])
    refused_data(capsys, 'voc', tmp_path, '--val-split', '2007_val', ['--val-split', 'horse'])
    refused_data(capsys, 'coco', tmp_path, ['instances_train2017.json', 'No such file'])
    content = coco_content()
    write_coco(tmp_path, content, 'train2017')
    refused_data(capsys, 'coco', tmp_path, '--val-split', 'train2017', ['2 of its images are trained on', '7.jpg'])
    content['annotations'][0]['category_id'] = 77
    path = write_coco(tmp_path, content, 'train2017')
    refused_data(capsys, 'coco', tmp_path, [str(path), 'annotation 1', 'category_id 77'])
    write_coco(tmp_path, dict(coco_content(), annotations=[]), 'train2017')
    refused_data(capsys, 'coco', tmp_path, ['--train-split train2017', 'no object'])
    make_masks(tmp_path)
    make_image(tmp_path / 'images' / 'lone.jpg')
    refused_data(capsys, 'masks', tmp_path, [str(tmp_path / 'images' / 'lone.jpg'), 'has no mask'])
    check_refused(capsys, script, [*MODEL, '--dataset', 'coco'], '--data-dir')


def test_pycocotools_that_is_missing_is_named_with_its_extra(streets, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    for data in (streets, ['--dataset', 'voc', '--data-dir', 'nowhere', '--baseline', 'detections.json']):
        check_refused(capsys, script, [*MODEL, *TINY, *data], 'pycocotools', 'timm-cgh[detection]')


def test_resume_of_another_run_is_refused(trained, streets, capsys):
    output, _ = trained
    args = [*MODEL, *TINY, *streets, '--masks', '--output', output]
    check_refused(capsys, script, args, '--output', '--resume auto')
    args += ['--resume', 'auto']
    check_refused(capsys, script, [*args, '--hflip', '0'], '--resume', 'other settings: augmentation')
    check_refused(capsys, script, [*args, '--lr', '1'], '--resume', 'other settings: optimization')


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(streets, capsys):
    args = [*MODEL, *TINY, *streets, '--lr', '1e30', '--warmup-iterations', '0']
    check_refused(capsys, script, args, '--lr', 'not finite')

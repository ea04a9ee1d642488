"""A small backbone evaluated on the digits: what the tests of the evaluation scripts share."""
import json

import timm
import torch

from data_files import write_classes
from script_runner import call_script
from timm_cgh.data import Digits
from timm_cgh.eval import create_eval_loader
from timm_cgh.eval.checkpoint import Recorder
from timm_cgh.models.export import export_backbone

CONFIG = dict(input_size=(1, 16, 16), mean=(0.3,), std=(0.37,), interpolation='bilinear')
CPU = ['--workers', '0', '--device', 'cpu']
DIGITS = ['--dataset', 'digits', '--in-chans', '1', *CPU]


def make_encoder(folder):
    """Export folder of a small backbone whose batch norm statistics are not the initial ones."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=0, in_chans=1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    return export_backbone(model, folder, **CONFIG)


def write_damaged(folder):
    """Folder of splits, 16 and 8 images of two classes, with an unreadable image in each; returns arguments of it."""
    write_classes(folder / 'train', 8)
    write_classes(folder / 'val', 4, first=100)
    (folder / 'train' / 'cat' / '001.png').write_bytes(b'no image')
    path = folder / 'val' / 'dog' / '105.png'
    path.write_bytes(path.read_bytes()[:-100])  # cut short
    return ['--data-dir', folder, '--in-chans', '1', *CPU]


def load_export(folder):
    """The timm model in an export folder."""
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def evaluate(script, encoder, output, *args, data=DIGITS, plots=False):
    """Exit code and results of an evaluation in this process."""
    results = output.parent / f'{output.name}.json'
    code = call_script(
        script, '--model', f'local-dir:{encoder}', *data, '--output', output, '--results-file', results, *args,
        plots=plots)
    return code, json.loads(results.read_text()) if results.exists() else None


def printed_results(stdout):
    """Results that an evaluation printed."""
    return json.loads(stdout.partition('--result\n')[2])


def exported_top1(output):
    """Top-1 in percent, on the validation digits, of the classifier that an evaluation exported."""
    model, digits = load_export(output / 'export'), Digits('validation', 'L')
    (images, labels), = create_eval_loader(digits, CONFIG, batch_size=len(digits))
    with torch.no_grad():
        return 100 * (model(images).argmax(dim=1) == labels).double().mean().item()


def stop_after_saving(monkeypatch):
    """Have the next evaluation that trains stop as if killed, right after it has written its checkpoint."""
    add = Recorder.add

    def add_and_stop(self, row, write, **state):
        add(self, row, write, **state)
        if write:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, 'add', add_and_stop)

"""Results of a run's evaluations, each with its protocol."""
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Union

from timm_cgh.errors import InputError
from timm_cgh.files import read_json

__all__ = ['Result', 'read_knn_checks', 'read_result']


class Result(NamedTuple):
    """An accuracy and how it was measured."""
    name: str  # of the evaluation
    dataset: str  # evaluated on
    top1: float  # percent
    top5: Optional[float]  # percent, None where it was not measured
    protocol: str  # all that a reader needs to repeat the evaluation
    settings: Dict[str, Any]  # the same for programs
    own: bool = True  # of the published weights, not of a baseline or an earlier epoch


_VOTE = (
    'vote of the k nearest neighbours by cosine similarity of frozen features, weighted by '
    'exp(similarity / {temperature:g})')
_LINEAR = (
    'linear classifier on the frozen backbone, {epochs} epochs on %s, learning rate {lr:g} per 256 images{choice}')
_PROTOCOLS = {  # name of the result, how it was measured, and the settings that a program wants
    'knn': ('kNN, k = {k}', _VOTE + '{choice}', ('k', 'temperature')),
    'linear': ('Linear', _LINEAR % 'random crops', ('epochs', 'lr')),
    'linear, cached features': ('Linear', _LINEAR % 'cached features of centre crops', ('epochs', 'lr')),
    'semi-supervised': (
        'Fine-tuned on {percent:g} % of the labels',
        'whole network fine-tuned for {epochs} epochs, learning rate {lr:g}, {lr_head:g} for the classifier',
        ('percent', 'epochs', 'lr', 'lr_head'),
    ),
}
_IMAGES = (
    '; {train_images} labelled training images, {val_images} validation images of {num_classes} classes '
    '(split {val_split}); {img_size} px, {crop:g} % centre crop, {interpolation}')
_BASELINES = {'random': 'random weights', 'pixels': 'raw pixels, at most 32 px'}


def read_knn_checks(
        rows: Sequence[Mapping[str, str]],
        args: Mapping[str, Any],
        dataset: str,
        untrained: Optional[float] = None,
) -> List[Result]:
    """The last kNN check of `train.py` and the one before training (`untrained`, percent); empty for a run without."""
    row = next((row for row in reversed(rows) if row.get('eval_knn')), None)
    if row is None:
        return []
    split = args['val_split'] or 'the validation split, or a fifth of the training images where there is none'
    protocol = (
        f'{_VOTE.format(temperature=0.07)}; the best of k = 10, 20, 100, 200 on the validation images ({split}); '
        f'at most {args["knn_images"]} labelled images each for training and validation')
    epoch = int(row['epoch']) + 1
    settings = dict(epoch=epoch, temperature=0.07, images=args['knn_images'])
    top1, own = float(row['eval_knn']), row is rows[-1]
    results = [Result(f'kNN after epoch {epoch}', dataset, top1, None, protocol, settings, own)]
    if untrained is not None:
        results.append(Result('kNN before training', dataset, untrained, None, 'as above', {}, own=False))
    return results


def _check_model(
        path: Union[str, Path], results: Mapping[str, Any], architecture: str, export: Path, digest: str) -> None:
    """Refuse results that may be another model's: they must be of weights of that digest, or, where none was recorded,
    the last two folders of its path must be those of the export; or they must be a baseline of the same architecture
    (random weights, raw pixels).
    """
    if results.get('digest') == digest:
        return  # wherever the export was then
    model, weights = str(results['model']), results.get('weights', 'its own')
    source, _, folder = model.partition(':')
    parts = Path(folder).parts[-2:]
    paths = (export.absolute(), export.resolve())  # they differ behind a link
    same = source == 'local-dir' and parts and any(path.parts[-len(parts):] == parts for path in paths)
    if weights in _BASELINES and (same or model.split('.')[0] == architecture):
        return
    if not same or weights != 'its own':
        raise InputError(f'{path}: measured on {model} ({weights} weights), must be on local-dir:{export}')
    if 'digest' in results:
        raise InputError(f'{path}: measured on other weights than those in {export}')


def _parse(results: Mapping[str, Any]) -> Result:
    name, text, keys = _PROTOCOLS[results['protocol']]
    choices = f'k = {", ".join(results["knn"])}' if 'knn' in results else len(results.get('heads', ()))
    several = len(results.get('knn', results.get('heads', ()))) > 1
    values = {
        **results,
        'choice': f'; the best of {choices} on the validation images' if several else '',
        'crop': 100 * results['crop_pct'],
    }
    baseline = _BASELINES.get(results.get('weights', ''))
    settings = (*keys, 'train_images', 'val_images', 'num_classes', 'img_size', 'crop_pct')
    return Result(
        name=name.format(**values) + (f', {baseline}' if baseline else ''),
        dataset=str(results['dataset']),
        top1=float(results['top1']),
        top5=None if results.get('top5') is None else float(results['top5']),
        protocol=(text + _IMAGES).format(**values),
        settings={key: results[key] for key in settings},
        own=baseline is None,
    )


def read_result(path: Union[str, Path], architecture: str, export: Path, digest: str) -> Result:
    """The result in a results file (JSON) of an evaluation script.

    Raises:
        InputError: not such a file, or of another model than the architecture in the export folder, whose
            `weights_digest` is `digest`
    """
    try:
        results = read_json(path)
        result = _parse(results)
        _check_model(path, results, architecture, export, digest)
        return result
    except InputError as error:
        raise InputError(f'results={error}') from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of any other shape
        raise InputError(
            f'results={path}: not what eval_knn.py, eval_linear.py or eval_semisup.py write as JSON') from error

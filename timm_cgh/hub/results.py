"""Results of a run's evaluations, each with its protocol."""
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from timm_cgh.errors import InputError

__all__ = ['Result', 'read_knn_checks', 'read_result']


class Result(NamedTuple):
    """An accuracy and how it was measured.

    Args:
        name: of the evaluation
        dataset: evaluated on
        top1, top5: percent; no top5 where it was not measured
        protocol: all that a reader needs to repeat the evaluation
        settings: the same for programs
        own: of the published weights, not of a baseline or an earlier epoch
    """
    name: str
    dataset: str
    top1: float
    top5: Optional[float]
    protocol: str
    settings: Dict[str, Any]
    own: bool = True


_VOTE = 'vote of the k nearest neighbours by cosine similarity of frozen features, weighted by exp(similarity / {:g})'


def read_knn_checks(
        rows: Sequence[Mapping[str, str]],
        args: Mapping[str, Any],
        dataset: str,
        untrained: Optional[float] = None,
) -> List[Result]:
    """The last kNN check of `train.py` and the one before training; empty for a run without.

    Args:
        rows: of `summary.csv`
        args: of `args.yaml`
        dataset: its name
        untrained: accuracy of the backbone before training, percent
    """
    row = next((row for row in reversed(rows) if row.get('eval_knn')), None)
    if row is None:
        return []
    split = args['val_split'] or 'the validation split, or a fifth of the training images where there is none'
    protocol = (
        f'{_VOTE.format(0.07)}; the best of k = 10, 20, 100, 200 on the validation images ({split}); at most '
        f'{args["knn_images"]} labelled images each for training and validation')
    epoch = int(row['epoch']) + 1
    settings = dict(epoch=epoch, temperature=0.07, images=args['knn_images'])
    name = f'kNN after epoch {epoch}'
    results = [Result(name, dataset, float(row['eval_knn']), None, protocol, settings, own=row is rows[-1])]
    if untrained is not None:
        results.append(Result('kNN before training', dataset, untrained, None, 'as above', {}, own=False))
    return results


class _Protocol(NamedTuple):
    name: str
    text: str
    keys: Tuple[str, ...]  # of the evaluation's settings


def _best_of(choices: str) -> str:
    return f'the best of {choices} on the validation images'


def _knn(results: Mapping[str, Any]) -> _Protocol:
    choice = f"; {_best_of('k = ' + ', '.join(results['knn']))}" if len(results['knn']) > 1 else ''
    return _Protocol(f'kNN, k = {results["k"]}', _VOTE.format(results['temperature']) + choice, ('k', 'temperature'))


def _linear(results: Mapping[str, Any]) -> _Protocol:
    views = 'cached features of centre crops' if 'cached' in results['protocol'] else 'random crops'
    rates = len(results['heads'])
    choice = f', {_best_of(str(rates))}' if rates > 1 else ''
    text = (
        f'linear classifier on the frozen backbone, {results["epochs"]} epochs on {views}, learning rate '
        f'{results["lr"]:g} per 256 images{choice}')
    return _Protocol('Linear', text, ('epochs', 'lr'))


def _semisup(results: Mapping[str, Any]) -> _Protocol:
    text = (
        f'whole network fine-tuned for {results["epochs"]} epochs, learning rate {results["lr"]:g}, '
        f'{results["lr_head"]:g} for the classifier')
    name = f'Fine-tuned on {results["percent"]:g} % of the labels'
    return _Protocol(name, text, ('percent', 'epochs', 'lr', 'lr_head'))


_BASELINES = {'random': 'random weights', 'pixels': 'raw pixels'}
_PROTOCOLS = {'knn': _knn, 'linear': _linear, 'linear, cached features': _linear, 'semi-supervised': _semisup}


def _check_model(results: Mapping[str, Any], architecture: str, export: Path) -> None:
    """Refuse results that may be another model's: the last two folders of its path must be those of the export.

    Baselines are accepted for the same architecture: random weights and raw pixels.
    """
    model, weights = str(results['model']), results.get('weights', 'its own')
    source, _, folder = model.partition(':')
    parts = Path(folder).parts[-2:]
    paths = (export.absolute(), export.resolve())  # they differ behind a link
    same = source == 'local-dir' and parts and any(path.parts[-len(parts):] == parts for path in paths)
    if weights in _BASELINES and (same or model.split('.')[0] == architecture):
        return
    if not same or weights != 'its own':
        raise InputError(f'measured on {model} ({weights} weights), must be on local-dir:{export}')


def _parse(results: Mapping[str, Any]) -> Result:
    protocol = _PROTOCOLS[results['protocol']](results)
    baseline = _BASELINES.get(results.get('weights', ''))
    images = (
        f'{results["train_images"]} labelled training images, {results["val_images"]} validation images of '
        f'{results["num_classes"]} classes (split {results.get("val_split", "not recorded")}); '
        f'{results["img_size"]} px, {100 * results["crop_pct"]:g} % centre crop, {results["interpolation"]}')
    keys = (*protocol.keys, 'train_images', 'val_images', 'num_classes', 'img_size', 'crop_pct')
    return Result(
        name=f'{protocol.name}, {baseline}' if baseline else protocol.name,
        dataset=str(results.get('dataset', 'not recorded')),
        top1=float(results['top1']),
        top5=results.get('top5'),
        protocol=f'{protocol.text}; {images}',
        settings={key: results[key] for key in keys},
        own=baseline is None,
    )


def read_result(path: Union[str, Path], architecture: str, export: Path, digest: Optional[str] = None) -> Result:
    """The result in a results file of an evaluation script.

    Args:
        path: JSON file
        architecture, export: of the model to publish, and its folder
        digest: of its weights (`weights_digest`); results of weights that the run had earlier are refused

    Raises:
        InputError: not such a file, or of another model
    """
    try:
        results = json.loads(Path(path).read_text(encoding='utf-8'))
        result = _parse(results)
        _check_model(results, architecture, export)
    except OSError as error:
        raise InputError(f'results={path}: {error.strerror}') from error
    except InputError as error:
        raise InputError(f'results={path}: {error}') from error
    except (KeyError, TypeError, ValueError) as error:  # JSON of any other shape
        raise InputError(
            f'results={path}: not what eval_knn.py, eval_linear.py or eval_semisup.py write as JSON') from error
    if digest and result.own and results.get('digest', digest) != digest:
        raise InputError(f'results={path}: measured on other weights than those in {export}')
    return result

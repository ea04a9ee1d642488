"""The figures of a run, each with the protocol that it was measured by."""
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from timm_cgh.errors import InputError

__all__ = ['Figure', 'monitor_figures', 'read_figure']


class Figure(NamedTuple):
    """An accuracy and how it was measured.

    Args:
        name: of the kind of evaluation
        dataset: judged on
        top1, top5: percent; no top5 where it was not measured
        protocol: all that a reader needs to measure it again
        settings: the same for machines
        own: of the weights in question, not a level to compare with
    """
    name: str
    dataset: str
    top1: float
    top5: Optional[float]
    protocol: str
    settings: Dict[str, Any]
    own: bool = True


_VOTE = 'vote of the k nearest images by cosine similarity of the frozen features, weighted by exp(similarity / {:g})'


def monitor_figures(
        rows: List[Mapping[str, str]],
        args: Mapping[str, Any],
        dataset: str,
        untrained: Optional[float] = None,
) -> List[Figure]:
    """The last kNN check of `train.py`, and the one before training; none where there was none.

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
        f'{_VOTE.format(0.07)}; the best of k = 10, 20, 100, 200 on the judged images; judged on {split}, at most '
        f'{args["knn_images"]} labelled images on either side')
    epoch = int(row['epoch']) + 1
    settings = dict(epoch=epoch, temperature=0.07, images=args['knn_images'])
    name = f'kNN after epoch {epoch}'
    figures = [Figure(name, dataset, float(row['eval_knn']), None, protocol, settings, own=row is rows[-1])]
    if untrained is not None:
        figures.append(Figure('kNN before training', dataset, untrained, None, 'as above', {}, own=False))
    return figures


def _knn(results: Mapping[str, Any]) -> Tuple[str, str, Tuple[str, ...]]:
    """Name, protocol and settings of a result of `eval_knn.py`."""
    choice = f'; the best of k = {", ".join(results["knn"])} on the judged images' if len(results['knn']) > 1 else ''
    return f'kNN, k = {results["k"]}', _VOTE.format(results['temperature']) + choice, ('k', 'temperature')


def _linear(results: Mapping[str, Any]) -> Tuple[str, str, Tuple[str, ...]]:
    """Name, protocol and settings of a result of `eval_linear.py`."""
    views = 'features of centre crops, taken once' if 'cached' in results['protocol'] else 'random crops'
    rates = len(results['heads'])
    choice = f', the best of {rates} on the judged images' if rates > 1 else ''
    protocol = (
        f'linear classifier on the frozen backbone, {results["epochs"]} epochs on {views}, learning rate '
        f'{results["lr"]:g} for 256 images a step{choice}')
    return 'Linear', protocol, ('epochs', 'lr')


def _semisup(results: Mapping[str, Any]) -> Tuple[str, str, Tuple[str, ...]]:
    """Name, protocol and settings of a result of `eval_semisup.py`."""
    protocol = (
        f'the whole network trained for {results["epochs"]} epochs, learning rate {results["lr"]:g}, of the classifier '
        f'{results["lr_head"]:g}')
    return f'Fine-tuned on {results["percent"]:g} % of the labels', protocol, ('percent', 'epochs', 'lr', 'lr_head')


_LEVELS = {'random': 'random weights', 'pixels': 'raw pixels'}  # to compare with
_PROTOCOLS = {'knn': _knn, 'linear': _linear, 'linear, cached features': _linear, 'semi-supervised': _semisup}


def _check_model(results: Mapping[str, Any], architecture: str, export: Path) -> None:
    """Refuse figures that may be another model's: run and export must have the same names, whatever leads there.

    Random weights of the same architecture and raw pixels are welcome, as the levels to compare with.
    """
    model, weights = str(results['model']), results.get('weights', 'its own')
    source, _, folder = model.partition(':')
    parts = Path(folder).parts[-2:]
    ways = (export.absolute(), export.resolve())  # which may differ by a link
    same = source == 'local-dir' and parts and any(way.parts[-len(parts):] == parts for way in ways)
    if weights in _LEVELS and (same or model.split('.')[0] == architecture):
        return
    if not same or weights != 'its own':
        raise InputError(f'measured on {model} ({weights} weights); must be by --model local-dir:{export}')


def read_figure(path: Union[str, Path], architecture: str, export: Path, digest: Optional[str] = None) -> Figure:
    """The figure in a `--results-file` of an evaluation script.

    Args:
        path: JSON file
        architecture, export: what is published, and its folder
        digest: of its weights (`weights_digest`): figures of others, which a run had before it went on, are refused

    Raises:
        InputError: not such a file, or of another model
    """
    try:
        results = json.loads(Path(path).read_text(encoding='utf-8'))
        _check_model(results, architecture, export)
        level = _LEVELS.get(results.get('weights'))
        if digest and not level and results.get('digest', digest) != digest:
            raise InputError(f'measured on other weights than those that are in {export} now')
        name, protocol, keys = _PROTOCOLS[results['protocol']](results)
        images = (
            f'{results["train_images"]} labelled images to learn from, {results["val_images"]} of '
            f'{results["num_classes"]} classes to judge by (split {results.get("val_split", "not recorded")}); '
            f'{results["img_size"]} px, {100 * results["crop_pct"]:g} % centre crop, {results["interpolation"]}')
        keys += ('train_images', 'val_images', 'num_classes', 'img_size', 'crop_pct')
        return Figure(
            f'{name}, {level}' if level else name,
            str(results.get('dataset', 'not recorded')),
            float(results['top1']),
            results.get('top5'),
            f'{protocol}; {images}',
            {key: results[key] for key in keys},
            level is None,
        )
    except InputError as error:
        raise InputError(f'--results {path}: {error}') from error
    except OSError as error:
        raise InputError(f'--results {path}: {error.strerror}') from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f'--results {path}: not what eval_knn.py, eval_linear.py or eval_semisup.py write as JSON') from error

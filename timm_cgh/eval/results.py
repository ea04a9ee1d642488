"""Results of an evaluation: what was evaluated on what, printed and written as JSON or CSV."""
import json
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

from timm_cgh.data import data_name
from timm_cgh.errors import checking, redact
from timm_cgh.files import atomic_write, write_csv

from .backbone import Backbone
from .loader import eval_crop_pct

__all__ = ['describe_accuracy', 'describe_images', 'describe_model', 'write_results']


def describe_model(backbone: Backbone, dataset: str, data_dir: Optional[str], val_split: str) -> Dict[str, Any]:
    """First entries of every result: the model, its weights and the data that it is evaluated on."""
    return dict(
        model=backbone.name,
        weights=backbone.weights,
        digest=backbone.digest,
        dataset=data_name(dataset, data_dir),
        val_split=redact(val_split),
    )


def describe_accuracy(*top: float) -> Dict[str, float]:
    """Top-1, and top-5 where it is given, with their errors, in percent."""
    accuracy = {}
    for name, value in zip(('top1', 'top5'), top):
        accuracy.update({name: round(value, 4), f'{name}_err': round(100 - value, 4)})
    return accuracy


def describe_images(
        data_config: Mapping[str, Any],
        num_classes: int,
        train: Tuple[int, int],
        val: Tuple[int, int],
) -> Dict[str, Any]:
    """Entries about the images: how many were used, of how many, and how those of validation are prepared."""
    size = min(data_config['input_size'][1:])
    return dict(
        num_classes=num_classes,
        train_images=train[0],
        val_images=val[0],
        train_unreadable=train[1] - train[0],
        val_unreadable=val[1] - val[0],
        img_size=size,
        crop_pct=eval_crop_pct(size),
        interpolation=data_config['interpolation'],
    )


def _flatten(values: Mapping[str, Any], prefix: str = '') -> Iterator[Tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f'{prefix}{name}_')
        else:
            yield f'{prefix}{name}', value


def write_results(results: Mapping[str, Any], results_file: Optional[str] = None) -> None:
    """Print results as timm's validate.py does, and write them to a file.

    Args:
        results: values by name; nested ones become columns `outer_inner` of a CSV file
        results_file: `.json` or `.csv`
    """
    text = json.dumps(results, indent=4)
    print(f'--result\n{text}', flush=True)
    if not results_file:
        return
    with checking('results_file', results_file, OSError):
        if results_file.endswith('.csv'):
            row = dict(_flatten(results))
            write_csv(results_file, list(row), [list(row.values())])
        else:
            with atomic_write(results_file) as file:
                file.write(f'{text}\n')

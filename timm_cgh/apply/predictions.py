"""Predictions of a classifier: the most probable classes of each image, by name."""
import json
from itertools import chain
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import timm
import torch
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset

from timm_cgh.errors import InputError, checking
from timm_cgh.files import atomic_write, write_csv
from timm_cgh.models.backbone import ImageSize, check_model, create_backbone, resolve_data_config

__all__ = ['ENDINGS', 'Classifier', 'TopClasses', 'load_classifier', 'write_predictions']

ENDINGS = '.csv', '.json', '.jsonl'


class Classifier(NamedTuple):
    """model: timm's, in eval mode, on the CPU; data_config: see `create_eval_loader`; names: of the classes."""
    model: nn.Module
    data_config: Dict[str, Any]
    names: List[str]


def _class_names(model: nn.Module) -> List[str]:
    """From the model's configuration, those of ImageNet for as many classes, or numbers."""
    cfg, count = model.pretrained_cfg, model.num_classes
    names = cfg.get('label_names')
    if names and len(names) == count:
        return [str(name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(count)]
    return [str(number) for number in range(count)]


def load_classifier(model: str, img_size: Optional[ImageSize] = None) -> Classifier:
    """A timm model with its classifier: a stock one with weights, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.

    Args:
        model: its name
        img_size: side, px, or (H, W); default the model's

    Raises:
        InputError: no such model, or one without classifier
    """
    check_model(model)
    if ':' not in model and not timm.is_model_pretrained(model):
        raise InputError(f'model={model}: timm has no weights for it; give local-dir:OUTPUT/export of `finetune`')
    with checking('model', model, AssertionError, OSError, RuntimeError, TypeError, ValueError):
        net = create_backbone(model, img_size=img_size, pretrained=True, num_classes=None).eval()
    if not net.num_classes:
        raise InputError(f'model={model}: has no classifier; fine-tune it first')
    data_config = resolve_data_config(net.pretrained_cfg, img_size=img_size)
    if img_size is None:  # the crop that the classifier was trained for, where evaluations take the paper's
        data_config.update({k: v for k, v in net.pretrained_cfg.items() if k in ('crop_pct', 'crop_mode') and v})
    return Classifier(net, data_config, _class_names(net))


class TopClasses(nn.Module):
    """(B, C, H, W) images -> (B, 2 k) probabilities of the k most probable classes and their numbers."""

    def __init__(self, model: nn.Module, k: int):
        super().__init__()
        self.model, self.k = model, k

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        top = self.model(images).float().softmax(dim=1).topk(self.k, dim=1)
        return torch.cat([top.values, top.indices.float()], dim=1)


def write_predictions(output: str, names: Sequence[str], outputs: torch.Tensor, classes: Sequence[str]) -> None:
    """Write predictions as CSV, or as JSON (a list, or a line per image in `.jsonl`).

    Args:
        output: file
        names: of the images
        outputs: (N, 2 k) of `TopClasses`
        classes: names of the classes

    Raises:
        InputError: it cannot be written
    """
    probabilities, numbers = outputs.double().chunk(2, dim=1)
    rows = [
        [(classes[int(number)], round(probability, 6)) for number, probability in zip(*pair)]
        for pair in zip(numbers.tolist(), probabilities.tolist())]
    with checking('output', output, OSError):
        if output.endswith('.csv'):
            places = range(1, numbers.shape[1] + 1)
            header = ['file_name', *(f'{of}_{place}' for place in places for of in ('class', 'probability'))]
            write_csv(output, header, ([name, *chain(*row)] for name, row in zip(names, rows)))
            return
        items = [
            dict(file_name=name, predictions=[dict(zip(('class', 'probability'), pair)) for pair in row])
            for name, row in zip(names, rows)]
        with atomic_write(output) as file:
            if output.endswith('.json'):
                json.dump(items, file, indent=1, ensure_ascii=False)
            else:
                file.writelines(f'{json.dumps(item, ensure_ascii=False)}\n' for item in items)

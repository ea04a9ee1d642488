"""The model card of published weights: recipe, results, how to load them, limitations (text in `model_card.md`)."""
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import timm
import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_cgh.download import HUB_PREFIX, redact_token
from timm_cgh.errors import InputError

from .convert import as_torchvision
from .results import Result

__all__ = ['PAPER', 'Facts', 'model_card']

PAPER = 'Self-Supervised Representation Learning with Cross-Context Learning between Global and Hypercolumn Features'
_CONTEXTS = {
    'cross': 'cross: each context learns the relations of the other (CGH)',
    'same': 'same: each context learns its own relations (Tab. 5)',
    'global': 'global: no hypercolumn (ReSSL, Tab. 5)',
}
_OTHER_OPTIONS = (  # without a row of their own
    'relation_weight', 'contrast_temp', 'hyper_norm', 'shuffle_bn', 'bn_splits', 'sync_bn', 'weak_scale', 'momentum',
    'opt_eps', 'opt_betas', 'opt_args', 'no_decay_norm_bias', 'warmup_lr', 'min_lr', 'decay_epochs', 'clip_grad',
    'clip_mode', 'features_only', 'method_kwargs',
)


class Facts(NamedTuple):
    """What a card is written from."""
    repo_id: str  # `owner/name`
    revision: Optional[str]  # branch, None for main
    config: Dict[str, Any]  # the `config.json`
    args: Mapping[str, Any]  # the run's `args.yaml`, with the settled defaults of `resolved.yaml` if there is one
    epochs: int  # that the run has completed
    processes: Optional[int]  # that it ran on, None if unknown
    dataset: str  # name of the training images
    results: List[Result]  # of evaluations
    model: nn.Module  # timm's, with the weights
    sha256: str  # of `model.safetensors`
    float16: bool  # the file is in half precision
    task: bool  # the training state is published as well
    code: Optional[str]  # `owner/repository` on GitHub, None if unknown

    @property
    def architecture(self) -> str:
        return self.config['architecture']


def _fits_torchvision(model: nn.Module) -> bool:
    try:
        as_torchvision(model)
    except InputError:
        return False
    return True


def _metadata(facts: Facts) -> ModelCardData:
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=result.dataset.lower(),
            dataset_name=result.dataset,
            metric_type='accuracy',
            metric_value=round(value, 4),
            metric_name=f'{result.name}, {top}',
            metric_args=result.settings,
        )
        for result in facts.results if result.own
        for top, value in (('top-1', result.top1), ('top-5', result.top5)) if value is not None
    ]
    return ModelCardData(
        license=facts.config['pretrained_cfg']['license'],
        library_name='timm',
        pipeline_tag='image-feature-extraction',
        tags=['timm', 'image-feature-extraction', 'self-supervised', 'cgh', facts.architecture],
        datasets=[facts.dataset.lower()],
        metrics=['accuracy'] if results else None,
        model_name=facts.repo_id.split('/')[-1] if results else None,
        eval_results=results or None,
    )


def model_card(facts: Facts) -> ModelCard:
    """The card of published weights: metadata and text."""
    cfg = facts.config['pretrained_cfg']
    card = ModelCard.from_template(
        _metadata(facts),
        template_path=str(Path(__file__).with_name('model_card.md')),
        **facts._asdict(),
        architecture=facts.architecture,
        cell=lambda value: str(value).replace('|', '\\|'),  # of a Markdown table
        cfg=cfg,
        contexts=_CONTEXTS,
        hub_name=HUB_PREFIX + facts.repo_id + (f'@{facts.revision}' if facts.revision else ''),
        img_size=' x '.join(map(str, cfg['input_size'][1:])),
        other_options=_OTHER_OPTIONS,
        paper=PAPER,
        stock=timm.models.model_entrypoint(facts.architecture).__module__.startswith('timm.'),
        torchvision=_fits_torchvision(facts.model),
    )
    return ModelCard(redact_token(str(card)))

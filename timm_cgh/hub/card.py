"""The model card: what a stranger must know about weights to use them, and what not to expect of them."""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_cgh.download import redact

from .figures import Figure

__all__ = ['Facts', 'model_card']

PAPER = 'Self-Supervised Representation Learning with Cross-Context Learning between Global and Hypercolumn Features'
_CITATION = f'''@inproceedings{{gao2024cgh,
  title     = {{{PAPER}}},
  author    = {{Gao, Zheng and Feng, Chen and Patras, Ioannis}},
  booktitle = {{IEEE/CVF Winter Conference on Applications of Computer Vision (WACV)}},
  year      = {{2024}}
}}'''
_CONTEXTS = {
    'cross': 'cross: each context learns the relations that the other sees (CGH)',
    'same': 'same: each context learns its own relations (Tab. 5)',
    'global': 'global: no hypercolumn (ReSSL, Tab. 5)',
}
_FURTHER = (  # options without a row of their own
    'relation_weight', 'contrast_temp', 'hyper_norm', 'shuffle_bn', 'bn_splits', 'sync_bn', 'weak_scale', 'momentum',
    'opt_eps', 'opt_betas', 'opt_args', 'no_decay_norm_bias', 'warmup_lr', 'min_lr', 'decay_epochs', 'clip_grad',
    'clip_mode', 'features_only', 'method_kwargs',
)
_DATA = {'digits': "digits, scikit-learn's 1,797 handwritten digits of 8 x 8 px"}


class Facts(NamedTuple):
    """What a card is written from.

    Args:
        repo_id: `owner/name`
        revision: branch, None for main
        config: the `config.json`
        args: the run's `args.yaml`
        epochs: that the run has completed
        processes: that it ran on, None unknown
        dataset: name of the training images
        figures: what was measured
        num_features: width of the pooled feature
        sha256: of `model.safetensors`
        float16: the file is in half precision
        stock: timm knows the architecture without this package
        torchvision: torchvision's ResNet of that name takes the weights
        task: the state of the pre-training is there as well
        license: its identifier on the Hub
        code: `owner/repository` on GitHub, None unknown
    """
    repo_id: str
    revision: Optional[str]
    config: Dict[str, Any]
    args: Dict[str, Any]
    epochs: int
    processes: Optional[int]
    dataset: str
    figures: List[Figure]
    num_features: int
    sha256: str
    float16: bool
    stock: bool
    torchvision: bool
    task: bool
    license: str
    code: Optional[str]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace('|', '\\|') for cell in row] for row in (head, ['---'] * len(head), *rows)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def _code(language: str, lines: Sequence[str]) -> str:
    return '\n'.join((f'```{language}', *lines, '```'))


def _recipe(facts: Facts) -> List[Tuple[str, str]]:
    """What was set, in the words of the options (and of the paper's sections behind them)."""
    args, config = facts.args, facts.config['pretrained_cfg']

    def of(name: str, otherwise: str) -> Any:
        return otherwise if args.get(name) is None else args[name]

    size = ' x '.join(map(str, config['input_size'][1:]))
    more = {**args['model_kwargs'], **({'drop_path_rate': args['drop_path']} if args['drop_path'] else {})}
    start = 'random weights'
    if args['pretrained'] or args['initial_checkpoint']:
        start = 'the weights of a checkpoint' if args['initial_checkpoint'] else "timm's pretrained weights"
    temps = f'student {args["temp_student"]}, teacher {args["temp_teacher"]}, hypercolumn {args["temp_hyper"]}'
    if args['temp_hyper_teacher'] is not None:
        temps += f' (its teacher {args["temp_hyper_teacher"]})'
    crops = '' if args.get('multi_crop') is None else f'; multi-crop, sizes {args["multi_crop"] or "1 to 3/7 of these"}'
    method = args.get('method', 'cgh')
    context = _CONTEXTS[args['context']] if method == 'cgh' else f'global, by the method {method} in place of CGH'
    auto = 'automatic (at most 5, at most a quarter of the run)'
    of_cgh = [
        ('InfoNCE epochs', of('contrast_warmup_epochs', 'none' if args['context'] == 'global' else auto)),
        ('Temperatures', temps),
        ('Hypercolumn stages', of('out_indices', 'the last two, of one resolution evenly spaced ones')),
    ]
    further = ', '.join(name if args[name] is True else f'{name} {args[name]}' for name in _FURTHER if args.get(name))
    root = 'sqrt' if args.get('lr_base_scale') == 'sqrt' else ''
    bank = ('Memory bank', of('bank_size', 'an eighth of the images, as a power of two, at most 131072'))
    return [
        ('Architecture', ', '.join((facts.config['architecture'], *map('{0[0]}={0[1]}'.format, more.items())))),
        ('Images', f'{facts.dataset}, {size} px, mean {config["mean"]}, std {config["std"]}'),
        ('Start', start),
        ('Context', context + (', with predictors' if args['predictor'] else '')),
        ('Epochs', f'{facts.epochs} of {args["epochs"]}'),
        ('Batch size', f'{args["batch_size"]} x {facts.processes or "an unknown number of"} processes'),
        ('Accumulated batches', args['grad_accum_steps']),
        ('Optimiser', f'{args["opt"]}, weight decay {args["weight_decay"]}, {args["sched"]} schedule'),
        ('Learning rate', of('lr', f'{args["lr_base"]} x {root}(global batch / {args["lr_base_size"]})')),
        ('Warm-up epochs', of('warmup_epochs', auto)),
        *([('Teacher momentum', args['momentum_teacher'])] if method in ('cgh', 'moco', 'byol', 'dino') else []),
        *(of_cgh if method == 'cgh' else []),
        *([bank] if method in ('cgh', 'moco', 'nnclr') else []),
        ('Heads', f'hidden width {args["hidden_dim"]}, embeddings {args["embed_dim"]}'),
        ('Crops', f'area {args["scale"]}, ratio {[round(r, 3) for r in args["ratio"]]}, flip {args["hflip"]}{crops}'),
        ('Jitter', f'{args["color_jitter"]} with probability {args["color_jitter_prob"]}'),
        ('Grey, blur', f'probability {args["grayscale_prob"]}, {args["gaussian_blur_prob"]}'),
        ('Precision', args['amp_dtype'] if args['amp'] else 'float32'),
        ('Seed', args['seed']),
        ('Further', further),
    ]


def _loading(facts: Facts) -> str:
    """Every door, as code to copy."""
    architecture = facts.config['architecture']
    name = f'hf-hub:{facts.repo_id}' + (f'@{facts.revision}' if facts.revision else '')
    branch = f', revision={facts.revision!r}' if facts.revision else ''
    mode = 'L' if facts.config['pretrained_cfg']['input_size'][0] == 1 else 'RGB'
    parts = [
        'timm, without any other package:' if facts.stock else f'timm, and `timm_cgh`, which registers {architecture}:',
        _code('python', [
            'import timm' if facts.stock else 'import timm, timm_cgh',
            f"model = timm.create_model('{name}', pretrained=True).eval()",
            'config = timm.data.resolve_model_data_config(model)',
            'transform = timm.data.create_transform(**config, is_training=False)',
            f"features = model(transform(image.convert('{mode}')).unsqueeze(0))  # (1, {facts.num_features})",
        ]),
        'torch.hub (`num_classes`, `in_chans`, `features_only` and what else timm takes pass through):',
        _code('python', [
            'import torch',
            f"model = torch.hub.load('{facts.code or '<owner>/timm-cgh'}', 'cgh', checkpoint='{name}').eval()",
        ]),
    ]
    if facts.torchvision:
        parts += ["torchvision's ResNet, where the tensors have the same names:", _code('python', [
            'import torch, torchvision',
            'from huggingface_hub import hf_hub_download',
            'from safetensors.torch import load_file',
            f'model = torchvision.models.{architecture}()',
            'model.fc = torch.nn.Identity()',
            f"model.load_state_dict(load_file(hf_hub_download('{facts.repo_id}', 'model.safetensors'{branch})))",
        ])]
    parts += ['Other programs:', _code('bash', [
        f'python -m timm_cgh.hub convert {name} --to {to}' for to in (
            *(['detectron2 --output model.pth'] if facts.torchvision else []), 'onnx --output model.onnx')
    ])]
    if facts.task:
        parts += ['Continued pre-training, from the heads, teacher, memory banks and optimiser in `task.safetensors`:']
        data = '' if facts.args['dataset'] == 'digits' else ' --data-dir images/'
        parts += [_code('bash', [
            f'hf download {facts.repo_id} args.yaml --local-dir .' + (branch and f' --revision {facts.revision}'),
            f'python train.py --config args.yaml{data} --epochs {2 * facts.args["epochs"]} --resume {name}',
        ])]
    return '\n\n'.join(parts)


def _limits(facts: Facts) -> List[str]:
    """What the weights are not."""
    size = ' x '.join(map(str, facts.config['pretrained_cfg']['input_size'][1:]))
    lines = [
        "Not the authors' weights, and no reproduction of the paper's figures: another implementation, trained by the "
        'recipe below.',
        'No classifier: the output is a feature. Whatever is to be recognised needs a head, and labels for it.',
        f'Not for any image: trained on {facts.dataset} at {size} px, normalised as in `config.json`. The figures '
        'promise nothing for other images, sizes and normalisations.',
        'Not examined for bias, nor for safety in any use: what is one-sided in the images is so in the features.',
    ]
    if facts.figures:
        lines.append('No fair competition: a k or a learning rate that is the best of several was chosen on the judged '
                     'images, so its figure is optimistic.')
    if facts.epochs < facts.args['epochs']:
        lines.append(f'No finished run: {facts.epochs} of {facts.args["epochs"]} epochs.')
    if facts.float16:
        lines.append('Not in the precision of the run: the file is float16, and was rounded after the run.')
    if facts.args['features_only']:
        lines.append('Not trained throughout: layers behind the last map, where the architecture has any, keep their '
                     'initial values (`--features-only`).')
    return lines


def _metadata(facts: Facts) -> ModelCardData:
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=figure.dataset.lower(),
            dataset_name=figure.dataset,
            metric_type='accuracy',
            metric_value=round(value, 4),
            metric_name=f'{figure.name}, {top}',
            metric_args=figure.settings,
        )
        for figure in facts.figures if figure.own
        for top, value in (('top-1', figure.top1), ('top-5', figure.top5)) if value is not None
    ]
    return ModelCardData(
        license=facts.license,
        library_name='timm',
        pipeline_tag='image-feature-extraction',
        tags=['timm', 'image-feature-extraction', 'self-supervised', 'cgh', facts.config['architecture']],
        datasets=[facts.dataset.lower()],
        metrics=['accuracy'] if results else None,
        model_name=facts.repo_id.split('/')[-1] if results else None,
        eval_results=results or None,
    )


def model_card(facts: Facts) -> ModelCard:
    """The card of published weights, metadata and text.

    Raises:
        ValueError: metadata that the Hub's own classes refuse
    """
    name = facts.repo_id.split('/')[-1]
    code = f'[timm-cgh](https://github.com/{facts.code})' if facts.code else 'timm-cgh'
    sections = {
        f'# {name}': (
            f'{facts.config["architecture"]} of [timm](https://github.com/huggingface/pytorch-image-models), trained '
            f'without labels on {_DATA.get(facts.dataset, facts.dataset)}, with {code}, an implementation of CGH: '
            'cross-context learning between global and hypercolumn features (Gao, Feng and Patras, WACV 2024).'),
        '## Figures': _table(
            ('Evaluation', 'Data', 'Top-1 %', 'Top-5 %', 'Protocol'),
            [(f.name, f.dataset, f'{f.top1:.2f}', '' if f.top5 is None else f'{f.top5:.2f}', f.protocol)
             for f in facts.figures],
        ) if facts.figures else 'None was measured.',
        '## Loading': _loading(facts),
        '## What these weights are not': '\n'.join(f'- {line}' for line in _limits(facts)),
        '## Recipe': _table(('Setting', 'Value'), _recipe(facts)),
        '## File': f'`model.safetensors`, SHA-256 `{facts.sha256}`',
        '## Citation': _code('bibtex', [_CITATION]),
    }
    body = '\n\n'.join(f'{head}\n\n{text}' for head, text in sections.items())
    return ModelCard(redact(f'---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n'))

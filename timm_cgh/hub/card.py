"""The model card of published weights: recipe, results, how to load them, limitations."""
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_cgh.download import redact

from .results import Result

__all__ = ['PAPER', 'Facts', 'model_card']

PAPER = 'Self-Supervised Representation Learning with Cross-Context Learning between Global and Hypercolumn Features'
_CITATION = f"""@inproceedings{{gao2024cgh,
  title     = {{{PAPER}}},
  author    = {{Gao, Zheng and Feng, Chen and Patras, Ioannis}},
  booktitle = {{IEEE/CVF Winter Conference on Applications of Computer Vision (WACV)}},
  year      = {{2024}}
}}"""
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
_DATASETS = {'digits': "scikit-learn's digits (1,797 handwritten digits of 8 x 8 px)"}


class Facts(NamedTuple):
    """What a card is written from.

    Args:
        repo_id: `owner/name`
        revision: branch, None for main
        config: the `config.json`
        args: the run's `args.yaml`
        epochs: that the run has completed
        processes: that it ran on, None if unknown
        dataset: name of the training images
        results: of evaluations
        num_features: width of the pooled feature
        sha256: of `model.safetensors`
        float16: the file is in half precision
        stock: timm has the architecture without this package
        torchvision: torchvision's ResNet of that name takes the weights
        task: the training state is published as well
        license: identifier on the Hub
        code: `owner/repository` on GitHub, None if unknown
    """
    repo_id: str
    revision: Optional[str]
    config: Dict[str, Any]
    args: Mapping[str, Any]
    epochs: int
    processes: Optional[int]
    dataset: str
    results: List[Result]
    num_features: int
    sha256: str
    float16: bool
    stock: bool
    torchvision: bool
    task: bool
    license: str
    code: Optional[str]

    @property
    def architecture(self) -> str:
        return self.config['architecture']

    @property
    def img_size(self) -> str:
        return ' x '.join(map(str, self.config['pretrained_cfg']['input_size'][1:]))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace('|', '\\|') for cell in row] for row in (head, ['---'] * len(head), *rows)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def _code(language: str, lines: Sequence[str]) -> str:
    return '\n'.join((f'```{language}', *lines, '```'))


def _method_rows(args: Mapping[str, Any]) -> List[Tuple[str, Any]]:
    """Settings of the method, as far as it has them."""
    method = args.get('method', 'cgh')
    rows = []
    if method in ('cgh', 'moco', 'byol', 'dino'):
        rows.append(('Teacher momentum', args['momentum_teacher']))
    if method == 'cgh':
        warmup = args['contrast_warmup_epochs']
        if warmup is None:
            warmup = 'none' if args['context'] == 'global' else 'automatic (5, at most a quarter of the run)'
        temps = f'student {args["temp_student"]}, teacher {args["temp_teacher"]}, hypercolumn {args["temp_hyper"]}'
        if args['temp_hyper_teacher'] is not None:
            temps += f' (of the teacher {args["temp_hyper_teacher"]})'
        stages = args['out_indices'] or 'the last two; four evenly spaced ones if all have the same resolution'
        rows += [('InfoNCE warm-up epochs', warmup), ('Temperatures', temps), ('Hypercolumn stages', stages)]
    if method in ('cgh', 'moco', 'nnclr'):
        bank = args['bank_size'] or 'the power of two at or below an eighth of the images, at most 131072'
        rows.append(('Memory bank', bank))
    return rows


def _recipe(facts: Facts) -> List[Tuple[str, Any]]:
    """The settings of the run."""
    args, config = facts.args, facts.config['pretrained_cfg']
    model_kwargs = {**args['model_kwargs'], **({'drop_path_rate': args['drop_path']} if args['drop_path'] else {})}
    initial = 'random'
    if args['pretrained'] or args['initial_checkpoint']:
        initial = 'from a checkpoint' if args['initial_checkpoint'] else "timm's pretrained weights"
    method = args.get('method', 'cgh')
    context = _CONTEXTS[args['context']] if method == 'cgh' else f'global, trained by {method} instead of CGH'
    root = 'sqrt' if args.get('lr_base_scale') == 'sqrt' else ''
    lr = f'{args["lr_base"]} x {root}(global batch / {args["lr_base_size"]})' if args['lr'] is None else args['lr']
    warmup = 'automatic (5, at most a quarter of the run)' if args['warmup_epochs'] is None else args['warmup_epochs']
    crops = f'area {args["scale"]}, ratio {[round(r, 3) for r in args["ratio"]]}, flip {args["hflip"]}'
    if args.get('multi_crop') is not None:
        crops += f'; multi-crop, sizes {args["multi_crop"] or "1 to 3/7 of the full size"}'
    other = [n if args[n] is True else f'{n} {args[n]}' for n in _OTHER_OPTIONS if args.get(n)]
    return [
        ('Architecture', ', '.join((facts.architecture, *map('{0[0]}={0[1]}'.format, model_kwargs.items())))),
        ('Images', f'{facts.dataset}, {facts.img_size} px, mean {config["mean"]}, std {config["std"]}'),
        ('Initial weights', initial),
        ('Context', context + (', with predictors' if args['predictor'] else '')),
        ('Epochs', f'{facts.epochs} of {args["epochs"]}'),
        ('Batch size', f'{args["batch_size"]} x {facts.processes or "an unknown number of"} processes'),
        ('Gradient accumulation', args['grad_accum_steps']),
        ('Optimiser', f'{args["opt"]}, weight decay {args["weight_decay"]}, {args["sched"]} schedule'),
        ('Learning rate', lr),
        ('Warm-up epochs', warmup),
        *_method_rows(args),
        ('Heads', f'hidden width {args["hidden_dim"]}, embeddings {args["embed_dim"]}'),
        ('Crops', crops),
        ('Colour jitter', f'{args["color_jitter"]} with probability {args["color_jitter_prob"]}'),
        ('Greyscale, blur', f'probability {args["grayscale_prob"]}, {args["gaussian_blur_prob"]}'),
        ('Precision', args['amp_dtype'] if args['amp'] else 'float32'),
        ('Seed', args['seed']),
        ('Other options', ', '.join(other)),
    ]


def _usage(facts: Facts) -> str:
    """Code to copy for each way to load the weights."""
    name = f'hf-hub:{facts.repo_id}' + (f'@{facts.revision}' if facts.revision else '')
    mode = 'L' if facts.config['pretrained_cfg']['input_size'][0] == 1 else 'RGB'
    parts = [
        'timm:' if facts.stock else f'timm, with `timm_cgh`, which registers {facts.architecture}:',
        _code('python', [
            'import timm' if facts.stock else 'import timm, timm_cgh',
            f"model = timm.create_model('{name}', pretrained=True).eval()",
            'config = timm.data.resolve_model_data_config(model)',
            'transform = timm.data.create_transform(**config, is_training=False)',
            f"features = model(transform(image.convert('{mode}')).unsqueeze(0))  # (1, {facts.num_features})",
        ]),
        "torch.hub (also takes timm's `num_classes`, `in_chans`, `features_only`, ...):",
        _code('python', [
            'import torch',
            f"model = torch.hub.load('{facts.code or '<owner>/timm-cgh'}', 'cgh', checkpoint='{name}').eval()",
        ]),
    ]
    if facts.torchvision:
        branch = f', revision={facts.revision!r}' if facts.revision else ''
        parts += ["torchvision's ResNet, which has the same tensor names:", _code('python', [
            'import torch, torchvision',
            'from huggingface_hub import hf_hub_download',
            'from safetensors.torch import load_file',
            f'model = torchvision.models.{facts.architecture}()',
            'model.fc = torch.nn.Identity()',
            f"model.load_state_dict(load_file(hf_hub_download('{facts.repo_id}', 'model.safetensors'{branch})))",
        ])]
    formats = ['detectron2 --output model.pth'] if facts.torchvision else []
    formats.append('onnx --output model.onnx')
    parts += ['Other formats, with the scripts of timm-cgh:', _code('bash', [
        f'python convert.py {name} --to {to}' for to in formats])]
    if facts.task:
        branch = f' --revision {facts.revision}' if facts.revision else ''
        data = '' if facts.args['dataset'] == 'digits' else ' --data-dir images/'
        parts += ['Continued pre-training, from the heads, teacher, memory banks and optimiser in `task.safetensors`:']
        parts += [_code('bash', [
            f'hf download {facts.repo_id} args.yaml --local-dir .{branch}',
            f'python train.py --config args.yaml{data} --epochs {2 * facts.args["epochs"]} --resume {name}',
        ])]
    return '\n\n'.join(parts)


def _limitations(facts: Facts) -> List[str]:
    lines = [
        "These are not the authors' weights and do not reproduce the paper's results: they come from an independent "
        'implementation, trained with the recipe below.',
        'There is no classifier: the output is a feature vector. Recognition tasks need a head trained on labels.',
        f'The model was trained on {facts.dataset} at {facts.img_size} px, normalised as in `config.json`. The results '
        'say nothing about other images, sizes or normalisations.',
        'The model has not been tested for bias or for safety in any application; biases of the training images carry '
        'over to the features.',
    ]
    if facts.results:
        lines.append('Where k or the learning rate is the best of several, it was chosen on the validation images, '
                     'which makes that result optimistic.')
    if facts.epochs < facts.args['epochs']:
        lines.append(f'Training is not finished: {facts.epochs} of {facts.args["epochs"]} epochs.')
    if facts.float16:
        lines.append('The file is float16, rounded from float32 after training.')
    if facts.args['features_only']:
        lines.append('Layers behind the last feature map, where the architecture has any, are untrained '
                     '(`features_only`).')
    return lines


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
        license=facts.license,
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
    code = f'[timm-cgh](https://github.com/{facts.code})' if facts.code else 'timm-cgh'
    sections = {
        f"# {facts.repo_id.split('/')[-1]}": (
            f'{facts.architecture} of [timm](https://github.com/huggingface/pytorch-image-models), trained without '
            f'labels on {_DATASETS.get(facts.dataset, facts.dataset)} with {code}, an implementation of CGH: '
            'cross-context learning between global and hypercolumn features (Gao, Feng and Patras, WACV 2024).'),
        '## Results': _table(
            ('Evaluation', 'Data', 'Top-1 %', 'Top-5 %', 'Protocol'),
            [(r.name, r.dataset, f'{r.top1:.2f}', '' if r.top5 is None else f'{r.top5:.2f}', r.protocol)
             for r in facts.results],
        ) if facts.results else 'None.',
        '## Usage': _usage(facts),
        '## Limitations': '\n'.join(f'- {line}' for line in _limitations(facts)),
        '## Recipe': _table(('Setting', 'Value'), _recipe(facts)),
        '## File': f'`model.safetensors`, SHA-256 `{facts.sha256}`',
        '## Citation': _code('bibtex', [_CITATION]),
    }
    body = '\n\n'.join(f'{head}\n\n{text}' for head, text in sections.items())
    return ModelCard(redact(f'---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n'))

"""A run's export as a repository on the Hugging Face Hub: the folder first, then one commit."""
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import timm
import torch
import torch.nn as nn
import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file

from timm_cgh.data import data_name
from timm_cgh.download import hub_reason, redact
from timm_cgh.errors import InputError, blame
from timm_cgh.files import atomic_path, atomic_write
from timm_cgh.models.weights import check_folder, load_folder, weights_digest
from timm_cgh.summary import epochs_done, read_rows

from .card import PAPER, Facts, model_card
from .convert import as_torchvision
from .figures import monitor_figures, read_figure

__all__ = ['check_repo_id', 'portable_args', 'read_args', 'table_row', 'upload', 'write_folder']

# of args.yaml, what is true of one machine or one start alone
_OF_THE_MACHINE = (
    'config', 'data_dir', 'output', 'experiment', 'resume', 'initial_checkpoint', 'workers', 'no_pin_mem', 'device',
    'dataset_download', 'class_map', 'log_wandb', 'log_tensorboard', 'torchcompile', 'checkpoint_hist',
)


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no `owner/name`.

    Raises:
        InputError: says what is wrong
    """
    with blame('--repo-id', repo_id):
        validate_repo_id(repo_id)
    if repo_id.count('/') != 1:
        raise InputError(f'--repo-id {repo_id}: must be OWNER/NAME')


def read_args(run: Union[str, Path]) -> Dict[str, Any]:
    """A run's `args.yaml`.

    Raises:
        InputError: no such file, or not of a run
    """
    path = Path(run) / 'args.yaml'
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f'{path}: {getattr(error, "strerror", None) or "not a YAML file"}; give RUN/export') from error
    if not isinstance(args, dict) or 'momentum_teacher' not in args:
        raise InputError(f'{path}: not the arguments of a run of train.py')
    return args


def portable_args(args: Mapping[str, Any], architecture: str) -> Dict[str, Any]:
    """Arguments of a run without what is true of its machine alone: no folders, no devices, nothing like a login."""
    kept = {k: v for k, v in args.items() if k not in _OF_THE_MACHINE}
    name = args['dataset'].partition('/')[2]
    if name and data_name(args['dataset'], None) != name:  # a path, not a name of the Hub's or torchvision's
        kept['dataset'] = ''
    if not kept['dataset']:  # parts of a data set that stays behind
        kept = {k: v for k, v in kept.items() if k not in ('train_split', 'val_split', 'input_key', 'target_key')}
    if args['model'].startswith('local-dir:'):
        kept['model'] = architecture
    return yaml.safe_load(redact(yaml.safe_dump(kept, sort_keys=False)))


def _write_weights(source: Path, target: Path, float16: bool) -> str:
    """Copy `model.safetensors`, rounded where asked for; gives its SHA-256.

    Raises:
        InputError: values that are not finite, in the run or in float16
    """
    state = load_file(source)
    if float16:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    bad = sorted(k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all())
    if bad:
        where = ' in float16' if float16 else ''
        raise InputError(f'{source}: {bad[0]} is not finite{where} ({len(bad)} such tensors)')
    with atomic_path(target) as temp:
        if float16:
            save_file(state, temp, metadata={'format': 'pt'})
        else:
            shutil.copyfile(source, temp)
        return hashlib.sha256(temp.read_bytes()).hexdigest()


def _check_age(export: Path, trained: Mapping[str, torch.Tensor]) -> None:
    """Refuse an export that a run left before it went on and was cut off: the card would tell of other weights."""
    exported = load_file(export / 'model.safetensors')
    if any(name in trained and not torch.equal(value, trained[name]) for name, value in exported.items()):
        raise InputError(
            f"EXPORT {export}: other weights than the run's last checkpoint, which was cut off after that export; "
            f'train.py --resume auto ends it properly')


def _fits_torchvision(model: nn.Module) -> bool:
    try:
        as_torchvision(model)
    except InputError:
        return False
    return True


def write_folder(
        export: Union[str, Path],
        folder: Union[str, Path],
        repo_id: str,
        revision: Optional[str] = None,
        results: Sequence[str] = (),
        dataset: Optional[str] = None,
        license: str = 'apache-2.0',
        code: Optional[str] = None,
        float16: bool = False,
        task: bool = False,
        checkpoint: Optional[Mapping[str, Any]] = None,
) -> Facts:
    """Write what is published of a run: `model.safetensors`, `config.json`, and `README.md`, the model card.

    Args:
        export: the run's `export/`, beside its `args.yaml` and `summary.csv`
        folder: to write to, made if absent
        repo_id: `owner/name`
        revision: branch that it goes to; default main
        results: JSON files of the evaluation scripts
        dataset: what the card calls the training images; default as `args.yaml` has it
        license: of the weights, the Hub's identifier
        code: GitHub repository of this code
        float16: store half precision
        task: the state of the pre-training is published as well
        checkpoint: content of the run's last one, where there is one: its weights must be the export's

    Returns:
        what the card was written from

    Raises:
        InputError: not the export of a run, or broken, or older than the checkpoint; results of another model; metadata
            that the Hub refuses
    """
    export, folder = Path(export), Path(folder)
    args, rows = read_args(export.parent), read_rows(export.parent / 'summary.csv')
    with blame('EXPORT', export):
        config = check_folder(export)
        if config['num_classes']:
            raise InputError(f"EXPORT {export}: has a classifier of {config['num_classes']} classes; give RUN/export")
        model = load_folder(export).eval()
    if checkpoint is not None:
        _check_age(export, checkpoint['state_dict'])
    progress = {} if checkpoint is None else checkpoint['progress']
    dataset = dataset or data_name(args['dataset'], args['data_dir'])
    figures = monitor_figures(rows, args, dataset, progress.get('knn_before'))
    digest = weights_digest(model)
    figures += [read_figure(path, config['architecture'], export, digest) for path in results]
    with blame('--output', folder):
        folder.mkdir(parents=True, exist_ok=True)
        sha256 = _write_weights(export / 'model.safetensors', folder / 'model.safetensors', float16)
    config['pretrained_cfg'].update(license=license, paper_name=PAPER)
    facts = Facts(
        repo_id=repo_id,
        revision=revision,
        config=config,
        args=args,
        epochs=epochs_done(rows),
        processes=progress.get('order', {}).get('world_size'),
        dataset=dataset,
        figures=figures,
        num_features=model.head_hidden_size,
        sha256=sha256,
        float16=float16,
        stock=timm.models.model_entrypoint(config['architecture']).__module__.startswith('timm.'),
        torchvision=_fits_torchvision(model),
        task=task,
        license=license,
        code=code,
    )
    with blame('args.yaml'):  # of another version
        card = model_card(facts)
    with blame('--output', folder):
        for name, text in (('config.json', json.dumps(config, indent=2) + '\n'), ('README.md', str(card))):
            with atomic_write(folder / name) as file:
                file.write(text)
    return facts


def table_row(facts: Facts, commit: str) -> str:
    """The row of `timm_cgh.models.pretrained.CHECKPOINTS` that makes published weights a registry entry."""
    cfg = facts.config['pretrained_cfg']
    row = {
        'hf_hub_id': f'{facts.repo_id}@{commit}',
        'sha256': facts.sha256,
        **{name: tuple(cfg[name]) for name in ('input_size', 'mean', 'std')},
        **{name: cfg[name] for name in ('interpolation', 'crop_pct')},
        'metrics': {f'{f.name}, {f.dataset}': round(f.top1, 2) for f in facts.figures if f.own},
    }
    return f"'cgh_{facts.config['architecture']}.{cfg['tag']}': {row},"


def upload(
        folder: Union[str, Path],
        names: Sequence[str],
        repo_id: str,
        private: bool = False,
        revision: Optional[str] = None,
) -> str:
    """Create the repository where there is none, and put the files there in one commit, as the client is logged in.

    Args:
        folder: where the files are
        names: of the files, the same there
        repo_id: `owner/name`
        private: make the repository private
        revision: branch, made where there is none; default main

    Returns:
        hash of the commit

    Raises:
        InputError: the Hub refuses, or cannot be reached
    """
    api = HfApi(library_name='timm-cgh')
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise InputError(f'--private: {repo_id} exists and is public')
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, Path(folder) / name) for name in names],
            commit_message=f"Upload {', '.join(names)} with timm-cgh",
            revision=revision,
        ).oid
    except InputError:
        raise
    except Exception as error:  # the client and the network raise what they like
        raise InputError(f'--repo-id {repo_id}: {hub_reason(error)}') from error

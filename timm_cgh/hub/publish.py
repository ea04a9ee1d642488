"""A run's export as a repository on the Hugging Face Hub: a folder first, then one commit."""
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file

from timm_cgh.data import data_name
from timm_cgh.download import HUB_PREFIX, hub_reason, redact_token
from timm_cgh.errors import InputError, checking
from timm_cgh.files import (
    atomic_path, atomic_write, epochs_done, read_json, read_resolved, read_rows, read_yaml, write_yaml)
from timm_cgh.models.backbone import read_config
from timm_cgh.models.checkpoints import load_folder, weights_digest

from .card import PAPER, Facts, model_card
from .results import read_knn_checks, read_result

__all__ = [
    'check_repo_id', 'portable_args', 'read_args', 'table_row', 'upload', 'write_classifier', 'write_folder']

# options that hold for one machine or one start only
_LOCAL_OPTIONS = (
    'config', 'data_dir', 'output', 'experiment', 'resume', 'initial_checkpoint', 'workers', 'no_pin_mem', 'device',
    'dataset_download', 'class_map', 'log_wandb', 'log_tensorboard',
    'wandb_project', 'knn_dir', 'torchcompile', 'checkpoint_hist',
)


def check_repo_id(repo_id: str) -> None:
    """Check that a repository id is `owner/name`, else raise an `InputError`."""
    with checking('repo_id', repo_id, ValueError):
        validate_repo_id(repo_id)
        if repo_id.count('/') != 1:
            raise ValueError('must be OWNER/NAME')


_KINDS: Dict[str, Any] = {  # of the options that the card computes with
    'context': str, 'dataset': str, 'model': str, 'epochs': int, 'lr_base_size': int, 'model_kwargs': dict,
    'data_dir': (str, type(None)), 'val_split': (str, type(None)),
}


class _RunArguments(dict):
    """Content of an `args.yaml`; one of another version may lack an option."""

    def __missing__(self, key: str) -> Any:
        raise InputError(f'args.yaml: has no {key}, it is from another version of train.py')


def read_args(run: Union[str, Path]) -> Dict[str, Any]:
    """A run's `args.yaml`; no such file, one of something else, and an option that it lacks raise an `InputError`."""
    path = Path(run) / 'args.yaml'
    args = _RunArguments(read_yaml(path))
    if 'momentum_teacher' not in args:
        raise InputError(f'{path}: not the arguments of a run of train.py')
    for name, kind in _KINDS.items():
        if not isinstance(args[name], kind):
            raise InputError(f'{path}: its {name} is damaged')
    ratio = args['ratio']
    if not isinstance(ratio, list) or len(ratio) != 2 or not all(isinstance(value, (int, float)) for value in ratio):
        raise InputError(f'{path}: its ratio is damaged')
    return args


def portable_args(args: Mapping[str, Any], architecture: str) -> Dict[str, Any]:
    """A run's arguments without those that hold for its machine only: no folders, devices or credentials."""
    kept = {k: v for k, v in args.items() if k not in _LOCAL_OPTIONS}
    name = args['dataset'].partition('/')[2]
    if name and data_name(args['dataset'], None) != name:  # a path, not a name on the Hub or in torchvision
        kept['dataset'] = ''
    if not kept['dataset']:  # these belong to the data set
        kept = {k: v for k, v in kept.items() if k not in ('train_split', 'val_split', 'input_key', 'target_key')}
    if args['model'].startswith('local-dir:'):
        kept['model'] = architecture
    return yaml.safe_load(redact_token(yaml.safe_dump(kept, sort_keys=False)))


def _write_weights(export: Path, state: Dict[str, torch.Tensor], target: Path, float16: bool) -> str:
    """Copy `model.safetensors` if its values are finite, rounded if `float16`; returns its SHA-256."""
    source = export / 'model.safetensors'
    if float16:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    if bad := [k for k, v in state.items() if not v.isfinite().all()]:
        where = ' in float16' if float16 else ''
        raise InputError(f'{source}: {bad[0]} is not finite{where} ({len(bad)} such tensors)')
    with atomic_path(target) as temp:
        if float16:
            save_file(state, temp, metadata={'format': 'pt'})
        else:
            shutil.copyfile(source, temp)
        return hashlib.sha256(temp.read_bytes()).hexdigest()


def _check_target(export: Path, folder: Path) -> None:
    if folder.resolve() == export.resolve() or (folder / 'summary.csv').exists():
        raise InputError(f'output={folder}: holds a run, whose files would be overwritten')


def _write_texts(folder: Path, config: Mapping[str, Any], card: str) -> None:
    for name, text in (('config.json', json.dumps(config, indent=2) + '\n'), ('README.md', card)):
        with atomic_write(folder / name) as file:
            file.write(text)


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
        include_task: bool = False,
        checkpoint: Optional[Mapping[str, Any]] = None,
) -> Facts:
    """Write what is published of a run, but for its training state: weights, `config.json` and the model card.

    Args:
        export: the run's `export/`, beside its `args.yaml` and `summary.csv`
        folder: to write to, created if absent
        repo_id, revision, license, code: see `Facts`; the license is an identifier of the Hub
        results: JSON files of the evaluation scripts
        dataset: name of the training images in the card; default that of `args.yaml`
        float16: store half precision
        include_task: the training state is published as well; also write its `args.yaml`, see `portable_args`
        checkpoint: content of the run's last checkpoint, if there is one; its weights must be the export's

    Returns:
        what the card was written from

    Raises:
        InputError: not the export of a run, or broken, or older than the checkpoint; results of another model; a folder
            that cannot be written
    """
    export, folder = Path(export), Path(folder)
    _check_target(export, folder)
    args = read_args(export.parent)
    resolved = read_resolved(export.parent) if (export.parent / 'resolved.yaml').exists() else {}
    rows = read_rows(str(export.parent / 'summary.csv'))
    model, config = load_folder(export).eval(), read_config(export / 'config.json')
    cfg = config.get('pretrained_cfg', {})
    if lacking := sorted({'crop_pct', 'input_size', 'interpolation', 'mean', 'std', 'tag'} - cfg.keys()):
        raise InputError(f"{export / 'config.json'}: has no {lacking[0]}")
    checkpoint = checkpoint or dict(state_dict={}, progress={})
    state, trained = model.state_dict(), checkpoint['state_dict']
    if any(name in trained and not torch.equal(value, trained[name]) for name, value in state.items()):
        # the card would describe other weights
        raise InputError(
            f'export={export}: older than the last checkpoint of the run, which was interrupted after that export; '
            f'resume it with train.py and let it finish')
    progress, digest = checkpoint['progress'], weights_digest(model)
    dataset = dataset or data_name(args['dataset'], args['data_dir'])
    evaluations = [
        *read_knn_checks(rows, args, dataset, progress.get('knn_before')),
        *(read_result(path, config['architecture'], export, digest) for path in results)]
    cfg.update(license=license, paper_name=PAPER)
    with checking('output', folder, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        facts = Facts(
            repo_id=repo_id,
            revision=revision,
            config=config,
            args=_RunArguments({**args, **resolved.get('options', {})}),
            epochs=epochs_done(rows),
            processes=progress.get('order', {}).get('world_size', resolved.get('processes')),
            dataset=dataset,
            results=evaluations,
            model=model,
            sha256=_write_weights(export, state, folder / 'model.safetensors', float16),
            float16=float16,
            task=include_task,
            code=code,
        )
        _write_texts(folder, config, str(model_card(facts)))
        if include_task:
            write_yaml(folder / 'args.yaml', portable_args(args, facts.architecture))
    return facts


def write_classifier(
        export: Union[str, Path],
        folder: Union[str, Path],
        repo_id: str,
        revision: Optional[str] = None,
        results: Sequence[str] = (),
        dataset: Optional[str] = None,
        license: str = 'apache-2.0',
        code: Optional[str] = None,
        float16: bool = False,
) -> None:
    """Write what is published of a fine-tuned classifier: weights, `config.json` and a model card.

    Args:
        export: of finetune.py
        results: JSON files that it wrote with that export; they name the images unless `dataset` does
        others: see `write_folder`

    Raises:
        InputError: an export of something else or broken, results of another classifier, or a folder that cannot be
            written
    """
    export, folder = Path(export), Path(folder)
    _check_target(export, folder)
    model, config = load_folder(export), read_config(export / 'config.json')
    if (tag := config.get('pretrained_cfg', {}).get('tag')) != 'finetune':  # of which the card speaks
        raise InputError(f'export={export}: must be a classifier of finetune.py, its tag is {tag}')
    found, digest = [read_json(path) for path in results], weights_digest(model)
    for path, result in zip(results, found):
        if lacking := sorted({'classifier', 'dataset', 'protocol', 'top1', 'val_images', 'val_split'} - result.keys()):
            raise InputError(f'results={path}: has no {lacking[0]}; give what this version of finetune.py wrote')
        if result['classifier'] != digest:
            raise InputError(f'results={path}: measured on another classifier than that in {export}')
    config['pretrained_cfg'].update(license=license)
    dataset = dataset or next((result['dataset'] for result in found), 'labelled images')
    data = ModelCardData(
        license=license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', config['architecture']],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name('classifier_card.md')),
        repo_id=repo_id,
        config=config,
        dataset=dataset,
        names=config.get('label_names') or [str(number) for number in range(config['num_classes'])],
        code=code,
        results=found,
        hub_name=HUB_PREFIX + repo_id + (f'@{revision}' if revision else ''),
    )
    with checking('output', folder, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(export, model.state_dict(), folder / 'model.safetensors', float16)
        _write_texts(folder, config, redact_token(str(card)))


def table_row(facts: Facts, commit: str) -> str:
    """The row of `timm_cgh.models.pretrained.CHECKPOINTS` that registers published weights with timm."""
    cfg = facts.config['pretrained_cfg']
    row = {
        'hf_hub_id': f'{facts.repo_id}@{commit}',
        'sha256': facts.sha256,
        **{name: tuple(cfg[name]) for name in ('input_size', 'mean', 'std')},
        'interpolation': cfg['interpolation'],
        'crop_pct': cfg['crop_pct'],
        'metrics': {f'{r.name}, {r.dataset}': round(r.top1, 2) for r in facts.results if r.own},
    }
    return f"'cgh_{facts.architecture}.{cfg['tag']}': {row},"


def upload(
        folder: Union[str, Path],
        names: Sequence[str],
        repo_id: str,
        private: bool = False,
        revision: Optional[str] = None,
) -> str:
    """Upload files of a folder in one commit, as the user that the Hub's client is logged in as.

    Creates the repository, and the branch (`revision`, default main), where needed.

    Returns:
        hash of the commit

    Raises:
        InputError: the Hub refuses, or cannot be reached
    """
    api = HfApi(library_name='timm-cgh')
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise InputError(f'private: {repo_id} exists and is public')
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = f"Upload {', '.join(names)} with timm-cgh"
        operations = [CommitOperationAdd(name, Path(folder) / name) for name in names]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision).oid
    except InputError:
        raise
    except Exception as error:  # the types depend on the client's version and its network library
        raise InputError(f'repo_id={repo_id}: {hub_reason(error)}') from error

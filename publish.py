#!/usr/bin/env python3
"""Publish a run's backbone on the Hugging Face Hub, with a model card of its recipe and results.

    python publish.py output/train/RUN/export --repo-id OWNER/NAME --dry-run            # writes RUN/hub/, to review
    python publish.py output/train/RUN/export --repo-id OWNER/NAME --results knn.json linear.json
"""
import logging
import sys
from pathlib import Path

import timm

from timm_cgh.arguments import Parser, arguments_of
from timm_cgh.errors import InputError
from timm_cgh.hub.publish import check_repo_id, table_row, upload, write_classifier, write_folder
from timm_cgh.models.backbone import read_config
from timm_cgh.train.portable import TASK_FILE, write_portable
from timm_cgh.train.resume import find_checkpoint

_logger = logging.getLogger('hub')

# no option takes a token: the Hub's client has it from HF_TOKEN or `hf auth login`
parser = Parser(__doc__)
parser.add_argument('export', metavar='RUN/export',
                    help='export folder, in the folder of its run of train.py or finetune.py')
parser.add_argument('--repo-id', metavar='OWNER/NAME', required=True, help='repository on the Hub')
parser.add_argument('--private', action='store_true', help='create a private repository')
parser.add_argument('--revision', metavar='BRANCH', help='branch on the Hub; default main')
parser.add_argument('--dry-run', action='store_true', help='write the folder, upload nothing')
parser.add_argument('--output', metavar='DIR', help='folder to write; default RUN/hub')
parser.add_argument('--results', nargs='+', default=[], metavar='FILE',
                    help='JSON files that the evaluation scripts wrote (--results-file); default: none')
parser.add_argument('--include-task', action='store_true',
                    help='upload the training state too (teacher, heads, banks, optimiser), for train.py --resume')
parser.add_argument('--float16', action='store_true', help='store half precision: half the size')
parser.add_argument('--dataset', metavar='NAME', help='training images, for the card; default: from args.yaml')
parser.add_argument('--license', metavar='ID', default='apache-2.0',
                    help="license of the weights, the Hub's identifier")
parser.add_argument('--code', metavar='OWNER/REPO', help='GitHub repository of this code, for the card; default: none')


def write_run(args, run, folder):
    """Write the result of train.py; returns what the card was written from."""
    checkpoint = find_checkpoint(str(run))
    state = checkpoint and checkpoint.state
    if args.include_task and state is None:
        raise InputError(f'include_task: no checkpoint in {run}')
    facts = write_folder(folder=folder, checkpoint=state, **arguments_of(write_folder, args))
    if args.include_task:
        write_portable(state, folder / TASK_FILE)
    return facts


def main(argv=None):
    args = parser.parse_args(argv)
    logging.basicConfig(format='%(message)s')
    _logger.setLevel(logging.INFO)
    check_repo_id(args.repo_id)
    run, config = Path(args.export).parent, Path(args.export, 'config.json')
    folder, facts = Path(args.output or run / 'hub'), None
    if not (config.is_file() and read_config(config).get('num_classes')):
        facts = write_run(args, run, folder)
    elif args.include_task:
        raise InputError('include_task: a classifier has no state of pre-training')
    else:
        write_classifier(folder=folder, **arguments_of(write_classifier, args))
    names = ['model.safetensors', 'config.json', 'README.md', *([TASK_FILE, 'args.yaml'] if args.include_task else [])]
    _logger.info(f"{folder}: {', '.join(names)}")
    if args.dry_run:
        return 0

    commit = upload(folder, names, args.repo_id, args.private, args.revision)
    _logger.info(f"Published: timm.create_model('hf-hub:{args.repo_id}@{commit}', pretrained=True)")
    if facts and timm.is_model(f'cgh_{facts.architecture}'):
        _logger.info(f'As a registry entry, in timm_cgh/models/pretrained.py: {table_row(facts, commit)}')
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))

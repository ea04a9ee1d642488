#!/usr/bin/env python3
"""Publish a run's backbone on the Hugging Face Hub, with a model card of its recipe and figures.

    python publish.py output/train/RUN/export --repo-id OWNER/NAME --dry-run            # RUN/hub/, to look at first
    python publish.py output/train/RUN/export --repo-id OWNER/NAME --results knn.json linear.json
"""
import logging
import sys
from pathlib import Path

import timm
import yaml

from timm_cgh.arguments import Parser
from timm_cgh.errors import InputError
from timm_cgh.files import atomic_write
from timm_cgh.hub.publish import check_repo_id, portable_args, table_row, upload, write_folder
from timm_cgh.task import TASK_FILE, find_resume, read_checkpoint, write_portable

_logger = logging.getLogger('hub')

# no option takes a token: the Hub's client has it from HF_TOKEN or `hf auth login`
parser = Parser(description='Publish a backbone on the Hugging Face Hub')
parser.add_argument('export', metavar='RUN/export', help='beside the args.yaml and summary.csv of its run')
parser.add_argument('--repo-id', metavar='OWNER/NAME', required=True)
parser.add_argument('--private', action='store_true')
parser.add_argument('--revision', metavar='BRANCH', help='default main')
parser.add_argument('--dry-run', action='store_true', help='write the folder only')
parser.add_argument('--output', metavar='DIR', help='the folder; default RUN/hub')
parser.add_argument('--results', nargs='+', default=[], metavar='FILE',
                    help='what eval_knn.py, eval_linear.py, eval_semisup.py wrote to --results-file (JSON)')
parser.add_argument('--include-task', action='store_true',
                    help='the pre-training as well (teacher, heads, banks, optimiser), for train.py --resume')
parser.add_argument('--float16', action='store_true', help='store half precision: half the size')
parser.add_argument('--dataset', metavar='NAME', help='what the card calls the images; default: by args.yaml')
parser.add_argument('--license', metavar='ID', default='apache-2.0', help="of the weights, the Hub's identifier")
parser.add_argument('--code', metavar='OWNER/REPO', help='this code on GitHub, for the card')


def main(argv=None):
    args = parser.parse_args(argv)
    logging.basicConfig(format='%(message)s')
    _logger.setLevel(logging.INFO)
    check_repo_id(args.repo_id)
    run = Path(args.export).parent
    folder = Path(args.output or run / 'hub')
    checkpoint = find_resume(str(run))
    if args.include_task and checkpoint is None:
        raise InputError(f'--include-task: no last.pth.tar in {run}')

    facts = write_folder(
        args.export,
        folder,
        args.repo_id,
        revision=args.revision,
        results=args.results,
        dataset=args.dataset,
        license=args.license,
        code=args.code,
        float16=args.float16,
        task=args.include_task,
        checkpoint=read_checkpoint(checkpoint, mmap=True) if checkpoint else None,
    )
    names = ['model.safetensors', 'config.json', 'README.md']
    if args.include_task:
        write_portable(read_checkpoint(checkpoint), folder / TASK_FILE)
        with atomic_write(folder / 'args.yaml') as file:
            kept = portable_args(facts.args, facts.config['architecture'])
            yaml.safe_dump(kept, file, default_flow_style=None, sort_keys=False)
        names += [TASK_FILE, 'args.yaml']
    _logger.info(f"{folder}: {', '.join(names)}")
    if args.dry_run:
        return 0

    commit = upload(folder, names, args.repo_id, args.private, args.revision)
    _logger.info(f"Published: timm.create_model('hf-hub:{args.repo_id}@{commit}', pretrained=True)")
    if timm.is_model(f"cgh_{facts.config['architecture']}"):
        _logger.info(f'As a registry entry, in timm_cgh/models/pretrained.py: {table_row(facts, commit)}')
    return 0


def cli(argv=None):
    return parser.run(main, argv)


if __name__ == '__main__':
    sys.exit(cli())

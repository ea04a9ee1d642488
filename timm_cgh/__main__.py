"""The console script `timm-cgh`, also `python -m timm_cgh` (for torchrun: `torchrun ... -m timm_cgh train ...`)."""
import importlib
import sys
from typing import Optional, Sequence

from . import __version__

__all__ = ['main']

# command -> script of the repository's root, phrase
_COMMANDS = {
    'train': ('train', 'pre-train a timm backbone on unlabelled images'),
    'knn': ('eval_knn', 'evaluate by nearest neighbours'),
    'linear': ('eval_linear', 'evaluate by linear classifiers on the frozen backbone'),
    'semisup': ('eval_semisup', 'fine-tune on few labels'),
    'detection': ('eval_detection', 'fine-tune a detector on the backbone'),
    'finetune': ('finetune', 'fine-tune on labelled images into a classifier'),
    'predict': ('predict', 'classify new images'),
    'embed': ('embed', 'write the embeddings of images'),
    'neighbours': ('neighbours', 'find near-duplicates and outliers, without labels'),
    'publish': ('publish', 'upload weights and a model card to the Hugging Face Hub'),
    'convert': ('convert', 'write weights in other formats (torchvision, ONNX, ...)'),
    'shards': ('write_shards', 'write images as WebDataset shards, to train on as a stream'),
    'plot': ('plot', 'plot runs over one another'),
}


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    commands = '\n'.join(f'  {name:{width}}  {phrase}' for name, (_, phrase) in _COMMANDS.items())
    return (
        f'usage: timm-cgh COMMAND [options]\n\n{commands}\n\n'
        'timm-cgh COMMAND --help lists the options; -c NAME.yaml takes a file or one of the configurations included')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the script of a command; returns its exit code."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ['--help']
    if command in ('-h', '--help', '--version'):
        print(__version__ if command == '--version' else _usage())
        return 0
    if command not in _COMMANDS:
        print(f'timm-cgh: error: no such command: {command} (choose from {", ".join(_COMMANDS)})', file=sys.stderr)
        return 2
    sys.argv[0] = f'timm-cgh {command}'  # the name that argparse gives to the subparsers of `plot`
    script = importlib.import_module(f'timm_cgh.scripts.{_COMMANDS[command][0]}')
    script.parser.prog = f'timm-cgh {command}'
    return script.parser.run(script.main, rest)


if __name__ == '__main__':
    sys.exit(main())

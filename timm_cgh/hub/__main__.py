"""python -m timm_cgh.hub convert output/train/RUN --to torchvision|detectron2|onnx --output FILE"""
import logging
import sys

from timm_cgh.arguments import Parser

from .convert import FORMATS, convert

parser = Parser(prog='python -m timm_cgh.hub', description='Trained backbones for other programs')
commands = parser.add_subparsers(dest='command', required=True)
command = commands.add_parser('convert', help='write a backbone in the format of a neighbour')
command.add_argument('source', metavar='SOURCE', help="a run's folder, its export/, or hf-hub:OWNER/NAME[@REVISION]")
command.add_argument('--to', choices=FORMATS, required=True)
command.add_argument('-o', '--output', metavar='FILE', required=True, help='.safetensors, .pth or .onnx')


def main(argv=None):
    args = parser.parse_args(argv)
    logging.basicConfig(format='%(message)s')
    logging.getLogger('hub').setLevel(logging.INFO)  # the exporter's own remarks stay away
    convert(args.source, args.to, args.output)
    return 0


def cli(argv=None):
    return parser.run(main, argv)


if __name__ == '__main__':
    sys.exit(cli())

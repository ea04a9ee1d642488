#!/usr/bin/env python3
"""Write a trained backbone in the format of another library.

    python convert.py output/train/RUN --to torchvision --output model.safetensors
    python convert.py hf-hub:OWNER/NAME --to onnx --output model.onnx
"""
import logging
import sys

from timm_cgh.arguments import Parser
from timm_cgh.hub.convert import FORMATS, convert

parser = Parser(__doc__)
parser.add_argument('source', metavar='SOURCE',
                    help="a run's folder, export folder or checkpoint file, or hf-hub:OWNER/NAME[@REVISION]")
parser.add_argument('--to', choices=FORMATS, required=True, help='format to write')
parser.add_argument('-o', '--output', metavar='FILE', required=True, help='.safetensors, .pth or .onnx file to write')


def main(argv=None):
    args = parser.parse_args(argv)
    logging.basicConfig(format='%(message)s')
    logging.getLogger('hub').setLevel(logging.INFO)  # not those of torch's exporter
    convert(args.source, args.to, args.output)
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))

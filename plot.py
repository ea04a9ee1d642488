#!/usr/bin/env python3
"""Plots of runs of train.py.

    python plot.py runs output/train/a output/train/b --names CGH MoCo-v2 --out curves.png
    python plot.py relations RUN_CGH RUN_RESSL --out fig2.png     # Fig. 2, of runs with --track-relations
    python plot.py report RUN                                     # report.html anew, with results that came later
"""
import os
import sys

from timm_cgh.arguments import Parser
from timm_cgh.errors import InputError, checking
from timm_cgh.files import read_rows
from timm_cgh.plots import read_tracked_run, save_relations, save_runs
from timm_cgh.plots.report import save_report


def plot_runs(args):
    """Several runs over one another, epoch by epoch."""
    names = args.names or [os.path.basename(os.path.abspath(folder)) for folder in args.runs]
    if len(names) != len(args.runs):
        raise InputError(f"names={' '.join(names)}: {len(names)} names for {len(args.runs)} runs")
    if len(set(names)) != len(names):
        raise InputError(f"runs={' '.join(args.runs)}: several of one name, tell them apart with `names`")
    runs = {}
    for name, folder in zip(names, args.runs):
        runs[name] = read_rows(os.path.join(folder, 'summary.csv'))
        if not runs[name]:
            raise InputError(f'runs={folder}: not the folder of a run, it holds no summary.csv with an epoch in it')
    return write(args.out, save_runs, runs, args.out, args.title)


def plot_relations(args):
    """Recall and precision of the teacher's positives: CGH's hypercolumn relation and ReSSL's global one."""
    cgh = read_tracked_run(args.cgh, 'cross', 'CGH, hypercolumn relation', parameter='cgh')
    ressl = read_tracked_run(args.ressl, 'global', 'ReSSL, global relation', parameter='ressl')
    if cgh.selection != ressl.selection:
        raise InputError(
            f'ressl={args.ressl}: measured with the threshold {ressl.selection}, but `cgh` with {cgh.selection}')
    sizes = [cgh.bank_size, ressl.bank_size]
    title = "Positives that the teacher's relations select"
    return write(args.out, save_relations, [cgh.curve, ressl.curve], args.out, cgh.selection, sizes, title)


def write_report(args):
    """The report of a run anew, with the results (JSON files of evaluations) that lie in its folder by now."""
    with checking('folder', args.folder, OSError):
        print(save_report(args.folder))
    return 0


def write(out, save, *content):
    if not out.lower().endswith('.png'):
        raise InputError(f'out={out}: must end in .png')
    with checking('out', out, OSError):
        written = save(*content)
    if not written:
        raise InputError(f'out={out}: needs matplotlib (pip install matplotlib)')
    print(out)
    return 0


parser = Parser(__doc__)
plots = parser.add_subparsers(metavar='PLOT', required=True)

runs_parser = plots.add_parser('runs', help='training curves of several runs', description=plot_runs.__doc__)
runs_parser.add_argument('runs', metavar='RUN', nargs='+', help='folder with a summary.csv')
runs_parser.add_argument('--names', metavar='NAME', nargs='+',
                         help='names of the runs; default: those of their folders')
runs_parser.add_argument('--title', default='', help='heading of the plot; default: none')
runs_parser.add_argument('--out', metavar='FILE', default='curves.png', help='PNG file to write')
runs_parser.set_defaults(parser=runs_parser, plot=plot_runs)

relations_parser = plots.add_parser('relations', help='Fig. 2 of the paper', description=plot_relations.__doc__)
relations_parser.add_argument('cgh', metavar='RUN_CGH', help='folder of a run of train.py --track-relations')
relations_parser.add_argument('ressl', metavar='RUN_RESSL', help='folder of such a run with --context global')
relations_parser.add_argument('--out', metavar='FILE', default='fig2.png', help='PNG file to write')
relations_parser.set_defaults(parser=relations_parser, plot=plot_relations)

report_parser = plots.add_parser('report', help='one page about a run', description=write_report.__doc__)
report_parser.add_argument('folder', metavar='RUN', help='folder of a run of train.py')
report_parser.set_defaults(parser=report_parser, plot=write_report)


def main(argv=None):
    args = parser.parse_args(argv)
    return args.parser.run(lambda _: args.plot(args))  # an error names the flags of the subcommand


if __name__ == '__main__':
    sys.exit(main())

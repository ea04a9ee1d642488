"""Folders of runs as train.py leaves them, for the tests of what reads them."""
import yaml

from timm_cgh.files import Summary


def write_run(folder, rows, **args):
    """`summary.csv` with `rows`, `args.yaml` with `args`."""
    folder.mkdir()
    summary = Summary(str(folder / 'summary.csv'))
    for row in rows:
        summary.add(row)
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    return folder

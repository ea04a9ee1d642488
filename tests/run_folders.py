"""Folders of runs as train.py leaves them, for the tests of what reads them; files; the order of disk calls."""
import csv
import json
import os

import yaml

from timm_cgh.files import Summary


def read_table(path):
    """Rows of a CSV file, values as text."""
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def write_run(folder, rows, **args):
    """`summary.csv` with `rows`, `args.yaml` with `args`."""
    folder.mkdir()
    summary = Summary(str(folder / 'summary.csv'))
    for row in rows:
        summary.add(row)
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    return folder


def change_file(path, **values):
    """Set entries of a JSON or YAML file, which `...` removes."""
    read, write = (json.loads, json.dumps) if path.suffix == '.json' else (yaml.safe_load, yaml.safe_dump)
    content = {**read(path.read_text()), **values}
    path.write_text(write({name: value for name, value in content.items() if value is not ...}))


def record_disk_calls(monkeypatch):
    """List that gets `('fsync', inode)` and `(function of os that renames or removes, inode)` in their order."""
    calls = []
    for name in ('fsync', 'replace', 'rename', 'unlink', 'remove'):
        def record(target, *args, name=name, real=getattr(os, name), **kwargs):  # noqa: B008
            if name == 'fsync' or os.path.exists(target):
                calls.append((name, os.stat(target).st_ino))
            return real(target, *args, **kwargs)
        monkeypatch.setattr(os, name, record)
    return calls

"""Adds the root scripts and their configurations to the wheel, as `timm_cgh.scripts`; metadata: setup.cfg."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
LEFT_OUT = ('setup', 'hubconf', 'benchmark', 'compare')  # they need the repository


def long_description():
    """README.md for PyPI: relative links become absolute where setup.cfg names the repository (`Source`), else text."""
    config = ConfigParser()
    config.read(ROOT / 'setup.cfg', encoding='utf-8')
    urls = dict(line.split(' = ') for line in config['metadata']['project_urls'].split('\n') if line)
    source = urls.get('Source')

    def link(found):
        image, text, target = found.groups()
        if '://' in target:
            return found[0]
        if source is None:
            return '' if image else text
        return f"{image}[{text}]({source}/{'raw' if image else 'blob'}/main/{target})"

    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    return re.sub(r'(!?)\[([^][]*)\]\(([^()\s]+)\)', link, readme)


class BuildPy(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, 'timm_cgh', 'scripts')
        for path in (*ROOT.glob('*.py'), *ROOT.glob('configs/*.yaml')):
            if path.stem not in LEFT_OUT:
                copy = target / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(path), str(copy))


setup(
    cmdclass={'build_py': BuildPy},
    long_description=long_description(),
    long_description_content_type='text/markdown',
)

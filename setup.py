"""Adds the root scripts and their configurations to the wheel, as `timm_cgh.scripts`; metadata: setup.cfg."""
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
LEFT_OUT = ('setup', 'hubconf', 'benchmark', 'compare')  # they need the repository


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


setup(cmdclass={'build_py': BuildPy})

"""MkDocs hooks: pages that lie outside docs/, and equations as MathML, which browsers draw without a script."""
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ('CHANGELOG.md', 'CONTRIBUTING.md')
FOLDERS = ('results', 'weights')
SUFFIXES = ('.md', '.png', '.csv')


def _references(patterns):
    """References to the modules of the package that these patterns match, of those with public names."""
    paths = [path for pattern in patterns for path in sorted((ROOT / 'timm_cgh').glob(pattern))]
    paths = [path for path in paths if '\n__all__' in path.read_text(encoding='utf-8') and path.name != '__main__.py']
    return '\n\n'.join(f"::: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}" for path in paths)


def on_files(files, config):
    """Add the changelog and the like, and what the results are made of, under their paths in the repository."""
    paths = [ROOT / name for name in PAGES]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob('*') if path.suffix in SUFFIXES]
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, **_):
    """Links of the repository -> links of the site, whose root is docs/; others that leave the site become text."""
    name = page.file.src_uri
    inside = not name.startswith(tuple(f'{folder}/' for folder in FOLDERS)) and name not in PAGES
    here = ROOT / ('docs' if inside else '') / name

    def link(found):
        text, target = found.groups()
        path, _, anchor = target.partition('#')
        if '://' in target or not path:
            return found[0]
        goal = (here.parent / path).resolve().relative_to(ROOT).as_posix()
        goal = goal.removeprefix('docs/') if goal.startswith('docs/') else goal
        if not (ROOT / 'docs' / goal).is_file() and goal not in PAGES and not (
                goal.startswith(FOLDERS) and goal.endswith(SUFFIXES)):
            return text[1:-1]
        up = '../' * name.count('/')
        return f"{text}({up}{goal}{f'#{anchor}' if anchor else ''})"

    markdown = re.sub(r'<!-- modules: (.+) -->', lambda found: _references(found[1].split()), markdown)
    markdown = re.sub(r'(!?\[[^\[\]]*\])\(([^()\s]+)\)', link, markdown)
    if name == 'method.md':
        equation = '<div style="overflow-x: auto">{}</div>'  # on a phone
        markdown = re.sub(
            r'\$\$(.+?)\$\$', lambda m: equation.format(convert(m[1].strip(), display='block')), markdown, flags=re.S)
        markdown = re.sub(r'(?<![\w`$])\$([^$\n`]+)\$', lambda m: convert(m[1]), markdown)
    return markdown

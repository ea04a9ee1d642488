"""The help of every script."""
import argparse
import importlib

import pytest

from conftest import REPOSITORY

SCRIPTS = sorted(
    path.stem for path in REPOSITORY.glob('*.py') if 'parser = Parser(' in path.read_text(encoding='utf-8'))


def parsers(script):
    """The parser of a script and those of its subcommands."""
    parser = importlib.import_module(script).parser
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(sub for action in commands for sub in action.choices.values())]


def options(parser):
    """Its options and positional arguments but --help, each with its text in the help."""
    formatter = parser._get_formatter()
    skipped = (argparse._HelpAction, argparse._SubParsersAction, argparse._VersionAction)
    for action in parser._actions:
        if not isinstance(action, skipped):
            yield action, formatter._expand_help(action)


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_option_says_what_it_is_and_what_it_is_by_default(script):
    for parser in parsers(script):
        for action, text in options(parser):
            where = f'{script} {action.dest}: {text}'
            assert len(text.split(' (default:')[0].split()) >= 2 and not text.startswith('default'), where
            if action.required and action.option_strings:
                assert 'required' in text, where
            elif action.option_strings and action.nargs != 0:
                assert 'default' in text or 'required' in text, where
            if isinstance(action.default, (int, float)) and action.nargs != 0:
                assert str(action.default) in text, where


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_script_shows_an_example(script):
    text = importlib.import_module(script).parser.format_help()
    assert f'python {script}.py ' in text.partition('options:')[2], text

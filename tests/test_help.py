"""`--help` of every script: an example that the parser takes, flags in groups, each with its default."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def parser_of(script: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(script).get_args_parser()
    return parser


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_example_is_a_command_that_the_script_takes(script: str) -> None:
    text = parser_of(script).format_help().replace("\\\n", " ")
    examples = re.findall(rf"^    python {script}\.py (.*)$", text, flags=re.MULTILINE)
    assert examples
    for example in examples:
        parser_of(script).parse_args(shlex.split(example))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_a_group_and_says_its_default_or_that_it_is_required(script: str) -> None:
    _, ungrouped, *groups = re.split(r"^(?=[\w, ]+:\n  -)", parser_of(script).format_help(), flags=re.MULTILINE)
    assert re.findall(r"^  (--?\w+)", ungrouped, flags=re.MULTILINE) == ["-h"]
    for group in groups:
        for flag in re.split(r"^  (?=-)", group, flags=re.MULTILINE)[1:]:
            assert re.search("default|required", flag), flag

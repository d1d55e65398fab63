"""`cnprocctl help VERB`: the same text as `cnprocctl VERB --help`."""

from __future__ import annotations

from cnprocd.cli.command_line import parser, parser_of
from cnprocd.cli.grammar import Options
from cnprocd.errors import EX_OK


def show(options: Options) -> int:
    """Print the help of a verb, of a group of verbs, or of cnprocctl."""
    parser_of(parser(), options.words).print_help()
    return EX_OK

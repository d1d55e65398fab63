"""The language of the project: user-visible text keeps to the glossary, and prose names the actor.

The glossary is a table of expressions that were replaced, each with the word to use. User-visible text is every
document, manual page and `--help`, the journal catalog, descriptions in the schema, units, configuration and alerts,
and every string in cnprocd/ that is a text (it has a space).
"""

import argparse
import ast
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cnprocd.cli import cnprocd as daemon_command
from cnprocd.cli import command_line
from cnprocd.cli import runner as runner_command

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("prose", ROOT / "tests/prose.py")
prose = importlib.util.module_from_spec(_SPEC)
sys.modules["prose"] = prose
_SPEC.loader.exec_module(prose)

# Replaced expression -> what to write.
GLOSSARY = {
    r"who|whoever|whom": "the process, the daemon, the user, the program",
    r"nobody|somebody|anybody|everybody|someone|anyone": "no process, any user, ...",
    r"tells?|told|telling": "report, log, show, return",
    r"mend\w*": "fix, suggest fixes",
    r"judg\w+": "evaluate, check, match",
    r"hears?|heard|deaf": "receive, listen",
    r"(?:put|puts|stay|stays|be) in force": "load; keep the current rules",
    r"firings?": "match",
    r"so (?:many|long)": "maximum number of, after this time",
    r"bear(?:s|ing)?": "must be idempotent",
    r"made (?:good|up for)": "recovered",
    r"done without|moved aside|set aside": "runs without; renames",
    r"another language|said nothing": "protocol error; exited without output",
    r"strangers?": "other users, unprivileged users",
    r"sheds?|shedding": "drop",
    r"and said|is said|are said": "and logged",
    r"in vain|by half": "abandoned; partially",
    r"(?<!there )(?<!answer )is no (?!longer\b|more\b)\w+": "is not a, invalid",
    r"(?:one|a|each|the|first|failed|this|next) try|tries": "attempt",
    r"dearer|dearest|dearness": "more expensive, cost",
    r"telling": "exit record",
    r"the reader": "the daemon",
}
# Not prose: the user account, quoted output and commands, names of fields in manual pages.
CODE = re.compile(r"`[^`\n]*`|\buser nobody\b|<[^>]*>|\bnobody:|--user nobody|^\.B \w+$", re.MULTILINE)


def of_documents() -> Iterator[tuple[str, str]]:
    """Yield (where, text) of files that users read."""
    patterns = (
        "README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "packaging/man/*.[1-8]",
        "packaging/man/*.in", "systemd/*", "config/*.yaml", "config/examples/*.yaml", "config/examples/hooks/*",
        "packaging/grafana/*.yaml",
    )  # fmt: skip
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def of_help() -> Iterator[tuple[str, str]]:
    """Yield (command, its --help)."""
    yield "cnprocd --help", daemon_command.parser().format_help()
    yield "cnprocd-runner --help", runner_command.parser().format_help()

    def below(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
        yield f"{name} --help", parser.format_help()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, one in action.choices.items():
                    yield from below(f"{name} {word}", one)

    yield from below("cnprocctl", command_line.parser())


def of_schema() -> Iterator[tuple[str, str]]:
    """Yield (place, description) of every key of the rule language."""

    def walk(value: object, where: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, one in value.items():
                if key == "description" and isinstance(one, str):
                    yield where, one
                yield from walk(one, f"{where}.{key}")
        elif isinstance(value, list):
            for one in value:
                yield from walk(one, where)

    yield from walk(json.loads((ROOT / "config/rules.schema.json").read_text()), "schema")


def of_strings() -> Iterator[tuple[str, str]]:
    """Yield (file:line, text) of the strings in cnprocd/ that are texts; docstrings are not user-visible."""
    for path in sorted((ROOT / "cnprocd").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or id(node) in silent:
                continue
            if isinstance(node.value, str) and " " in node.value:
                yield f"{path.relative_to(ROOT).as_posix()}:{node.lineno}", node.value


@cache
def replaced_words(which: str) -> tuple[str, ...]:
    """Return "where: expression -> what to write" for every replaced expression in user-visible text."""
    gather = {"documents": of_documents, "help": of_help, "schema": of_schema, "strings": of_strings}[which]
    return tuple(
        f"{where}: {found[0]!r} -> {instead}"
        for where, text in gather()
        for expression, instead in GLOSSARY.items()
        for found in re.finditer(rf"\b(?:{expression})\b", CODE.sub(" ", text), re.IGNORECASE)
    )


@pytest.mark.parametrize("which", ["documents", "help", "schema", "strings"])
def test_user_visible_text_keeps_to_the_glossary(which):
    found = replaced_words(which)
    assert not found, f"{len(found)} replaced words:\n" + "\n".join(found)


def test_prose_names_the_actor():
    """Either group of replaced words stays below one in two thousand words."""
    found = prose.counts()
    assert max(prose.per_thousand(found)) < prose.MOST_PER_THOUSAND, prose.report(found)


def test_the_counter_reads_prose_and_leaves_out_code():
    assert prose.markdown("who `nobody`\n\n    somebody\n\n```\nwhoever\n```\n").split() == ["who"]
    assert prose.roff(".B who\n.nf\nnobody\n.fi\n").split() == ["who"]
    source = '"""Tell `who`."""\nX = 1\n"""The told."""\nY = "nobody"\n'
    assert prose.docstrings(source).split() == ["Tell", ".", "The", "told."]

"""Problems of rule files as text for a terminal, and from the JSON of the daemon."""

from __future__ import annotations

from pathlib import Path

from cnprocd.cli.terminal import Style
from cnprocd.json_value import JsonValue, as_dict, get_int, get_str
from cnprocd.rules.problems import Problem


def painted(problem: Problem, colour: str, label: str, style: Style) -> str:
    """Return a problem as it renders, with a label after its place. The place is bold, label and caret in colour."""
    first, *rest = problem.render().split("\n")
    where, message = problem.position, first[len(problem.position) :]
    if label:
        message = f": {style(colour, label)}{message}"
    marked = [style(colour, line) if line.strip() == "^" else line for line in rest]
    return "\n".join([f"{style('bold', where)}{message}", *marked])


def problem_of(value: JsonValue) -> Problem:
    """Return the problem that control/problems.py made JSON of. Raises JsonError."""
    found = as_dict(value)
    texts = {name: get_str(found, name) for name in ("message", "accepted", "hint", "source_line")}
    return Problem(Path(get_str(found, "file")), get_int(found, "line"), get_int(found, "column"), **texts)

"""Problems of rule files as JSON values, in one form for a refused reload and for `check`."""

from __future__ import annotations

from cnprocd.json_value import JsonDict
from cnprocd.rules.problems import Problem


def problem_value(problem: Problem) -> JsonDict:
    """Return a problem of a rule file as JSON."""
    return {
        "file": str(problem.file),
        "line": problem.line,
        "column": problem.column,
        "message": problem.message,
        "accepted": problem.accepted,
        "hint": problem.hint,
        "source_line": problem.source_line,
    }

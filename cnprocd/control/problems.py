"""Mistakes in rule files as JSON values: one form, whether the daemon refuses a reload or `check` finds them. PURE."""

from __future__ import annotations

from cnprocd.rules.problems import Problem

Value = object


def problem_value(problem: Problem) -> dict[str, Value]:
    """A mistake in a rule file as JSON."""
    return {
        "file": str(problem.file),
        "line": problem.line,
        "column": problem.column,
        "message": problem.message,
        "accepted": problem.accepted,
        "hint": problem.hint,
        "source_line": problem.source_line,
    }

"""Warnings about one rule: valid, but probably not intended. load.py adds the positions. PURE."""

from __future__ import annotations

from collections.abc import Iterator

from cnprocd.rules.language.schema import RuleModel
from cnprocd.rules.language.value_problem import ValueProblem
from cnprocd.rules.values import FREE_TEXT_FIELDS, Field, Template


def advise(rule: RuleModel) -> Iterator[ValueProblem]:
    """Return the warnings about one rule, with their paths from the rule."""
    if rule.log is None and rule.run is None and rule.enabled:
        yield ValueProblem("this rule does nothing: log is false and it has no run", at=("log",))
    if rule.run is None:
        return
    guarded = False
    for index, argument in enumerate(rule.run.command):
        guarded = guarded or argument.parts == ("--",)
        if not guarded and _begins_free(argument):
            hint = 'put "--" before it if the program supports that, or read CNPROCD_* from the environment instead'
            message = "a process chooses this text: if it begins with a dash, the hook reads it as an option"
            yield ValueProblem(message, hint=hint, at=("run", "command", index))


def _begins_free(argument: Template) -> bool:
    first = argument.parts[0] if argument.parts else ""
    return isinstance(first, Field) and first.name in FREE_TEXT_FIELDS

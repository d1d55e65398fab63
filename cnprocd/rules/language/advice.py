"""What is allowed in a rule but probably not meant: warnings, never errors.

Strategy: a pure look at one loaded rule; load.py adds the position and `check` shows it.
"""

from __future__ import annotations

from collections.abc import Iterator

from cnprocd.rules.language.mistakes import Mistake
from cnprocd.rules.language.schema import RuleModel
from cnprocd.rules.values import FREE_TEXT_FIELDS, Field, Template


def advise(rule: RuleModel) -> Iterator[Mistake]:
    """The warnings about one rule, each with its path below the rule."""
    if rule.log is None and rule.run is None and rule.enabled:
        yield Mistake("this rule does nothing: log is false and there is no run", at=("log",))
    if rule.run is None:
        return
    guarded = False
    for index, argument in enumerate(rule.run.command):
        guarded = guarded or argument.parts == ("--",)
        if not guarded and _begins_free(argument):
            hint = 'put "--" before it if the program knows that, or let it read CNPROCD_* from its environment'
            message = "a process chooses this text, and one that begins with a dash becomes an option of the hook"
            yield Mistake(message, hint=hint, at=("run", "command", index))


def _begins_free(argument: Template) -> bool:
    first = argument.parts[0] if argument.parts else ""
    return isinstance(first, Field) and first.name in FREE_TEXT_FIELDS

"""A problem of a value in a rule file, before its position in the file is known. PURE.

A parser reports what is wrong, what is accepted, and the path from its value to the wrong part (`at`). It reports the
problems of all items of a list, not only the first. pydantic keeps a raised ValueError as `ctx["error"]`, so an
InvalidValueError arrives unchanged in load.py, which adds line and column (problems.Problem).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, slots=True)
class ValueProblem:
    """One problem: a message, what is accepted instead, and a hint.

    `at` is the path of keys and indexes from the value that was parsed to the wrong part. If `on_key`, the wrong part
    is the key at that path, not its value.
    """

    message: str
    accepted: str = ""
    hint: str = ""
    at: tuple[str | int, ...] = ()
    on_key: bool = False


class InvalidValueError(ValueError):
    """A value is invalid, for one or more reasons."""

    def __init__(self, *problems: ValueProblem) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


def invalid(message: str, accepted: str = "", hint: str = "", key: str = "") -> InvalidValueError:
    """Return the error for a single problem, of the value itself or of one `key` in it."""
    return InvalidValueError(ValueProblem(message, accepted, hint, (key,) if key else (), on_key=bool(key)))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the hint 'did you mean "x"?' for a misspelt word, or an empty string if no known word is similar."""
    found = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'did you mean "{found[0]}"?' if found else ""


def shown(value: object) -> str:
    """Return a value as a message shows it: text in quotes and cut to 60 characters, a container by its type."""
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}..."'
    if isinstance(value, bool):
        return "true" if value else "false"
    named = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return named.get(type(value)) or str(value)[:60]

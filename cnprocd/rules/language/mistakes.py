"""What is wrong with a rule file, told so that a person can mend it.

Strategy: a parser never says only "invalid". It says what is wrong, what would be accepted, and where below the value
it was given (`at`, a path of keys and indexes), and it reports every mistake of a list, not the first. pydantic keeps
a raised ValueError as `ctx["error"]` of its own report, so a `MistakeError` reaches load.py whole and gets its line and
column there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, slots=True)
class Mistake:
    """One sentence on what is wrong, and the way out.

    `at` leads from the value being parsed to the culprit; with `on_key` the culprit is the key there, not its value.
    """

    message: str
    accepted: str = ""
    hint: str = ""
    at: tuple[str | int, ...] = ()
    on_key: bool = False


class MistakeError(ValueError):
    """Raised by the parsers of the rule language; carries one or more mistakes."""

    def __init__(self, *mistakes: Mistake) -> None:
        super().__init__("; ".join(m.message for m in mistakes))
        self.mistakes = mistakes


def mistake(message: str, accepted: str = "", hint: str = "", key: str = "") -> MistakeError:
    """Shorthand for the usual case of a single mistake, of the value itself or of one `key` in it."""
    return MistakeError(Mistake(message, accepted, hint, (key,) if key else (), on_key=bool(key)))


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint 'did you mean "x"?' for a misspelt word, or an empty string when nothing is near."""
    found = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'did you mean "{found[0]}"?' if found else ""


def shown(value: object) -> str:
    """A value as a message names it: text in quotes and cut to a bearable length, a container by its sort."""
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}..."'
    if isinstance(value, bool):
        return "true" if value else "false"
    named = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return named.get(type(value)) or str(value)[:60]

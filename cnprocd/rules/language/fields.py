"""The field types of the models: each pairs a parser of syntax.py with the JSON schema of what it reads.

Strategy: one PlainValidator a type, so that pydantic never tries the branches of a union and a mistake is one sentence.
The JSON schema describes the YAML form (what a person writes), not the parsed value.
"""

from __future__ import annotations

import re
import signal as signals
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator, ValidationInfo
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic_core import CoreSchema

from cnprocd.rules.language import names, syntax
from cnprocd.rules.language.mistakes import mistake, nearest, shown
from cnprocd.rules.language.names import Context
from cnprocd.rules.ruleset import EVENT_NAMES, EventName
from cnprocd.rules.values import Comparison, IntSet, Pattern, Template

Schema = dict[str, Any]


class Model(BaseModel):
    """What every model here shares: unknown keys are mistakes, and nothing changes after load."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def context_of(info: ValidationInfo) -> Context:
    """The context given to validation, or an empty one: no lists, no users, no groups."""
    return info.context if isinstance(info.context, Context) else Context()


def one_or_list(item: Schema) -> Schema:
    """The JSON schema of one item or a list of at least one."""
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]}


@dataclass(frozen=True, slots=True, eq=False)
class YamlForm:
    """The JSON schema of what a person writes. pydantic's WithJsonSchema, but up to 2.10 that one lets every field
    that shares it write its own default into it.
    """

    schema: Schema

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return deepcopy(self.schema)


@dataclass(frozen=True, slots=True)
class OneOrListOf:
    """Marks a tuple field that may also be written as a single item, for the JSON schema."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        array = handler(core)
        return {"anyOf": [array["items"], array]}


@dataclass(frozen=True, slots=True)
class OrBoolean:
    """Marks a model field that may also be switched with true or false, for the JSON schema."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return {"anyOf": [{"type": "boolean"}, handler(core)]}


def as_list(value: object) -> object:
    """A single item as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


# --- events

ACCEPT_EVENTS = f"{', '.join(EVENT_NAMES)}, or a list of these, or all"


def parse_events(value: object) -> tuple[EventName, ...]:
    """Event names, in the order of EVENT_NAMES; `all`, alone, stands for every one."""

    def one(item: object) -> EventName:
        for name in EVENT_NAMES:
            if item == name:
                return name
        hint = nearest(item, EVENT_NAMES) if isinstance(item, str) else ""
        raise mistake(f"{shown(item)} is not an event", ACCEPT_EVENTS, hint)

    if value in ("all", ["all"]):
        return EVENT_NAMES
    chosen = set(syntax.each(value, one, ACCEPT_EVENTS))
    return tuple(name for name in EVENT_NAMES if name in chosen)


Events = Annotated[
    tuple[EventName, ...],
    PlainValidator(parse_events),
    YamlForm(one_or_list({"type": "string", "enum": [*EVENT_NAMES, "all"]})),
]


# --- text to compare with


def _patterns(kind: names.AttributeKind) -> Callable[[Any, ValidationInfo], tuple[Pattern, ...]]:
    def parse(value: Any, info: ValidationInfo) -> tuple[Pattern, ...]:  # noqa: ANN401 (whatever YAML gave)
        return names.patterns(value, context_of(info), kind)

    return parse


_PATTERN_SCHEMA = one_or_list({"type": "string", "minLength": 1})
CommPatterns = Annotated[tuple[Pattern, ...], PlainValidator(_patterns("comm")), YamlForm(_PATTERN_SCHEMA)]
PathPatterns = Annotated[tuple[Pattern, ...], PlainValidator(_patterns("path")), YamlForm(_PATTERN_SCHEMA)]
TextPatterns = Annotated[tuple[Pattern, ...], PlainValidator(_patterns("text")), YamlForm(_PATTERN_SCHEMA)]


def parse_list(value: object) -> tuple[Pattern, ...]:
    """A named list: patterns only, for a list cannot name another."""
    if not isinstance(value, list):
        raise mistake(f"expected a list, found {shown(value)}", 'a list of texts: ["ora_*", tnslsnr]')
    return tuple(syntax.each(value, names.pattern, "a list of at least one text"))


def parse_list_name(value: object) -> str:
    """The name of a list: what can follow the $ that refers to it."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", value, re.ASCII):
        return value
    raise mistake(f"{shown(value)} is not a name for a list", "a letter, then letters, digits, _ or -, at most 64")


ListName = Annotated[
    str,
    PlainValidator(parse_list_name),
    YamlForm({"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_-]{0,63}$"}),
]
NamedList = Annotated[
    tuple[Pattern, ...],
    PlainValidator(parse_list),
    YamlForm({"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}),
]


# --- people


def _users(value: Any, info: ValidationInfo) -> tuple[int, ...]:  # noqa: ANN401
    return names.ids(value, context_of(info), "user")


def _groups(value: Any, info: ValidationInfo) -> tuple[int, ...]:  # noqa: ANN401
    return names.ids(value, context_of(info), "group")


def _user(value: Any, info: ValidationInfo) -> str | int:  # noqa: ANN401
    return names.principal(value, context_of(info), "user")


def _group(value: Any, info: ValidationInfo) -> str | int:  # noqa: ANN401
    return names.principal(value, context_of(info), "group")


_WHO_SCHEMA: Schema = {"type": ["string", "integer"], "minimum": 0, "maximum": names.HIGHEST_ID}
Users = Annotated[tuple[int, ...], PlainValidator(_users), YamlForm(one_or_list(_WHO_SCHEMA))]
Groups = Annotated[tuple[int, ...], PlainValidator(_groups), YamlForm(one_or_list(_WHO_SCHEMA))]
User = Annotated[str | int, PlainValidator(_user), YamlForm(_WHO_SCHEMA)]
Group = Annotated[str | int, PlainValidator(_group), YamlForm(_WHO_SCHEMA)]


# --- how a process ended

_CODE_PATTERN = r"^\s*(((!=|==|>=|<=|>|<)\s*)?[0-9]+|[0-9]+\s*-\s*[0-9]+)\s*$"
_CODE_SCHEMA: Schema = {
    "anyOf": [{"type": "integer", "minimum": 0, "maximum": 255}, {"type": "string", "pattern": _CODE_PATTERN}]
}
ExitCodes = Annotated[IntSet, PlainValidator(syntax.exit_codes), YamlForm(one_or_list(_CODE_SCHEMA))]

_SIGNAL_SCHEMA: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": 64},
        {"type": "string", "enum": ["any", *signals.Signals.__members__]},
        {"type": "string", "pattern": r"^([Ss][Ii][Gg])?[A-Za-z]+[0-9]*([+-][0-9]+)?$|^[0-9]+$"},
    ]
}
SignalSet = Annotated[frozenset[int], PlainValidator(syntax.signal_numbers), YamlForm(one_or_list(_SIGNAL_SCHEMA))]


# --- quantities


def _pattern_schema(pattern: str, example: str) -> Schema:
    return {"type": "string", "pattern": pattern, "examples": [example]}


_TIME = r"[0-9]+(\.[0-9]+)?\s*(ms|s|m|h|d)\s*$"
_SIZE = r"[0-9]+(\.[0-9]+)?\s*[BKMGT]?\s*$"
_OPERATOR = r"^\s*(<=|>=|==|!=|<|>)\s*"
_SIZE_SCHEMA: Schema = {"anyOf": [{"type": "integer", "minimum": 0}, _pattern_schema(rf"^\s*{_SIZE}", "64K")]}

Duration = Annotated[float, PlainValidator(syntax.duration), YamlForm(_pattern_schema(rf"^\s*{_TIME}", "30s"))]
DurationOrZero = Annotated[
    float, PlainValidator(syntax.duration_or_zero), YamlForm(_pattern_schema(rf"^\s*{_TIME}", "2ms"))
]
Size = Annotated[int, PlainValidator(syntax.size), YamlForm(_SIZE_SCHEMA)]
BufferSize = Annotated[int, PlainValidator(syntax.size_from(4096, 2**30)), YamlForm(_SIZE_SCHEMA)]
OutputSize = Annotated[int, PlainValidator(syntax.size_from(0, 2**30)), YamlForm(_SIZE_SCHEMA)]
TimeComparison = Annotated[
    Comparison,
    PlainValidator(syntax.time_comparison),
    YamlForm(_pattern_schema(_OPERATOR + _TIME, "< 5s")),
]
SizeComparison = Annotated[
    Comparison,
    PlainValidator(syntax.size_comparison),
    YamlForm(_pattern_schema(_OPERATOR + _SIZE, "> 500M")),
]


def words(*known: str) -> tuple[PlainValidator, YamlForm]:
    """The metadata of a field that takes one of a closed set of words."""
    return PlainValidator(syntax.word_of(*known)), YamlForm({"type": "string", "enum": list(known)})


def _whole(low: int, high: int) -> tuple[PlainValidator, YamlForm]:
    schema: Schema = {"type": "integer", "minimum": low, "maximum": high}
    return PlainValidator(syntax.whole(low, high)), YamlForm(schema)


Slots = Annotated[int, *_whole(1, 256)]
Count = Annotated[int, *_whole(1, 1_000_000)]
History = Annotated[int, *_whole(0, 10_000_000)]
Retries = Annotated[int, *_whole(0, 100)]
Nice = Annotated[int, *_whole(-20, 19)]
ResourceCount = Annotated[int, *_whole(0, 2**31 - 1)]
Umask = Annotated[
    int,
    PlainValidator(syntax.umask),
    YamlForm({"anyOf": [{"type": "string", "pattern": "^(0o)?0?[0-7]{1,3}$"}, {"type": "integer"}]}),
]
Flag = Annotated[bool, PlainValidator(syntax.flag), YamlForm({"type": "boolean"})]


# --- text that is written, and lists of one


TemplateText = Annotated[Template, PlainValidator(syntax.template), YamlForm({"type": "string"})]
OneAsList = BeforeValidator(as_list)

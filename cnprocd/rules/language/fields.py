"""The field types of the models: each has a parser of syntax.py and the JSON schema of its YAML form. PURE.

Each type has one PlainValidator, so pydantic never attempts the branches of a union, and a problem is one sentence. The
JSON schema describes the YAML form, not the parsed value.
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
from cnprocd.rules.language.names import Context
from cnprocd.rules.language.value_problem import did_you_mean, invalid, shown
from cnprocd.rules.ruleset import EVENT_NAMES, EventName
from cnprocd.rules.values import FIELD_NAMES, Comparison, IntSet, Pattern, Template

Schema = dict[str, Any]


class Model(BaseModel):
    """The base of all models: unknown keys are problems, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def context_of(info: ValidationInfo) -> Context:
    """Return the context of the validation, or an empty one: no lists, no users, no groups."""
    return info.context if isinstance(info.context, Context) else Context()


def one_or_list(item: Schema) -> Schema:
    """Return the JSON schema of one item or a list of at least one."""
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]}


@dataclass(frozen=True, slots=True, eq=False)
class YamlForm:
    """The JSON schema of the YAML form.

    pydantic's WithJsonSchema is not enough: up to 2.10, the fields that share one write their defaults into it.
    """

    schema: Schema

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return deepcopy(self.schema)


@dataclass(frozen=True, slots=True)
class OneOrListOf:
    """Mark a tuple field that may be written as a single item, for the JSON schema."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        array = handler(core)
        return {"anyOf": [array["items"], array]}


@dataclass(frozen=True, slots=True)
class OrBoolean:
    """Mark a model field that may be true or false instead, for the JSON schema."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return {"anyOf": [{"type": "boolean"}, handler(core)]}


@dataclass(frozen=True, slots=True)
class OrDuration:
    """Mark a model field that may be a plain duration instead, for the JSON schema."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return {"anyOf": [_pattern_schema(rf"^\s*{_TIME}", "10m"), handler(core)]}


def as_list(value: object) -> object:
    """Return a single item as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


# Events.

ACCEPT_EVENTS = f"{', '.join(EVENT_NAMES)}, or a list of these, or all"


def parse_events(value: object) -> tuple[EventName, ...]:
    """Return event names in the order of EVENT_NAMES. `all` must be alone and means every event."""

    def one(item: object) -> EventName:
        for name in EVENT_NAMES:
            if item == name:
                return name
        hint = did_you_mean(item, EVENT_NAMES) if isinstance(item, str) else ""
        raise invalid(f"unknown event: {shown(item)}", ACCEPT_EVENTS, hint)

    if value in ("all", ["all"]):
        return EVENT_NAMES
    chosen = set(syntax.each(value, one, ACCEPT_EVENTS))
    return tuple(name for name in EVENT_NAMES if name in chosen)


Events = Annotated[
    tuple[EventName, ...],
    PlainValidator(parse_events),
    YamlForm(one_or_list({"type": "string", "enum": [*EVENT_NAMES, "all"]})),
]


# Patterns.


def _patterns(kind: names.AttributeKind) -> Callable[[Any, ValidationInfo], tuple[Pattern, ...]]:
    def parse(value: Any, info: ValidationInfo) -> tuple[Pattern, ...]:  # noqa: ANN401 (a YAML value)
        return names.patterns(value, context_of(info), kind)

    return parse


_PATTERN_SCHEMA = one_or_list({"type": "string", "minLength": 1})
CommPatterns = Annotated[tuple[Pattern, ...], PlainValidator(_patterns("comm")), YamlForm(_PATTERN_SCHEMA)]
PathPatterns = Annotated[tuple[Pattern, ...], PlainValidator(_patterns("path")), YamlForm(_PATTERN_SCHEMA)]
TextPatterns = Annotated[tuple[Pattern, ...], PlainValidator(_patterns("text")), YamlForm(_PATTERN_SCHEMA)]


def parse_list(value: object) -> tuple[Pattern, ...]:
    """Return the patterns of a named list. A list cannot refer to another list."""
    if not isinstance(value, list):
        raise invalid(f"expected a list, found {shown(value)}", 'a list of texts: ["ora_*", tnslsnr]')
    return tuple(syntax.each(value, names.pattern, "a list of at least one text"))


def parse_list_name(value: object) -> str:
    """Return the name of a list: the text that follows $ in a reference."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", value, re.ASCII):
        return value
    raise invalid(f"invalid list name: {shown(value)}", "a letter or _, then letters, digits, _ or -, at most 64")


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


# Users and groups.


def _users(value: Any, info: ValidationInfo) -> tuple[int | str, ...]:  # noqa: ANN401
    return names.ids(value, context_of(info), "user")


def _login_users(value: Any, info: ValidationInfo) -> tuple[int | str, ...]:  # noqa: ANN401
    return names.login_ids(value, context_of(info))


def _groups(value: Any, info: ValidationInfo) -> tuple[int | str, ...]:  # noqa: ANN401
    return names.ids(value, context_of(info), "group")


def _user(value: Any, info: ValidationInfo) -> str | int:  # noqa: ANN401
    return names.principal(value, context_of(info), "user")


def _group(value: Any, info: ValidationInfo) -> str | int:  # noqa: ANN401
    return names.principal(value, context_of(info), "group")


_PRINCIPAL_SCHEMA: Schema = {"type": ["string", "integer"], "minimum": 0, "maximum": names.HIGHEST_ID}
Users = Annotated[tuple[int | str, ...], PlainValidator(_users), YamlForm(one_or_list(_PRINCIPAL_SCHEMA))]
LoginUsers = Annotated[tuple[int | str, ...], PlainValidator(_login_users), YamlForm(one_or_list(_PRINCIPAL_SCHEMA))]
Groups = Annotated[tuple[int | str, ...], PlainValidator(_groups), YamlForm(one_or_list(_PRINCIPAL_SCHEMA))]
User = Annotated[str | int, PlainValidator(_user), YamlForm(_PRINCIPAL_SCHEMA)]
Group = Annotated[str | int, PlainValidator(_group), YamlForm(_PRINCIPAL_SCHEMA)]


# Exit statuses.

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


# Durations, sizes and numbers.


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
    """Return the metadata of a field that takes one of a closed set of words."""
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


# Fields of the record, templates, and lists of one.


def parse_record(value: object) -> tuple[str, ...]:
    """Return names of fields of the record, without duplicates."""
    return tuple(dict.fromkeys(syntax.each(value, syntax.word_of(*FIELD_NAMES), "fields of the record, such as exe")))


RecordFields = Annotated[
    tuple[str, ...],
    PlainValidator(parse_record),
    YamlForm(one_or_list({"type": "string", "enum": list(FIELD_NAMES)})),
]


TemplateText = Annotated[Template, PlainValidator(syntax.template), YamlForm({"type": "string"})]
OneAsList = BeforeValidator(as_list)

"""The rule language: frozen pydantic models of a rule file, and their JSON schema. PURE.

The models hold parsed values (values.py); fields.py has the parser of each. A check of one field belongs to its type. A
check across fields is a validator of the first model that has them all, and runs even if other fields are invalid. The
descriptions here are the source of the manual page and of the editor's schema. A field whose name has a unit
(`timeout_s`) has the YAML key (`timeout`) as its alias, and its default is in YAML form.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from cnprocd.rules.language import syntax
from cnprocd.rules.language.actions import Directory, HookModel, Level, LogModel, parse_log
from cnprocd.rules.language.condition import ConditionModel, never_matches
from cnprocd.rules.language.fields import (
    BufferSize,
    Count,
    Duration,
    DurationOrZero,
    Events,
    Flag,
    History,
    ListName,
    Model,
    NamedList,
    OrBoolean,
    OrDuration,
    RecordFields,
    Slots,
    YamlForm,
    words,
)
from cnprocd.rules.language.syntax import duration
from cnprocd.rules.language.value_problem import InvalidValueError, invalid, shown
from cnprocd.rules.ruleset import BY_FIELDS, ByField

By = Annotated[ByField, *words(*BY_FIELDS)]
RULE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"


class RateLimitModel(Model):
    """At most `count` matches in each period `per`, counted per rule or per value of an attribute."""

    count: Count = Field(description="The number of matches that pass in each period.")
    per_s: Duration = Field(alias="per", description="The length of the period.")
    by: By = Field(
        default="rule",
        description="The field that is counted by; matches in which it is unknown share one count. Default: the whole "
        "rule.",
    )


class CooldownModel(Model):
    """No further match for a time after one that passed, per rule or per value of a field."""

    for_s: Duration = Field(alias="for", description="The time in which further matches are dropped.")
    by: By = Field(
        default="rule",
        description="The field whose values are held back separately; a match in which it is unknown passes. Default: "
        "the whole rule.",
    )


class CoalesceModel(Model):
    """One run of the hook for all matches in a window. It gets all of them on its standard input."""

    window_s: Duration = Field(
        alias="window", description="The length of the window, which begins with the first match."
    )
    max: Count = Field(default=1000, description="The number of matches at which the window ends early.")
    by: By = Field(
        default="rule",
        description="The field whose values are gathered separately; a match in which it is unknown has a run of its "
        "own. Default: the whole rule.",
    )


class AfterModel(Model):
    """Escalation: the rule acts only at the n-th match within a period."""

    count: Count = Field(description="The number of the match at which the rule acts.")
    within_s: Duration = Field(
        alias="within", description="The period that must contain the matches, by the kernel's time of the events."
    )
    by: By = Field(
        default="rule",
        description="The field that is counted by; a match in which it is unknown is not counted with others. Default: "
        "the whole rule.",
    )


def _parse_cooldown(value: object) -> object:
    """Return the cooldown of the whole rule for a plain duration."""
    return value if isinstance(value, dict | CooldownModel) else CooldownModel.model_construct(for_s=duration(value))


def _parse_rule_name(value: object) -> str:
    accepted = "a letter or digit, then letters, digits, _ . or -, at most 64 in all"
    name = syntax.text(value, accepted)
    if not re.fullmatch(RULE_NAME, name, re.ASCII):
        raise invalid(f"invalid rule name: {shown(name)}", accepted)
    return name


RuleName = Annotated[str, PlainValidator(_parse_rule_name), YamlForm({"type": "string", "pattern": f"^{RULE_NAME}$"})]
Description = Annotated[
    str,
    PlainValidator(lambda value: value if value == "" else syntax.text(value, "text")),
    YamlForm({"type": "string"}),
]


class RuleModel(Model):
    """One rule: which events of which processes, and the actions for them."""

    name: RuleName = Field(
        description="The name of the rule, unique in all files. Every log record of the rule has it."
    )
    description: Description = Field(default="", description="The purpose of the rule, in one line.")
    enabled: Flag = Field(default=True, description="false disables the rule but keeps it in the file.")
    events: Events = Field(description="The events that the rule matches: a name, a list, or all.")
    match: ConditionModel | None = Field(
        default=None, description="The condition: every key must hold. Default: any process."
    )
    threads: Flag = Field(default=False, description="Match the events of single threads instead of processes.")
    include_hooks: Flag = Field(
        default=False, description="Also match hooks and the processes that they start. Beware of loops."
    )
    on_unknown_exit: Annotated[Literal["match", "log", "ignore"], *words("match", "log", "ignore")] = Field(
        default="log",
        description="If a process ended while events were lost, its status is unknown: match it as a failure, only log "
        "it, or ignore it.",
    )
    rate_limit: RateLimitModel | None = Field(default=None, description="Drop matches above a rate.")
    cooldown: Annotated[CooldownModel | None, BeforeValidator(_parse_cooldown), OrDuration()] = Field(
        default=None,
        description="The time after a match in which further matches are dropped: 10m, or {for: 10m, by: unit}.",
    )
    coalesce: CoalesceModel | None = Field(default=None, description="Run the hook once for several matches.")
    after: AfterModel | None = Field(default=None, description="Act only at the n-th match within a period.")
    resets_s: Duration | None = Field(
        default=None,
        alias="resets",
        description="The time without a match after which the count of after is reset. Default: the value of within.",
    )
    record: RecordFields = Field(
        default_factory=tuple,
        description="Fields that the record of a match shall have, such as exe, cmdline, unit or ancestors. Without it "
        "the record has what the other keys name, and what costs nothing. cnprocctl explain shows the price.",
    )
    log: Annotated[LogModel | None, BeforeValidator(parse_log), OrBoolean()] = Field(
        default=True,
        validate_default=True,
        description="The log record of a match: true, false, or its level and message.",
    )
    run: HookModel | None = Field(default=None, description="The hook to run.")

    @field_validator("match")
    @classmethod
    def _can_match(cls, match: ConditionModel | None, info: ValidationInfo) -> ConditionModel | None:
        # A validator of the field, not of the model: it must run even if another field of the rule is invalid.
        if match is not None and "events" in info.data:
            found = tuple(never_matches(match, info.data["events"]))
            if found:
                raise InvalidValueError(*found)
        return match

    @model_validator(mode="after")
    def _together(self) -> RuleModel:
        if self.resets_s is not None and self.after is None:
            raise invalid("resets has no effect without after", key="resets")
        if self.coalesce is not None and self.run is None:
            raise invalid("coalesce has no effect without run", key="coalesce")
        return self


class SettingsModel(Model):
    """Settings of the daemon, allowed only in the main file."""

    hook_slots: Slots = Field(default=8, description="The maximum number of hooks that run at once, of all rules.")
    receive_buffer_bytes: BufferSize = Field(
        default="32M",
        validate_default=True,
        alias="receive_buffer",
        description="The size of the socket's receive buffer. A queued event takes 832 bytes.",
    )
    queue_limit: Count = Field(
        default=10_000,
        description="The maximum number of waiting jobs, of all rules. If it is reached, the rule with the most "
        "waiting jobs drops its newest one, which is logged.",
    )
    history_count: History = Field(
        default=10_000, description="The maximum number of finished jobs that are kept, and that of past matches."
    )
    history_age_s: Duration = Field(
        default="7d",
        validate_default=True,
        alias="history_age",
        description="The time for which finished jobs and matches are kept, counted while the machine runs.",
    )
    gather_s: DurationOrZero = Field(
        default="2ms",
        validate_default=True,
        alias="gather",
        description="Under load, the time for which events are gathered before they are read together; five times "
        "as long while no attribute is read from /proc, 25 times if no rule needs one, no rule runs a hook and no "
        "client watches. 0s: never wait.",
    )
    record: RecordFields = Field(
        default_factory=tuple, description="Fields that the record of every match shall have; see record of a rule."
    )
    log_level: Level = Field(default="info", description="The lowest level of the log records that are written.")
    metrics_file: Directory | None = Field(
        default=None, description="The .prom file to which metrics are written, for Prometheus's node_exporter."
    )


class RuleFileModel(Model):
    """A rule file of cnprocd: settings, named lists and rules."""

    settings: SettingsModel = Field(default_factory=SettingsModel, description="The settings, only in the main file.")
    lists: dict[ListName, NamedList] = Field(
        default_factory=dict, description='Named lists of patterns, used as "$name". All files share them.'
    )
    rules: tuple[RuleModel, ...] = Field(default=(), description="The rules. An event can match several.")


class _EditorSchema(GenerateJsonSchema):
    """Removes null: it means "not given" in a model and is not accepted in a file."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        described = super().default_schema(schema)
        if schema.get("default") in (None, ()) or isinstance(schema["default"], Model):
            described.pop("default", None)
        return described


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a rule file, with a description of every key."""
    schema = RuleFileModel.model_json_schema(by_alias=True, schema_generator=_EditorSchema)
    # Editors show the definitions' names: "Hook", not "HookModel".
    schema = json.loads(re.sub(r'(?<=["/])([A-Z][A-Za-z]*)Model(?=")', r"\1", json.dumps(schema)))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

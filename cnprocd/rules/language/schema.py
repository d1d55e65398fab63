"""The rule language: frozen pydantic models of a rule file, and the JSON schema of what a person may write.

Strategy: the models hold parsed values only (values.py); fields.py says how each is read. A check of one field lives
with its type, a check across fields is a validator of the first model that sees them all, and runs even when other
fields are wrong. Descriptions are written once, here: the man page and editors are made of them. A field whose
name carries a unit (`timeout_s`) has the plain YAML key (`timeout`) as its alias, and its default is in YAML form.
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
    Slots,
    YamlForm,
    words,
)
from cnprocd.rules.language.mistakes import MistakeError, mistake, shown

RULE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"


class RateLimitModel(Model):
    """At most `count` matches in every `per`, counted per rule or per value of an attribute."""

    count: Count = Field(description="How many matches pass in each period.")
    per_s: Duration = Field(alias="per", description="The length of the period.")
    by: Annotated[Literal["rule", "comm", "user", "unit"], *words("rule", "comm", "user", "unit")] = Field(
        default="rule", description="What has a budget of its own: the whole rule, or each comm, user or unit."
    )


class CoalesceModel(Model):
    """One run of the hook for the matches of a window, all of them on its standard input."""

    window_s: Duration = Field(alias="window", description="How long matches are gathered after the first.")
    max: Count = Field(default=1000, description="The window closes early at this many matches.")


class AfterModel(Model):
    """Escalation: the rule fires only at the n-th match within a period."""

    count: Count = Field(description="The match at which the rule fires.")
    within_s: Duration = Field(alias="within", description="The period in which the matches must fall.")


def _parse_rule_name(value: object) -> str:
    accepted = "a letter or digit, then letters, digits, _ . or -, at most 64 in all"
    name = syntax.text(value, accepted)
    if not re.fullmatch(RULE_NAME, name, re.ASCII):
        raise mistake(f"{shown(name)} is not a rule name", accepted)
    return name


RuleName = Annotated[str, PlainValidator(_parse_rule_name), YamlForm({"type": "string", "pattern": f"^{RULE_NAME}$"})]
Description = Annotated[
    str,
    PlainValidator(lambda value: value if value == "" else syntax.text(value, "text")),
    YamlForm({"type": "string"}),
]


class RuleModel(Model):
    """One rule: which events of which processes, and what is done about them."""

    name: RuleName = Field(description="The name of the rule, unique over all files; it appears in every record.")
    description: Description = Field(default="", description="What the rule is for, in one line.")
    enabled: Flag = Field(default=True, description="false keeps the rule in the file but out of work.")
    events: Events = Field(description="The events the rule looks at: a name, a list, or all.")
    match: ConditionModel | None = Field(
        default=None, description="What must hold; every key must. Left out: any process."
    )
    threads: Flag = Field(default=False, description="Look at the events of single threads too, not only of processes.")
    include_hooks: Flag = Field(default=False, description="Look at hooks, and what they start, too. Beware of loops.")
    on_unknown_exit: Annotated[Literal["match", "log", "ignore"], *words("match", "log", "ignore")] = Field(
        default="log",
        description="When a process vanished while events were lost and its status is unknown: match as a failure, "
        "only log it, or ignore it.",
    )
    rate_limit: RateLimitModel | None = Field(default=None, description="Hold back matches above a rate.")
    cooldown_s: Duration | None = Field(
        default=None, alias="cooldown", description="After a match passed, hold back the next ones for so long."
    )
    coalesce: CoalesceModel | None = Field(default=None, description="Run the hook once for many matches.")
    after: AfterModel | None = Field(default=None, description="Fire only at the n-th match within a period.")
    resets_s: Duration | None = Field(
        default=None,
        alias="resets",
        description="The count of after is forgotten after so long without a match; by default as long as within.",
    )
    log: Annotated[LogModel | None, BeforeValidator(parse_log), OrBoolean()] = Field(
        default=True,
        validate_default=True,
        description="The record written for a match: true, false, or its level and message.",
    )
    run: HookModel | None = Field(default=None, description="The hook to run.")

    @field_validator("match")
    @classmethod
    def _can_match(cls, match: ConditionModel | None, info: ValidationInfo) -> ConditionModel | None:
        # A validator of the field, not of the model: it must speak even when another field of the rule is wrong.
        if match is not None and "events" in info.data:
            found = tuple(never_matches(match, info.data["events"]))
            if found:
                raise MistakeError(*found)
        return match

    @model_validator(mode="after")
    def _together(self) -> RuleModel:
        if self.resets_s is not None and self.after is None:
            raise mistake("resets says when the count of after is forgotten, and there is no after", key="resets")
        if self.coalesce is not None and self.run is None:
            raise mistake("coalesce gathers matches for one hook, and the rule has no run", key="coalesce")
        return self


class SettingsModel(Model):
    """Settings of the daemon; only the main file may have them."""

    hook_slots: Slots = Field(default=8, description="How many hooks may run at once, all rules together.")
    receive_buffer_bytes: BufferSize = Field(
        default="32M",
        validate_default=True,
        alias="receive_buffer",
        description="The socket's receive buffer; each event that waits takes 832 bytes of it.",
    )
    queue_limit: Count = Field(default=10_000, description="How many jobs may wait; further ones are shed, and said.")
    history_count: History = Field(default=10_000, description="How many finished jobs are kept to be looked at.")
    history_age_s: Duration = Field(
        default="7d", validate_default=True, alias="history_age", description="How long finished jobs are kept."
    )
    gather_s: DurationOrZero = Field(
        default="2ms",
        validate_default=True,
        alias="gather",
        description="Under load, how long events are gathered before they are read in one go, and five times as long "
        "where no rule needs what only /proc tells; 0s to never wait.",
    )
    log_level: Level = Field(default="info", description="The least severe records that are written.")
    metrics_file: Directory | None = Field(
        default=None, description="Where metrics are written for Prometheus's node_exporter, as a .prom file."
    )


class RuleFileModel(Model):
    """A rule file of cnprocd: settings, named lists and rules."""

    settings: SettingsModel = Field(default=SettingsModel(), description="Settings of the daemon (main file only).")
    lists: dict[ListName, NamedList] = Field(
        default_factory=dict, description='Named lists of patterns, for use as "$name"; all files share them.'
    )
    rules: tuple[RuleModel, ...] = Field(default=(), description="The rules; an event may match several.")


class _EditorSchema(GenerateJsonSchema):
    """None is how a model says "not given"; in a file nobody writes null, so the schema does not offer it."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        described = super().default_schema(schema)
        if schema.get("default") in (None, ()) or isinstance(schema["default"], Model):
            described.pop("default", None)
        return described


def json_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a rule file as a person writes it, with a description on every key."""
    schema = RuleFileModel.model_json_schema(by_alias=True, schema_generator=_EditorSchema)
    # Editors show the definitions' names: "Hook", not "HookModel".
    schema = json.loads(re.sub(r'(?<=["/])([A-Z][A-Za-z]*)Model(?=")', r"\1", json.dumps(schema)))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

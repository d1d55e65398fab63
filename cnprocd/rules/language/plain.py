"""Convert validated models to the plain values of ruleset.py, which the daemon uses. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cnprocd.rules import ruleset
from cnprocd.rules.language.actions import BackoffModel, HookModel, LogModel, ResourceLimitsModel
from cnprocd.rules.language.condition import ConditionModel, ProcessConditionModel
from cnprocd.rules.language.fields import Model
from cnprocd.rules.language.schema import (
    AfterModel,
    CoalesceModel,
    CooldownModel,
    RateLimitModel,
    RuleModel,
    SettingsModel,
)

VALUE_CLASSES: Mapping[type[Model], type] = {
    RuleModel: ruleset.Rule,
    ConditionModel: ruleset.Condition,
    ProcessConditionModel: ruleset.ProcessCondition,
    LogModel: ruleset.RuleLog,
    HookModel: ruleset.Hook,
    BackoffModel: ruleset.Backoff,
    ResourceLimitsModel: ruleset.ResourceLimits,
    RateLimitModel: ruleset.RateLimit,
    CooldownModel: ruleset.Cooldown,
    CoalesceModel: ruleset.Coalesce,
    AfterModel: ruleset.After,
    SettingsModel: ruleset.Settings,
}
"""Each class has the fields of its model. Fields that take no part in a comparison are added: `given` of a Hook (the
keys that the file has) and `record_by_settings` of a Rule.
"""


def plain(value: Any) -> Any:  # noqa: ANN401  # any value of a model
    """Return the plain value of a model, and of the models in it. Any other value is returned unchanged."""
    if isinstance(value, tuple):
        return tuple(plain(one) for one in value)
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if not isinstance(value, Model):
        return value
    made = VALUE_CLASSES[type(value)]
    known = {one.name: plain(getattr(value, one.name)) for one in fields(made) if one.compare}
    return made(**known, given=frozenset(value.model_fields_set)) if made is ruleset.Hook else made(**known)

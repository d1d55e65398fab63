"""The plain values and their models: the same fields, and nothing of pydantic in the values."""

import pickle
from dataclasses import fields, is_dataclass

import pytest
from pydantic import BaseModel
from unit.hookkit import HOOK

from cnprocd.rules.language import schema
from cnprocd.rules.language.actions import HookModel
from cnprocd.rules.language.fields import Model
from cnprocd.rules.language.plain import VALUE_CLASSES, plain
from cnprocd.rules.language.schema import RuleFileModel
from cnprocd.rules.ruleset import given_keys

MODELS = [one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, Model) and one is not Model]
EVERYTHING = {
    "settings": {"hook_slots": 3, "metrics_file": "/run/x.prom"},
    "lists": {"dbs": ["ora_*", "/^pg/i"]},
    "rules": [
        {
            "name": "full",
            "events": "all",
            "match": {
                "comm": ["ora_*", "a"], "exe": "/usr/*", "user": 0, "exit_code": "1-3", "signal": "any",
                "parent": {"comm": "x", "not": {"unit": "a.service"}}, "ancestor": {"any": [{"comm": "y"}]},
                "not": [{"core_dumped": True}], "any": [{"lifetime": "< 5s"}, {"max_rss": "> 1M"}],
                "all": [{"cpu_time": "> 1s"}, {"exit_status": "known"}],
            },
            "rate_limit": {"count": 3, "per": "1m", "by": "comm"}, "coalesce": {"window": "1s"},
            "cooldown": {"for": "1s", "by": "unit"}, "after": {"count": 2, "within": "5s"}, "resets": "9s",
            "log": {"level": "error", "message": "{comm}"},
            "run": {
                "command": ["/bin/true", "{pid}"], "env": {"A": "{comm}"}, "limits": {"open_files": 5},
                "backoff": {"initial": "2s"}, "on_failure": {"level": "critical"}, "deadline": "9m",
            },
        },
        {"name": "bare", "events": "exit", "log": False},
    ],
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_model_has_its_plain_class_with_the_same_fields(model):
    if model is RuleFileModel:
        return  # load.py takes it apart
    made = VALUE_CLASSES[model]
    assert {one.name for one in fields(made) if one.compare} == set(model.model_fields)


def leaves(value):
    if is_dataclass(value):
        value = [getattr(value, one.name) for one in fields(value)]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def compare(model, made):
    """Field by field, down to the values."""
    if isinstance(model, BaseModel):
        assert type(made) is VALUE_CLASSES[type(model)]
        for name in type(model).model_fields:
            compare(getattr(model, name), getattr(made, name))
    elif isinstance(model, (list, tuple)):
        assert len(model) == len(made)
        for one, other in zip(model, made, strict=True):
            compare(one, other)
    else:
        assert model == made


def test_rules_arrive_complete_and_without_pydantic():
    models = RuleFileModel.model_validate(EVERYTHING)
    for model, made in ((models.rules, plain(models.rules)), (models.settings, plain(models.settings))):
        compare(model, made)
        assert not any(isinstance(leaf, BaseModel) for leaf in leaves(made))
        assert pickle.loads(pickle.dumps(made)) == made


def test_given_keys_are_those_of_the_file():
    full, bare = plain(RuleFileModel.model_validate(EVERYTHING).rules)
    assert set(given_keys(full.match)) == {key.replace("not", "not_") for key in EVERYTHING["rules"][0]["match"]}
    assert given_keys(full.match.not_[0]) == ("core_dumped",)
    assert "timeout_s" not in full.run.given
    assert {"deadline_s", "backoff"} <= full.run.given
    assert (bare.match, bare.log) == (None, None)


def test_the_hook_of_the_tests_has_the_defaults_of_the_language():
    assert plain(HookModel.model_validate({"command": ["/bin/true"]})) == HOOK

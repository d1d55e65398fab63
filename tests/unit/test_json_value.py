"""Accessors for JSON values: each returns the type that its name promises, or an error that names the path."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.json_value import (
    JsonError,
    JsonValue,
    as_bool,
    as_dict,
    as_int,
    as_list,
    as_number,
    as_str,
    get_bool,
    get_choice,
    get_dict,
    get_dict_or_none,
    get_int,
    get_int_or_none,
    get_list,
    get_map,
    get_number,
    get_number_or_none,
    get_str,
    get_str_or_none,
    get_with,
    list_of,
    map_of,
    parse_json,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ACCESSORS = (get_str, get_bool, get_int, get_number, get_dict)


def attempts(job):
    return get_int(as_dict(job), "attempts")


@pytest.mark.parametrize(
    ("read", "value", "text"),
    [
        (lambda v: get_list(v, "jobs", attempts), {"jobs": [{"attempts": 1}, {"attempts": "1"}]},
         "jobs[1].attempts: expected an integer, found a string"),
        (lambda v: get_list(v, "jobs", attempts), {"jobs": [{}]}, "jobs[0].attempts: the key is missing"),
        (lambda v: get_list(v, "jobs", attempts), {"jobs": {}}, "jobs: expected an array, found an object"),
        (lambda v: get_list(v, "jobs", attempts), {"jobs": "text"}, "jobs: expected an array, found a string"),
        (lambda v: get_map(v, "rules", as_int), {"rules": {"a b": None}},
         'rules["a b"]: expected an integer, found null'),
        (lambda v: get_with(v, "a", lambda a: get_with(as_dict(a), "b", as_str)), {"a": {"b": 1.5}},
         "a.b: expected a string, found a number"),
        (list_of(list_of(as_bool)), [[True], [False, 0]], "[1][1]: expected true or false, found an integer"),
        (as_int, True, "expected an integer, found a boolean"),
        (as_number, False, "expected a number, found a boolean"),
        (as_number, parse_json("NaN"), "expected a number, found nan"),
        (as_int, 1.0, "expected an integer, found a number"),
        (as_dict, [], "expected an object, found an array"),
        (as_str, b"x", "expected a string, found bytes"),
        (lambda v: get_int(v, "limit", minimum=1, maximum=9), {"limit": 10},
         "limit: expected an integer from 1 to 9, found 10"),
        (lambda v: get_int(v, "limit", minimum=1), {"limit": 0}, "limit: expected an integer of at least 1, found 0"),
        (lambda v: get_int(v, "limit", maximum=9), {"limit": "x"},
         "limit: expected an integer of at most 9, found a string"),
        (lambda v: get_choice(v, "state", ("dead", "done")), {"state": "lost"},
         'state: expected one of dead, done, found "lost"'),
        (lambda v: get_str(v, "a", "x"), {"a": None}, "a: expected a string, found null"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_reported_with_its_path(read, value, text):
    with pytest.raises(JsonError) as caught:
        read(value)
    assert str(caught.value) == text


def test_a_right_value_is_returned_as_it_is():
    record = {"text": "a", "flag": False, "count": 3, "share": 0.5, "names": ["a", "b"], "inner": {"x": 1}}
    assert get_str(record, "text") == "a"
    assert get_choice(record, "text", ("a", "b")) == "a"
    assert get_bool(record, "flag") is False
    assert get_int(record, "count", minimum=3, maximum=3) == 3
    assert (get_number(record, "share"), get_number(record, "count")) == (0.5, 3)
    assert get_list(record, "names", as_str) == ["a", "b"]
    assert get_dict(record, "inner") == get_map(record, "inner", as_int) == {"x": 1}


def test_a_default_stands_for_a_missing_key_only():
    assert get_str({}, "a", "") == ""
    assert get_bool({}, "a", False) is False
    assert get_int({}, "a", 0, minimum=1) == 0
    assert get_number({}, "a", 0.0) == 0
    assert get_list({}, "a", as_str, ()) == []
    assert get_map({}, "a", as_str, {}) == get_dict({}, "a", {}) == {}
    assert get_choice({}, "a", ("x",), "other") == "other"


@pytest.mark.parametrize("read", [get_str_or_none, get_int_or_none, get_number_or_none, get_dict_or_none])
def test_an_optional_value_may_be_null_or_missing_not_wrong(read):
    assert read({}, "a") is None
    assert read({"a": None}, "a") is None
    with pytest.raises(JsonError, match=r"^a: expected"):
        read({"a": True}, "a")


@pytest.mark.parametrize("text", ["", "{", "[1,]", b"\xff", "[" * 100_000])
def test_text_that_is_not_json_is_an_error(text):
    with pytest.raises(JsonError, match=r"^invalid JSON"):
        parse_json(text)


@given(VALUES)
def test_every_value_has_the_type_its_accessor_returns(value):
    """One accessor accepts what Python's own type says, and every other one refuses it."""
    assert parse_json(json.dumps(value)) == value
    types = {as_str: (str,), as_bool: (bool,), as_int: (int,), as_number: (int, float), as_list: (list,)}
    for read, accepted in (types | {as_dict: (dict,)}).items():
        if type(value) in accepted:
            assert read(value) == value
        else:
            with pytest.raises(JsonError) as caught:
                read(value)
            assert caught.value.path == ""


@given(VALUES, st.sampled_from(ACCESSORS))
def test_accessors_raise_json_errors_and_nothing_else(value, read):
    try:
        assert read({"key": value}, "key") == value
    except JsonError as error:
        assert str(error).startswith("key: ")  # both ends are right, for different values


@st.composite
def nested(draw):
    """A value with one wrong leaf, the function that reads it, and the path to the leaf."""
    value: JsonValue = "wrong"
    read: Callable[[JsonValue], object] = as_int
    path = ""
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            index = draw(st.integers(0, 3))
            good = _good(value)
            value, read = [*[good] * index, value, good], list_of(read)
            step = f"[{index}]"
        else:
            step = draw(st.sampled_from(["a", "rule_name", "x1"]))
            value, read = {"before": _good(value), step: value}, map_of(read)
        path = step + ("." if path and not path.startswith("[") else "") + path
    return value, read, path


def _good(value):
    if isinstance(value, list):
        return [_good(item) for item in value]
    if isinstance(value, dict):
        return {key: _good(item) for key, item in value.items()}
    return 1


@given(nested())
def test_the_path_leads_to_the_wrong_value_from_outside(case):
    value, read, path = case
    assert read(_good(value)) == _good(value)
    with pytest.raises(JsonError) as caught:
        read(value)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.problem}".removeprefix(": ")


def test_a_number_above_every_float_is_returned_as_it_is():
    """Found by fuzzing the frames between daemon and runner: it must not raise OverflowError."""
    assert as_number(10**400) == 10**400

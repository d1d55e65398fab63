"""Messages: a packed value comes back for every way to cut the stream; no bytes do more than end the connection."""

import contextlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.control.protocol import (
    MAX_MESSAGE,
    Call,
    Decoder,
    Failure,
    ProtocolError,
    Reply,
    method_of,
    pack,
    to_call,
    to_reply,
)
from cnprocd.json_value import JsonObject

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
parameters = st.dictionaries(st.text(), json_values, max_size=4)
arguments = st.dictionaries(st.text(), json_values.filter(lambda value: value is not None), max_size=4)
calls = st.builds(Call, st.text(), arguments, st.booleans(), st.booleans())
replies = st.one_of(
    st.builds(Reply, parameters, st.booleans()),
    st.builds(
        Failure,
        st.text(),
        st.text(),
        st.text(),
        st.integers(0, 255),
        st.dictionaries(st.text().filter(lambda t: t not in ("what", "hint", "status")), json_values, max_size=3),
    ),
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def objects(pieces: list[bytes]) -> list[JsonObject]:
    decoder, found = Decoder(), []
    for piece in pieces:
        decoder.feed(piece)
        while (one := decoder.next()) is not None:
            found.append(one)
    assert not decoder.partial
    return found


@given(st.lists(calls, max_size=5), st.lists(st.integers(0, 10_000), max_size=8))
def test_calls_survive_any_cutting(sent, places):
    data = b"".join(map(pack, sent))
    assert [to_call(one) for one in objects(cut(data, places))] == sent


@given(st.lists(replies, max_size=5), st.lists(st.integers(0, 10_000), max_size=8))
def test_replies_survive_any_cutting(sent, places):
    data = b"".join(map(pack, sent))
    assert [to_reply(one) for one in objects(cut(data, places))] == sent


@given(st.binary(max_size=400))
def test_garbage_raises_nothing_but_a_protocol_error(data):
    decoder = Decoder()
    decoder.feed(data)
    try:
        while (one := decoder.next()) is not None:
            to_call(one)
    except ProtocolError:
        pass


@given(json_values)
def test_any_json_is_a_call_or_a_protocol_error(value):
    decoder = Decoder()
    decoder.feed(json.dumps(value).encode() + b"\0")
    with pytest.raises(ProtocolError):
        one = decoder.next()
        assert one is not None
        to_call(one)


@pytest.mark.parametrize("piece", [1, 1000, MAX_MESSAGE + 1])
def test_a_message_without_end_is_refused_at_the_limit(piece):
    decoder, fed = Decoder(), 0
    with pytest.raises(ProtocolError, match="longer than"):
        for _ in range(0, MAX_MESSAGE + 1, max(piece, 10_000)):
            decoder.feed(b"x" * max(piece, 10_000))
            fed += max(piece, 10_000)
            assert decoder.next() is None
    assert fed <= MAX_MESSAGE + 10_000


def test_the_longest_message_is_read():
    decoder = Decoder()
    decoder.feed(pack(Reply({"t": "x" * (MAX_MESSAGE - len('{"parameters":{"t":""}}'))})) + b"{}\0")
    assert decoder.next() is not None
    assert decoder.next() == {}


@pytest.mark.parametrize("payload", [b"", b"[" * 100_000, b"1" * 10_000, b"\xff", b"{", b"[]", b'"x"', b"nul"])
def test_what_is_not_an_object_is_refused(payload):
    decoder = Decoder()
    decoder.feed(payload + b"\0")
    with pytest.raises(ProtocolError):
        decoder.next()


def test_an_answer_over_the_limit_is_refused_with_the_way_out():
    with pytest.raises(ProtocolError, match="--limit"):
        pack(Reply({"text": "x" * MAX_MESSAGE}))


def test_a_verb_is_a_method_in_camel_case():
    assert method_of("retry_dead") == "io.cnprocd.RetryDead"


@pytest.mark.parametrize(
    "call", [{}, {"method": 1}, {"method": "a", "parameters": []}, {"method": "a", "upgrade": True}]
)
def test_what_is_no_call_is_refused(call):
    with pytest.raises(ProtocolError, match="invalid call"):
        to_call(call)


def test_errors_of_another_service_have_their_name_as_text():
    failure = to_reply({"error": "org.example.Bad", "parameters": {"a": 1}})
    assert failure == Failure("org.example.Bad", "org.example.Bad", details={"a": 1})


NESTED = ['{"method":"x","parameters":{"a":%s}}', '{"a":%s}', '{"error":"a.b.C","parameters":%s}']


@pytest.mark.parametrize("text", NESTED)
@pytest.mark.parametrize("depth", [62, 63, 900, 975, 985, 990])
def test_found_by_fuzzing_deep_nesting_is_refused(text, depth):
    """json.loads accepts a depth at which json.dumps, deeper in the calls, raises RecursionError."""
    decoder = Decoder()
    decoder.feed((text % ("[" * depth + "]" * depth)).encode() + b"\0")
    with contextlib.suppress(ProtocolError):
        value = decoder.next()
        assert depth <= 63
        for read in (to_call, to_reply):
            with contextlib.suppress(ProtocolError):
                read(value)
        assert pack(Reply(value))
        return
    assert depth >= 62


def test_a_parameter_that_is_null_is_as_one_that_is_absent():
    """The interface has `limit: ?int`, and programs with generated code send all members."""
    call = to_call({"method": "io.cnprocd.History", "parameters": {"limit": None, "after": "", "rule": None}})
    assert call.parameters == {"after": ""}

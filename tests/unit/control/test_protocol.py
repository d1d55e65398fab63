"""Frames: a packed value comes back for every way to cut the stream, and no bytes do more than end the connection."""

import contextlib
import itertools
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.control.protocol import (
    MAX_FRAME,
    VERSION,
    Answer,
    Decoder,
    Failure,
    Item,
    ProtocolError,
    Request,
    pack,
    to_reply,
    to_request,
)
from cnprocd.json_value import JsonObject

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
requests = st.builds(Request, st.text(), st.dictionaries(st.text(), json_values, max_size=4))
replies = st.one_of(
    st.builds(Answer, json_values),
    st.builds(Item, json_values, st.integers(0, 2**40)),
    st.builds(
        Failure,
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


@given(st.lists(requests, max_size=5), st.lists(st.integers(0, 10_000), max_size=8))
def test_requests_survive_any_cutting(sent, places):
    data = b"".join(map(pack, sent))
    assert [to_request(one) for one in objects(cut(data, places))] == sent


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
            to_request(one)
    except ProtocolError:
        pass


@given(json_values)
def test_any_json_is_a_request_or_a_protocol_error(value):
    payload = json.dumps(value).encode()
    decoder = Decoder()
    decoder.feed(struct.pack(">I", len(payload)) + payload)
    with pytest.raises(ProtocolError):
        one = decoder.next()
        assert one is not None
        to_request(one)


@pytest.mark.parametrize("length", [0, MAX_FRAME + 1, 0xFFFFFFFF])
def test_a_length_out_of_bounds_is_refused_before_its_bytes_come(length):
    decoder = Decoder()
    decoder.feed(struct.pack(">I", length))
    with pytest.raises(ProtocolError, match="are allowed"):
        decoder.next()


@pytest.mark.parametrize("payload", [b"[" * 100_000, b"1" * 10_000, b"\xff", b"{", b"[]", b'"x"', b"nul"])
def test_what_is_not_an_object_is_refused(payload):
    decoder = Decoder()
    decoder.feed(struct.pack(">I", len(payload)) + payload)
    with pytest.raises(ProtocolError):
        decoder.next()


def test_an_answer_over_the_limit_is_refused_with_the_way_out():
    with pytest.raises(ProtocolError, match="--limit"):
        pack(Answer("x" * MAX_FRAME))


@pytest.mark.parametrize("version", [None, 0, 2, "1", True, 1.5])
def test_another_version_is_named(version):
    with pytest.raises(ProtocolError, match="different releases"):
        to_request({"v": version, "verb": "status"})
    assert VERSION == 1


@pytest.mark.parametrize(
    "verb", ['{"v":1,"verb":"x","args":{"a":%s}}', '{"v":%s}', '{"v":1,"ok":false,"error":{"what":%s}}']
)
@pytest.mark.parametrize("depth", [62, 63, 900, 975, 985, 990])
def test_found_by_fuzzing_a_deeply_nested_frame_is_refused(verb, depth):
    """json.loads accepts a depth at which json.dumps, deeper in the calls, raises RecursionError."""
    payload = (verb % ("[" * depth + "]" * depth)).encode()
    decoder = Decoder()
    decoder.feed(struct.pack(">I", len(payload)) + payload)
    with contextlib.suppress(ProtocolError):
        value = decoder.next()
        assert depth <= 63
        for read in (to_request, to_reply):
            with contextlib.suppress(ProtocolError):
                read(value)
        assert pack(Answer(value))
        return
    assert depth >= 62

"""Frames of the control socket in both directions: control/protocol.py.

Invariant: ProtocolError or JSON objects, nothing else, and the same objects for every way to cut the stream. The
decoder never holds more than one frame and the bytes that came with it. A request has a verb that is text and args that
are an object. The answer to any args can be packed, and unpacks to the same value.
"""

from __future__ import annotations

import json
import random
import struct
from functools import partial

from fuzz.mutate import json_damaged, json_text
from fuzz.target import Target, many, outcome, pieces

from cnprocd.control.protocol import (
    MAX_FRAME,
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

_LENGTH = struct.Struct(">I")
_WORDS = (
    "v", "verb", "args", "ok", "data", "item", "skipped", "error", "what", "hint", "status", "jobs", "limit", "state",
    "rule", "watch", "reload",
)  # fmt: skip
_SENT = (
    Request("status"), Request("jobs", {"state": "dead", "limit": 10, "rule": "a"}), Request("watch", {"kinds": ["x"]}),
    Answer({"jobs": [{"job_id": 1, "reason": None}], "durable": True}), Item({"rule": "a", "comm": "\udcff"}, 3),
    Failure("no such job", "see jobs", 69, {"problems": [{"line": 1}]}),
)  # fmt: skip


def framed(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


class Control(Target):
    name = "control"
    executions = 700_000
    tokens = (
        b'{"v":1,"verb":"',
        b'"args":{',
        b'"v":',
        b"[" * 700,
        b'{"":' * 400,
        b"9" * 4400,
        b"\0\0\0\x02{}",
        b"NaN",
        b"\\ud800",
    )

    def made(self) -> list[bytes]:
        return [pack(one) for one in _SENT]

    def mutated(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return super().mutated(rng)
        frames = []
        for _ in range(1 + rng.getrandbits(1)):
            value = json.loads(pack(rng.choice(_SENT))[4:])
            frames.append(framed(json_text(json_damaged(rng, value, _WORDS))))
        return b"".join(frames)

    def run(self, rng: random.Random) -> int:
        return many(self, rng, 64)

    def check(self, data: bytes) -> None:
        whole = self._objects([data])
        cut = self._objects(pieces(random.Random(len(data)), data))
        assert repr(whole) == repr(cut)  # by repr, because NaN is not equal to itself
        for value in whole[0]:
            assert isinstance(value, dict)
            request, _ = outcome(partial(to_request, value), ProtocolError)
            if request is not None:
                assert isinstance(request.verb, str)
                assert isinstance(request.args, dict)
                self._answered(request)
            reply, _ = outcome(partial(to_reply, value), ProtocolError)
            assert reply is None or isinstance(reply, Answer | Item | Failure)

    @staticmethod
    def _objects(parts: list[bytes]) -> tuple[list[JsonObject], str]:
        decoder, found = Decoder(), []
        try:
            for part in parts:
                decoder.feed(part)
                while (value := decoder.next()) is not None:
                    found.append(value)
                assert len(decoder._buffer) < 4 + MAX_FRAME
        except ProtocolError as error:
            return found, error.what
        return found, "more" if decoder.partial else "end"

    @staticmethod
    def _answered(request: Request) -> None:
        """Echo the request: no argument of a client can make the answer fail."""
        frame, _ = outcome(lambda: pack(Answer(dict(request.args))), ProtocolError)
        if frame is not None:
            decoder = Decoder()
            decoder.feed(frame)
            assert repr(to_reply(decoder.next())) == repr(Answer(dict(request.args)))

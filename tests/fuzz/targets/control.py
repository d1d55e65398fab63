"""Messages of the control socket in both directions: control/protocol.py.

Invariant: ProtocolError or JSON objects, nothing else, and the same objects for every way to cut the stream. The
decoder never holds more than one message and the bytes that came with it. A call has a method that is text and
parameters that are an object. The reply with any parameters can be packed, and unpacks to the same value.
"""

from __future__ import annotations

import json
import random
from functools import partial

from fuzz.mutate import json_damaged, json_text
from fuzz.target import Target, many, outcome, pieces

from cnprocd.control.protocol import MAX_MESSAGE, Call, Decoder, Failure, ProtocolError, Reply, pack, to_call, to_reply
from cnprocd.json_value import JsonObject

_WORDS = (
    "method", "parameters", "more", "oneway", "upgrade", "continues", "error", "what", "hint", "status", "jobs",
    "limit", "state", "rule", "io.cnprocd.Watch", "org.varlink.service.GetInfo",
)  # fmt: skip
_SENT = (
    Call("io.cnprocd.Status"), Call("io.cnprocd.Jobs", {"state": "dead", "limit": 10, "rule": "a"}),
    Call("io.cnprocd.Watch", more=True), Reply({"jobs": [{"job_id": 1, "reason": None}], "durable": True}),
    Reply({"match": {"rule": "a", "comm": "\udcff"}, "skipped": 3}, continues=True),
    Failure("io.cnprocd.NotFound", "no such job", "see jobs", 69, {"problems": [{"line": 1}]}),
)  # fmt: skip


class Control(Target):
    name = "control"
    executions = 700_000
    tokens = (
        b'{"method":"',
        b'"parameters":{',
        b'"more":true',
        b"[" * 700,
        b'{"":' * 400,
        b"9" * 4400,
        b"{}\0",
        b"NaN",
        b"\\ud800",
    )

    def made(self) -> list[bytes]:
        return [pack(one) for one in _SENT]

    def mutated(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return super().mutated(rng)
        messages = []
        for _ in range(1 + rng.getrandbits(1)):
            value = json.loads(pack(rng.choice(_SENT))[:-1])
            messages.append(json_text(json_damaged(rng, value, _WORDS)) + b"\0")
        return b"".join(messages)

    def run(self, rng: random.Random) -> int:
        return many(self, rng, 64)

    def check(self, data: bytes) -> None:
        whole = self._objects([data])
        cut = self._objects(pieces(random.Random(len(data)), data))
        assert repr(whole) == repr(cut)  # by repr, because NaN is not equal to itself
        for value in whole[0]:
            assert isinstance(value, dict)
            call, _ = outcome(partial(to_call, value), ProtocolError)
            if call is not None:
                assert isinstance(call.method, str)
                assert isinstance(call.parameters, dict)
                self._replied(call)
            reply, _ = outcome(partial(to_reply, value), ProtocolError)
            assert reply is None or isinstance(reply, Reply | Failure)

    @staticmethod
    def _objects(parts: list[bytes]) -> tuple[list[JsonObject], str]:
        decoder, found = Decoder(), []
        try:
            for part in parts:
                decoder.feed(part)
                while (value := decoder.next()) is not None:
                    found.append(value)
                assert len(decoder._buffer) <= MAX_MESSAGE + len(part)
        except ProtocolError as error:
            return found, error.what
        return found, "more" if decoder.partial else "end"

    @staticmethod
    def _replied(call: Call) -> None:
        """Echo the call: no parameter of a client can make the reply fail."""
        message, _ = outcome(lambda: pack(Reply(dict(call.parameters))), ProtocolError)
        if message is not None:
            decoder = Decoder()
            decoder.feed(message)
            assert repr(to_reply(decoder.next())) == repr(Reply(dict(call.parameters)))

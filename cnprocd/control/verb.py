"""A verb of the control socket: what the daemon does for a call, and the errors of failed ones. PURE."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TypeAlias

from cnprocd.control.introspection import invalid_parameter
from cnprocd.control.protocol import TOO_LONG, WRONG_USAGE, Call, EncodedReply, Failure, ProtocolError, error_of
from cnprocd.errors import CnprocdError
from cnprocd.json_value import JsonError, JsonObject, JsonValue

Args = JsonObject
Result: TypeAlias = "JsonObject | EncodedReply"


class VerbError(CnprocdError):
    """A call cannot be carried out. `details` goes to the client unchanged. `error` is the name of the error."""

    def __init__(
        self, what: str, hint: str = "", status: int = WRONG_USAGE, error: str | None = None, **details: JsonValue
    ) -> None:
        super().__init__(what, hint)
        self.exit_status = status
        self.error = error or error_of(status)
        self.details = details


VerbResult: TypeAlias = "Result | Coroutine[None, None, Result]"


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing that the daemon does for a client.

    `run` returns the parameters of the reply, or a coroutine that returns them; until then nothing else of this client
    is read. A JsonError from `run` means a wrong parameter. `takes`: the names of all parameters; None: any.
    `changes`: only root and the daemon's own user may call it. `topic`: the reply begins a stream of that topic.
    """

    run: Callable[[Args], VerbResult]
    changes: bool = False
    topic: str | None = None
    takes: frozenset[str] | None = frozenset()


def failure_of(call: Call, error: Exception) -> Failure | None:
    """Return the error to reply, or None for an unexpected exception."""
    if isinstance(error, VerbError):
        return Failure(error.error, error.what, error.hint, error.exit_status, error.details)
    if isinstance(error, JsonError):
        return invalid_parameter(error.path, f"invalid parameters of {call.method}: {error.what}")
    if isinstance(error, ProtocolError):
        return Failure(TOO_LONG, error.what, error.hint, error.exit_status)
    if isinstance(error, CnprocdError):
        return Failure(error_of(error.exit_status), error.what, error.hint, error.exit_status)
    return None

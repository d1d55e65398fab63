"""Names of users and groups for the daemon and the runner: resolved in a thread, because a name service may not answer.

getpwuid(3), getpwnam(3), getgrnam(3) and getgrouplist(3) may ask a directory over the network and wait as long as it
likes. The loop waits at most DEADLINE_S for one answer, and a tenth of the time in all. What comes later is still
learned. An answer is used for FRESH_S. After that the question is asked again, and the old answer serves if the new one
is late.
"""

from __future__ import annotations

import asyncio
import grp
import math
import pwd
import queue
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal, TypeVar

from cnprocd.edge import Counters, Edge, Limits, Missed
from cnprocd.launch.request import HookUser
from cnprocd.launch.user import resolve_user
from cnprocd.log import Log, ThrottledLog
from cnprocd.patience import Patience
from cnprocd.worker import ThreadWorker

DEADLINE_S = 0.05
FRESH_S = 300.0
MOST_KNOWN = 1024
REPORT_EVERY_S = 10.0
T = TypeVar("T")
_LIMITS = Limits(deadline_s=DEADLINE_S, inbox=MOST_KNOWN, replacements=3)


class NameServiceSilentError(OSError):
    """The name service has not answered in time. Trying again later is right."""


@dataclass(frozen=True, slots=True)
class _Question:
    key: Hashable
    resolve: Callable[[], object]


@dataclass(frozen=True, slots=True)
class _Known:
    value: object
    at_s: float


class Names:
    """Answers of the name service, remembered. For the thread of the event loop; call close() at the end."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, log: Log, blame: Callable[[str, float], None] | None = None
    ) -> None:
        self._known: dict[Hashable, _Known] = {}
        self._pending: set[Hashable] = set()
        self._answers: queue.SimpleQueue[tuple[Hashable, object]] = queue.SimpleQueue()  # also the late ones
        self._patience = Patience(DEADLINE_S, shortest_s=0.0)
        self._throttled = ThrottledLog(log, REPORT_EVERY_S)
        self.edge: Edge[_Question, object] = Edge(
            "names", lambda: ThreadWorker("names", self._answer), _LIMITS, loop, blame=blame
        )

    @property
    def counters(self) -> Counters:
        return self.edge.counters

    def user_name(self, uid: int) -> str | None:
        """Return the name of a user, the number of one that has none, or None if no answer has come in time."""
        known = self._known.get(uid)
        if known is not None and self._answers.empty() and time.monotonic() - known.at_s <= FRESH_S:
            found = known.value  # every match asks
        else:
            found = self._ask(uid, lambda: _user_name(uid))
        return found if isinstance(found, str) else None

    def id_of(self, kind: Literal["user", "group"], name: str) -> int | None:
        """Return the id of a user or group, or None if there is none. Raises NameServiceSilentError."""

        def look_up() -> int:
            return pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid

        try:
            return self.resolve((kind, name), look_up)
        except KeyError:  # not remembered: it may be created
            return None

    def hook_user(self, user: str | int | None, group: str | int | None) -> HookUser:
        """Return the user of a hook. Raises HookRefusedError, or NameServiceSilentError."""
        return self.resolve(("hook", user, group), lambda: resolve_user(user, group))

    def resolve(self, key: Hashable, resolve: Callable[[], T]) -> T:
        """Return what `resolve` returns, or raise what it raises. `key` names the question.

        Raises NameServiceSilentError: no answer has come in time. The question stays asked.
        """
        found = self._ask(key, resolve)
        if isinstance(found, Missed):
            raise NameServiceSilentError("the name service does not answer")
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[return-value]

    def expire(self) -> None:
        """Ask everything anew when it is needed next: the rules were loaded again."""
        self._known = {key: _Known(known.value, -math.inf) for key, known in self._known.items()}

    def tick(self, now_s: float) -> None:
        """Report late answers. About once a second."""
        self._throttled.flush_due(now_s)

    def close(self) -> None:
        """Ask nothing more. Does not wait for the name service."""
        self.edge.close()

    def _ask(self, key: Hashable, resolve: Callable[[], object]) -> object:
        learned = self._learn()
        if isinstance(learned.get(key), Exception):
            return learned[key]
        now_s = time.monotonic()
        known = self._known.get(key)
        question = _Question(key, resolve)
        if known is not None and now_s - known.at_s <= FRESH_S:
            return known.value
        fallback = Missed.LATE if known is None else known.value
        wait_s = self._patience.wait_s(now_s)
        if key in self._pending:
            return fallback
        if wait_s <= 0:
            self._submit(question)
            return fallback
        self._pending.add(key)
        missed = self.edge.ask(question, wait_s)
        found = self._learn().get(key, fallback)
        if isinstance(missed, Missed):
            self._note_missed(question, missed, now_s)
        return found

    def _submit(self, question: _Question) -> None:
        """Ask without waiting; the answer is learned when it comes."""
        key = question.key
        self._pending.add(key)

        def done(answer: object) -> None:
            if isinstance(answer, Missed):
                self._pending.discard(key)  # it may be asked again

        if not self.edge.submit(question, done):
            self._pending.discard(key)

    def _note_missed(self, question: _Question, missed: Missed, now_s: float) -> None:
        if missed is Missed.LATE:
            self._patience.spend(time.monotonic() - now_s)
        else:
            self._pending.discard(question.key)
        self._throttled.add(
            "warning",
            "names_unavailable",
            now_s,
            {"count": 1},
            "the name service does not answer; names of users are unknown",
            reason=missed.value,
        )

    def _answer(self, question: _Question) -> None:
        """Resolve one question. Runs in the thread."""
        try:
            answer: object = question.resolve()
        except Exception as error:  # for the caller of resolve()
            answer = error
        self._answers.put((question.key, answer))

    def _learn(self) -> dict[Hashable, object]:
        """Take the answers that have come, and remember those that are not errors."""
        learned: dict[Hashable, object] = {}
        while not self._answers.empty():
            key, value = self._answers.get()
            learned[key] = value
            self._pending.discard(key)
            if isinstance(value, Exception):
                continue
            self._known[key] = _Known(value, time.monotonic())
            if len(self._known) > MOST_KNOWN:
                del self._known[next(iter(self._known))]
        return learned


def _user_name(uid: int) -> str:
    """Return the name of a user, or its number if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)

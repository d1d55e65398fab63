"""Work that another program can make slow, done by workers beside the event loop.

An `Edge` hands pieces of work to workers, and gives up a piece when its deadline passes. The loop never waits for a
worker longer than it asks for, and never for one that is stuck:

    submit   hand over a piece; its answer comes to a callback from the loop
    ask      hand over a piece and wait for its answer, at most for the deadline. For work that takes microseconds

A worker whose piece is late is stuck. It is given up, and another one takes its place, up to `replacements`; after
that, pieces are refused until a stuck worker comes back or ends. So a stuck worker costs a bounded amount of memory.
At most `inbox` pieces wait for a worker; further ones are refused. Everything is counted (`Counters`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Protocol, TypeVar

from cnprocd.worker import Worker, WorkerEndedError

_STARVED = ("R", "T", "t")  # states of proc_pid_stat(5): runnable, stopped, traced

W = TypeVar("W")
R = TypeVar("R")


class Missed(Enum):
    """Why a piece of work has no answer."""

    LATE = "late"  # the deadline passed first
    STARVED = "starved"  # the deadline passed, because the worker had no processor or was stopped
    REFUSED = "refused"  # no worker and no room in the inbox
    FAILED = "failed"  # the work raised, or its worker ended
    STOPPED = "stopped"  # the edge was closed first


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of an edge."""

    deadline_s: float  # of one piece, from submit() or ask() on
    workers: int = 1  # at work at the same time; with one, pieces are done in order
    inbox: int = 64  # pieces that wait for a worker
    replacements: int = 0  # stuck workers that are replaced; 0: the edge waits until its worker comes back
    spares: int = 0  # workers that are kept ready beside those at work, where starting one takes long


@dataclass(slots=True)
class Counters:
    """The work of an edge since start. Every piece ends in one of: done, late, refused, failed, stopped."""

    submitted: int = 0
    done: int = 0
    late: int = 0
    refused: int = 0
    failed: int = 0
    stopped: int = 0
    stuck: int = 0  # workers that are stuck now
    replaced: int = 0  # workers that were started in place of a stuck one
    ended: int = 0  # workers that ended by themselves, or were killed
    longest_s: float = 0.0  # from submission to answer, of the pieces that are done


class EdgeState(Protocol):
    """An edge as `status` shows it."""

    name: str
    counters: Counters

    @property
    def waiting(self) -> int: ...


@dataclass(slots=True, eq=False)
class _Piece(Generic[W, R]):
    """A piece of work and where its answer goes."""

    work: W
    done: Callable[[R | Missed], None] | None
    submitted_s: float
    deadline_s: float  # a point in time


@dataclass(slots=True, eq=False)
class _Seat(Generic[W, R]):
    """A worker and what it works on; `piece` is None if it is idle, or if nothing waits for its answer any more."""

    worker: Worker[W, R]
    poller: select.poll = field(default_factory=select.poll)
    piece: _Piece[W, R] | None = None


class Edge(Generic[W, R]):
    """A bounded inbox, workers, deadlines and counters. Belongs to the thread of the event loop."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Worker[W, R]],
        limits: Limits,
        loop: asyncio.AbstractEventLoop,
        on_late: Callable[[W], None] | None = None,
        blame: Callable[[str, float], None] | None = None,
    ) -> None:
        """`start` makes a worker. `on_late` gets each late piece; `blame` the time that ask() made the loop wait."""
        self.name = name
        self.limits = limits
        self.counters = Counters()
        self._start = start
        self._loop = loop
        self._on_late = on_late
        self._blame = blame
        self._inbox: deque[_Piece[W, R]] = deque()
        self._idle: list[_Seat[W, R]] = []
        self._starting: dict[_Seat[W, R], None] = {}
        self._busy: dict[_Seat[W, R], None] = {}  # in the order in which they began
        self._stuck: dict[_Seat[W, R], float] = {}  # since when
        self._leaving: list[Worker[W, R]] = []  # closed or ended, and not reaped
        self._timer: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None  # stop() waits until nothing is being worked on
        self._closed = False

    # -- handing over --------------------------------------------------------------------------------------------

    def submit(self, work: W, done: Callable[[R | Missed], None] | None = None) -> bool:
        """Hand over a piece. `done` is called once, from the loop. Returns False, and never calls it, if refused."""
        self.counters.submitted += 1
        now_s = time.monotonic()
        piece: _Piece[W, R] = _Piece(work, done, now_s, now_s + self.limits.deadline_s)
        seat = None if self._inbox else self._free_seat()
        if seat is not None:
            self._begin(seat, piece)
        elif self._closed or len(self._inbox) >= self.limits.inbox:
            self.counters.refused += 1
            return False
        else:
            self._inbox.append(piece)
        self._arm()
        return True

    def ask(self, work: W, within_s: float | None = None) -> R | Missed:
        """Hand over a piece and wait for its answer, at most `within_s` (default: the deadline of the edge)."""
        self.counters.submitted += 1
        seat = None if self._inbox else self._free_seat()
        if seat is None:
            self.counters.refused += 1
            return Missed.REFUSED
        wait_s = self.limits.deadline_s if within_s is None else within_s
        answers: list[R | Missed] = []
        now_s = time.monotonic()
        piece: _Piece[W, R] = _Piece(work, answers.append, now_s, now_s + wait_s)
        self._begin(seat, piece)
        if not answers and seat.poller.poll(math.ceil(wait_s * 1000)):
            self._collect(seat)
        elif not answers:
            self._give_up(seat)
        if self._blame is not None:
            self._blame(self.name, time.monotonic() - now_s)
        return answers[0]

    def wait(self, within_s: float) -> bool:
        """Wait until a worker has answered a piece of submit(), at most so long. Returns whether one has.

        For an edge with one worker.
        """
        seat = next(iter((*self._busy, *self._starting)), None)
        if seat is None or within_s <= 0:
            return False
        began_s = time.monotonic()
        answered = bool(seat.poller.poll(math.ceil(within_s * 1000)))
        if self._blame is not None:
            self._blame(self.name, time.monotonic() - began_s)
        if answered:
            self._on_readable(seat)
        return answered

    @property
    def waiting(self) -> int:
        """Pieces that wait for a worker."""
        return len(self._inbox)

    @property
    def ready(self) -> int:
        """Workers that can begin at once."""
        return len(self._idle)

    @property
    def stalled_s(self) -> float:
        """For how long the slowest worker has been at its piece; 0 if none is at work."""
        began = [*self._stuck.values(), *(seat.piece.submitted_s for seat in self._busy if seat.piece is not None)]
        return time.monotonic() - min(began) if began else 0.0

    # -- ending --------------------------------------------------------------------------------------------------

    async def stop(self, bound_s: float) -> int:
        """Do what was handed over, at most for `bound_s`, then close. Returns how many pieces were not done.

        Does not wait for stuck workers, nor for pieces that no worker is left for.
        """
        if self._busy:
            self._drained = self._loop.create_future()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained, bound_s)
        return self.close()

    def close(self, *, abandon: bool = True) -> int:
        """Give up everything now. Returns how many pieces were not done; their callbacks get STOPPED.

        Without `abandon`, a worker that is at work is left to finish, and ends after that.
        """
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left = [seat.piece for seat in self._busy if seat.piece is not None] + list(self._inbox)
        self._inbox.clear()
        for seat in (*self._busy, *self._stuck):
            self._dismiss(seat, abandon=abandon)
        for seat in (*self._idle, *self._starting):
            self._dismiss(seat)
        self._busy.clear()
        self._stuck.clear()
        self._idle.clear()
        self._starting.clear()
        self.counters.stuck = 0
        for piece in left:
            self._end(piece, Missed.STOPPED)
        self._reap()
        return len(left)

    # -- workers -------------------------------------------------------------------------------------------------

    def prepare(self, within_s: float) -> bool:
        """Start the workers, and wait at most so long until one is ready. Returns whether one is."""
        self._grow()
        deadline_s = time.monotonic() + within_s
        for seat in list(self._starting):
            if seat.poller.poll(max(0, math.ceil((deadline_s - time.monotonic()) * 1000))):
                self._collect(seat)
        return bool(self._idle)

    def _free_seat(self) -> _Seat[W, R] | None:
        """Return an idle worker, started if need be; None if there is none now."""
        if not self._idle and not self._closed:
            self._grow()
        return self._idle.pop() if self._idle and len(self._busy) < self.limits.workers else None

    def _grow(self) -> None:
        """Start workers until there are enough, as far as stuck ones leave room. An idle one is ready at once."""
        limits = self.limits
        wanted = limits.workers + limits.spares
        if self._closed:
            return
        if len(self._busy) + len(self._stuck) >= wanted + limits.replacements:
            self._take_back()
        self._reap()
        while True:
            active = len(self._busy) + len(self._idle) + len(self._starting)
            if active >= wanted or active + len(self._stuck) >= wanted + limits.replacements:
                return
            try:
                worker = self._start()
            except (OSError, RuntimeError):  # no process, descriptor or thread to be had
                return
            self.counters.replaced += bool(self._stuck)
            seat = _Seat(worker)
            seat.poller.register(worker.fileno(), select.POLLIN)
            self._loop.add_reader(worker.fileno(), self._on_readable, seat)
            if worker.greets:
                self._starting[seat] = None
            else:
                self._idle.append(seat)

    def _begin(self, seat: _Seat[W, R], piece: _Piece[W, R]) -> None:
        seat.piece = piece
        self._busy[seat] = None
        try:
            seat.worker.begin(piece.work)
        except OSError:  # it ended while it was idle
            self._free(seat, Missed.FAILED, ended=True)

    def _take_back(self) -> None:
        """Look whether a stuck worker has answered or ended: between two calls of ask() the loop cannot notice.

        End the others, because room is needed.
        """
        for seat in list(self._stuck):
            if seat.poller.poll(0):
                self._collect(seat)
            else:
                seat.worker.abandon()  # it waits as well, since it has a processor

    def _on_readable(self, seat: _Seat[W, R]) -> None:
        # wait() or _take_back() may have taken the answer after the loop saw it.
        if seat.poller.poll(0):
            self._collect(seat)
            self._next()

    def _collect(self, seat: _Seat[W, R]) -> None:
        """Take the answer of a worker whose descriptor is readable."""
        try:
            answer: R | Missed = seat.worker.collect()
        except WorkerEndedError:
            self._free(seat, Missed.FAILED, ended=True)
        except Exception:  # of the work; the worker is as good as before
            self._free(seat, Missed.FAILED)
        else:
            self._free(seat, answer)

    def _free(self, seat: _Seat[W, R], answer: R | Missed, *, ended: bool = False) -> None:
        """A worker has answered or ended. One that was replaced while it was stuck is not needed any more."""
        piece, seat.piece = seat.piece, None
        self._busy.pop(seat, None)
        self._stuck.pop(seat, None)
        self._starting.pop(seat, None)
        self.counters.stuck = len(self._stuck)
        if seat in self._idle:
            self._idle.remove(seat)
        self.counters.ended += ended
        enough = self.limits.workers + self.limits.spares
        if ended or len(self._busy) + len(self._idle) + len(self._starting) >= enough:
            self._dismiss(seat)
        else:
            self._idle.append(seat)
        if piece is not None:
            self._end(piece, answer)

    def _give_up(self, seat: _Seat[W, R]) -> None:
        """The deadline of a worker's piece has passed."""
        piece, seat.piece = seat.piece, None
        assert piece is not None
        del self._busy[seat]
        self._stuck[seat] = piece.submitted_s
        self.counters.stuck = len(self._stuck)
        state = seat.worker.state()
        if state != "R":  # else it answers as soon as it has a processor, and a new one would need more of it
            seat.worker.abandon()
        if self.limits.spares:
            self._loop.call_soon(self._grow)  # not now: the caller has waited long enough
        self._end(piece, Missed.STARVED if state in _STARVED else Missed.LATE)

    def _next(self) -> None:
        """Begin what waits, as far as there are workers."""
        while self._inbox and (seat := self._free_seat()) is not None:
            self._begin(seat, self._inbox.popleft())
        self._arm()
        if self._drained is not None and not self._busy and not self._drained.done():
            self._drained.set_result(None)

    def _end(self, piece: _Piece[W, R], answer: R | Missed) -> None:
        """Count a piece and hand its answer out."""
        counters = self.counters
        if answer is Missed.LATE or answer is Missed.STARVED:
            counters.late += 1
            if self._on_late is not None:
                self._on_late(piece.work)
        elif answer is Missed.FAILED:
            counters.failed += 1
        elif answer is Missed.STOPPED:
            counters.stopped += 1
        else:
            counters.done += 1
            counters.longest_s = max(counters.longest_s, time.monotonic() - piece.submitted_s)
        if piece.done is not None:
            piece.done(answer)

    def _dismiss(self, seat: _Seat[W, R], *, abandon: bool = False) -> None:
        self._loop.remove_reader(seat.worker.fileno())
        if abandon:
            seat.worker.abandon()
        seat.worker.close()
        self._leaving.append(seat.worker)

    def _reap(self) -> None:
        self._leaving = [worker for worker in self._leaving if not worker.is_gone()]

    # -- deadlines -----------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """One timer, for the piece that came first: all have the same time."""
        if self._timer is not None or self._closed or self.limits.deadline_s == math.inf:
            return
        pieces = (*(seat.piece for seat in self._busy), *self._inbox)
        first_s = min((piece.deadline_s for piece in pieces if piece is not None), default=None)
        if first_s is not None:
            self._timer = self._loop.call_later(max(0.0, first_s - time.monotonic()), self._expire)

    def _expire(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        for seat in [seat for seat in self._busy if seat.piece is not None and seat.piece.deadline_s <= now_s]:
            self._give_up(seat)
        while self._inbox and self._inbox[0].deadline_s <= now_s:
            self._end(self._inbox.popleft(), Missed.LATE)
        self._reap()
        self._next()

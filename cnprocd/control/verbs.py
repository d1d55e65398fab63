"""The verbs of the control socket: a table of small functions of the daemon and the arguments.

`status` and `metrics` look at the rule files first, and `reload` loads them; every other verb answers at once. The
accessors of json_value check the arguments, which come from outside; the server answers a JsonError as wrong usage.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial

from cnprocd.control import view
from cnprocd.control.problems import problem_value
from cnprocd.control.protocol import (
    MAX_MESSAGE,
    RULES_REJECTED,
    WRONG_STATE,
    EncodedReply,
    ProtocolError,
    encode,
    too_long,
)
from cnprocd.control.tap import MATCHES
from cnprocd.control.values import job_value, match_value
from cnprocd.control.verb import Args, Verb, VerbError, VerbResult
from cnprocd.dispatch import MOST_PAST
from cnprocd.errors import EX_NO
from cnprocd.json_value import (
    JsonError,
    JsonObject,
    JsonValue,
    get_bool,
    get_choice_or_none,
    get_int,
    get_int_or_none,
    get_str,
    get_str_or_none,
)
from cnprocd.output import metrics
from cnprocd.rules.written import written_rule
from cnprocd.spool.disk_messages import FindJobs
from cnprocd.spool.job import Job, State
from cnprocd.spool.rows import CountFilter, Found, MatchFilter
from cnprocd.stalls import Stalls

MAX_LIMIT = 1000
COUNTED_BY = ("rule", "unit", "kind")
MOST_PERIODS = 1440  # of an answer of `counts`
MOST_PERIOD_S = 30 * 86_400
TURN_BYTES = 64 << 10  # of an answer that are encoded in one turn of the loop
TURN_OVERHEAD_BYTES = 512  # that a value takes beside its text, in time
ENVELOPE_BYTES = 1 << 10  # of an answer around its values, and its note
LONGEST_TEXT = 1000  # of a name or a glob
_MAX_ID = (1 << 62) - 1  # of 64 bits, as SQLite keeps them
_MAX_NS = (1 << 63) - 1


def verbs_of(daemon: view.DaemonView) -> Mapping[str, Verb]:
    """Return the verbs of the daemon, by name."""
    one, filters = frozenset({"job_id"}), frozenset(one.name for one in fields(MatchFilter))
    verbs = {
        "status": Verb(partial(_status, daemon)),
        "metrics": Verb(partial(_metrics, daemon)),
        "rule": Verb(partial(_rule, daemon), takes=frozenset({"name"})),
        "digests": Verb(lambda args: {"digests": dict(daemon.loaded.digests)}),
        "reload": Verb(partial(_reload, daemon), changes=True),
        "jobs": Verb(partial(_jobs, daemon), takes=frozenset({"state", "rule", "limit"})),
        "job": Verb(partial(_job, daemon), takes=one),
        "output": Verb(partial(_output, daemon), takes=one),
        "retry": Verb(partial(_retry, daemon), changes=True, takes=one),
        "retry_dead": Verb(partial(_retry_dead, daemon), changes=True, takes=frozenset({"rule"})),
        "kill": Verb(partial(_kill, daemon), changes=True, takes=one | {"retry"}),
        "drop": Verb(partial(_drop, daemon), changes=True, takes=one),
        "drop_waiting": Verb(partial(_drop_waiting, daemon), changes=True, takes=frozenset({"rule"})),
        "history": Verb(partial(_history, daemon), takes=filters),
        "counts": Verb(partial(_counts, daemon), takes=frozenset({"by", "since_ns", "per_s"})),
        "watch": Verb(lambda args: {"ready": True}, topic=MATCHES),
    }
    return {
        name: replace(verb, run=partial(_measured, daemon.stalls, f"control: {name}", verb))
        for name, verb in verbs.items()
    }


def _measured(stalls: Stalls, edge: str, verb: Verb, args: Args) -> VerbResult:
    with stalls.running(edge):
        found = verb.run(args)
    return stalls.steps(edge, found) if isinstance(found, Coroutine) else found


async def _status(daemon: view.DaemonView, args: Args) -> JsonObject:
    await daemon.load_state.check()
    return view.status(daemon)


async def _metrics(daemon: view.DaemonView, args: Args) -> JsonObject:
    await daemon.load_state.check()
    return {"text": metrics.render(view.status(daemon))}


async def _reload(daemon: view.DaemonView, args: Args) -> JsonObject:
    problem = await daemon.reload()
    if problem is not None:
        raise VerbError(
            problem.what,
            "keeping the current rules",
            problem.exit_status,
            RULES_REJECTED,
            rendered=problem.render(),
            problems=[problem_value(found) for found in problem.problems],
        )
    return {
        "rules": len(daemon.pipeline.matcher.rules),
        "files": [str(path) for path in daemon.loaded.files],
        "rules_hash": daemon.loaded.rules_hash,
        "warnings": [problem_value(warning) for warning in daemon.loaded.warnings],
    }


def _rule(daemon: view.DaemonView, args: Args) -> JsonObject:
    name = get_str(args, "name")
    rule = next((rule for rule in daemon.loaded.rules if rule.name == name), None)
    if rule is None:
        raise VerbError(f'no rule named "{name}" is in force', "`cnprocctl rules list` shows the rules", EX_NO)
    return {"rule": written_rule(rule)}


async def _jobs(daemon: view.DaemonView, args: Args) -> EncodedReply:
    state = get_choice_or_none(args, "state", list(State))
    wanted = FindJobs(State(state) if state is not None else None, _text(args, "rule"), _limit(args))
    encoded, why = EncodedValues(), None
    async for page in daemon.dispatcher.spool.job_pages(wanted):
        await encoded.add(job_value(job) for job in page.value)
        why = page.why
    return EncodedReply("jobs", tuple(encoded.texts), _note(why))


async def _job(daemon: view.DaemonView, args: Args) -> JsonObject:
    return {"job": job_value(await _required(daemon, args))}


async def _output(daemon: view.DaemonView, args: Args) -> JsonObject:
    job = await _required(daemon, args)
    running = daemon.dispatcher.scheduler.output(job.job_id)
    found = Found(running) if running is not None else await daemon.dispatcher.spool.find_output(job.job_id)
    note = _note(found.why)
    return {
        "job_id": job.job_id,
        "state": str(job.state),
        "attempt": job.attempts,
        "output": found.value or "",
        **({} if note is None else {"note": note}),
    }


async def _retry(daemon: view.DaemonView, args: Args) -> JsonObject:
    job = await _required(daemon, args)
    if not await daemon.dispatcher.spool.revive(job_id=job.job_id):
        raise VerbError(
            f"job {job.job_id} is not dead", f"it is {job.state}; only dead jobs can be retried", EX_NO, WRONG_STATE
        )
    daemon.dispatcher.scheduler.wake()
    return {"job_id": job.job_id, "state": "waiting"}


async def _retry_dead(daemon: view.DaemonView, args: Args) -> JsonObject:
    jobs: list[JsonValue] = [*await daemon.dispatcher.spool.revive(rule=_text(args, "rule"))]
    daemon.dispatcher.scheduler.wake()
    return {"job_ids": jobs}


async def _drop(daemon: view.DaemonView, args: Args) -> JsonObject:
    job = await _required(daemon, args)
    if not daemon.dispatcher.spool.drop(job_id=job.job_id):
        hint = "`cnprocctl jobs kill` ends a running one" if job.state is State.RUNNING else f"it is {job.state}"
        raise VerbError(f"job {job.job_id} is not waiting", hint, EX_NO, WRONG_STATE)
    return {"job_id": job.job_id, "state": "dead"}


async def _drop_waiting(daemon: view.DaemonView, args: Args) -> JsonObject:
    """Drop the jobs that wait now, and those that a flood has deferred: more may come at any time."""
    spool, rule = daemon.dispatcher.spool, _text(args, "rule")
    dropped: list[JsonValue] = []
    waiting = spool.counts().waiting
    while len(dropped) < waiting and (found := spool.drop(rule=rule)):
        dropped += found
        await asyncio.sleep(0)  # events go first
    try:
        deferred = daemon.dispatcher.postponing.backlog.drop(rule or "*")
    except OSError as error:
        raise VerbError(f"cannot drop the deferred jobs: {error.strerror}", "drop them again later") from error
    for name, count in deferred.items():
        daemon.pipeline.flood.note_dropped(name, count)
    return {"job_ids": dropped, "deferred": deferred.total()}


async def _kill(daemon: view.DaemonView, args: Args) -> JsonObject:
    retry = get_bool(args, "retry", False)
    job = await _required(daemon, args)
    if not daemon.dispatcher.scheduler.kill(job.job_id, retry=retry):
        hint = "`cnprocctl jobs drop` cancels a waiting one" if job.state is State.WAITING else f"it is {job.state}"
        raise VerbError(f"job {job.job_id} is not running", hint, EX_NO, WRONG_STATE)
    return {"job_id": job.job_id, "state": "running"}


async def _required(daemon: view.DaemonView, args: Args) -> Job:
    """Return the job that the arguments name. Raises VerbError."""
    job_id = get_int(args, "job_id", minimum=0, maximum=_MAX_ID)
    found = await daemon.dispatcher.spool.find_job(job_id)
    if found.value is None:
        hint = _note(found.why) or "`cnprocctl jobs list` shows the jobs that are kept"
        raise VerbError(f"no such job: {job_id}", hint, EX_NO)
    return found.value


def _note(why: str | None) -> str | None:
    """Return the note for an answer from memory."""
    return None if why is None else f"from memory only, older rows are missing: {why}"


async def _history(daemon: view.DaemonView, args: Args) -> EncodedReply:
    daemon.dispatcher.store_past_matches()
    wanted = MatchFilter(
        rule=_text(args, "rule"),
        comm=_text(args, "comm"),
        unit=_text(args, "unit"),
        pid=get_int_or_none(args, "pid", minimum=0, maximum=_MAX_ID),
        uid=get_int_or_none(args, "uid", minimum=0, maximum=_MAX_ID),
        user=_text(args, "user"),
        since_ns=get_int(args, "since_ns", 0, minimum=-_MAX_NS, maximum=_MAX_NS),
        until_ns=get_int_or_none(args, "until_ns", minimum=-_MAX_NS, maximum=_MAX_NS),
        limit=_limit(args),
        after=_text(args, "after"),
        before=_text(args, "before"),
        match_id=_text(args, "match_id"),
    )
    encoded, why = EncodedValues(), None
    try:
        async for page in daemon.dispatcher.spool.match_pages(wanted):
            await encoded.add(match_value(match) for match in page.value)
            why = page.why
    except ProtocolError:
        if wanted.after is None or not encoded.texts:  # else the client asks for the rest
            raise
    return EncodedReply("matches", tuple(encoded.texts), _history_note(daemon, why))


async def _counts(daemon: view.DaemonView, args: Args) -> JsonObject:
    daemon.dispatcher.store_past_matches()
    per_ns = get_int(args, "per_s", 60, minimum=1, maximum=MOST_PERIOD_S) * view.NS
    until_ns = time.time_ns()
    since_ns = get_int(args, "since_ns", 0, minimum=0, maximum=_MAX_NS)
    wanted = CountFilter(
        by=get_choice_or_none(args, "by", COUNTED_BY) or "rule",
        since_ns=max(since_ns, until_ns - MOST_PERIODS * per_ns),
        until_ns=until_ns,
        per_ns=per_ns,
    )
    found = await daemon.dispatcher.spool.count_matches(wanted)
    note = _history_note(daemon, found.why)
    return {"counts": [asdict(one) for one in found.value], **({} if note is None else {"note": note})}


def _history_note(daemon: view.DaemonView, why: str | None) -> str | None:
    missing = daemon.dispatcher.not_remembered
    left_out = f"{missing} matches since the start are not in the history, because more than {MOST_PAST} came at once"
    return "; ".join(filter(None, [_note(why), left_out if missing else None])) or None


class EncodedValues:
    """The values of a long answer, encoded in pieces between turns of the event loop.

    An answer that would be too long is refused as soon as its values so far are: the rest is neither read nor encoded.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._bytes = 0
        self._turn_bytes = 0

    async def add(self, values: Iterable[JsonValue]) -> None:
        """Encode more values. Raises ProtocolError: the answer is too long."""
        for value in values:
            text = encode(value)
            self._bytes += len(text) + 1
            if self._bytes > MAX_MESSAGE - ENVELOPE_BYTES:
                raise too_long(self._bytes)
            self.texts.append(text)
            self._turn_bytes += len(text) + TURN_OVERHEAD_BYTES
            if self._turn_bytes >= TURN_BYTES:
                self._turn_bytes = 0
                await asyncio.sleep(0)


def _text(args: Args, key: str) -> str | None:
    """Return a text that SQLite can compare, or None. Raises JsonError."""
    text = get_str_or_none(args, key)
    if text is not None and len(text) > LONGEST_TEXT:
        raise JsonError(f"has {len(text)} characters, and may have {LONGEST_TEXT}", key)
    if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise JsonError("is not valid Unicode", key)
    return text


def _limit(args: Args) -> int:
    return get_int(args, "limit", 100, minimum=1, maximum=MAX_LIMIT)

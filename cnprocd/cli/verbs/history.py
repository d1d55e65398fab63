"""`cnprocctl history`: past matches, and with --follow the next ones."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING

from cnprocd.cli.ending import end_after
from cnprocd.cli.following import PAGE, Following
from cnprocd.cli.grammar import Options
from cnprocd.cli.quantities import window_ns
from cnprocd.cli.rule_names import is_glob, known_names, no_such_rule, wanted
from cnprocd.cli.spool_access import ask_or_read
from cnprocd.cli.terminal import Style, clock, columns, print_json, text
from cnprocd.control.client import Client
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.json_value import JsonObject, as_dict, get_int, get_list, get_str, get_str_or_none

if TYPE_CHECKING:  # imported only without a daemon
    from cnprocd.spool.store import Store

_HEADS = ["TIME", "RULE", "PROCESS", "USER", "STATUS", "JOB", "OUTCOME"]


@dataclass(frozen=True, slots=True)
class _Filter:
    """The options, as the daemon's verb and spool/rows.MatchFilter take them."""

    rule: str | None
    comm: str | None
    unit: str | None
    pid: int | None
    uid: int | None
    user: str | None
    since_ns: int
    until_ns: int | None
    limit: int
    after: str | None = None


def history(options: Options) -> int:
    """List past matches, the newest last, as in a log."""
    wanted_ones = _filter(options)
    if options.follow:
        return _follow(options, wanted_ones)
    found = _past(options, wanted_ones)
    if not found and options.after is None:
        _require_rule(options)
    if options.json:
        print_json(found)
        return EX_OK
    rows = [_row(match) for match in found]
    for line in columns(rows, _HEADS, Style()) if rows else ["no matches"]:
        print(line)
    return EX_OK


def _filter(options: Options) -> _Filter:
    since_ns, until_ns = window_ns(options.since, options.until, time.time())
    if until_ns is not None and until_ns < since_ns:
        error = CnprocdError(f"--until ({clock(until_ns)}) is before --since ({clock(since_ns)})")
        error.exit_status = 2
        raise error
    uid = int(options.user) if options.user is not None and options.user.isdecimal() else None
    user = options.user if uid is None else None
    return _Filter(
        options.rule, options.comm, options.unit, options.pid, uid, user, since_ns, until_ns, options.limit,
        options.after,
    )  # fmt: skip


def _past(options: Options, wanted_ones: _Filter) -> list[JsonObject]:
    """Return the past matches, the newest last."""

    def read(store: Store) -> JsonObject:
        from cnprocd.control.values import match_value
        from cnprocd.spool.rows import MatchFilter

        return {"matches": [match_value(match) for match in store.matches(MatchFilter(**asdict(wanted_ones)))]}

    found = get_list(ask_or_read(options, "history", asdict(wanted_ones), read), "matches", as_dict)
    return found if wanted_ones.after is not None else found[::-1]


def _require_rule(options: Options) -> None:
    """Raise NotFoundError for a literal name that no rule has, and that no match has either."""
    if options.rule is None or is_glob(options.rule):
        return
    known = known_names(options)
    if known is None or options.rule in known:
        return
    if not _past(options, _Filter(options.rule, None, None, None, None, None, 0, None, 1)):
        raise no_such_rule(options.rule, known)


def _row(match: JsonObject) -> list[str]:
    job_id, outcome = match.get("job_id"), get_str_or_none(match, "job_state")
    if outcome == "dead":
        outcome = f"dead: {get_str_or_none(match, 'job_reason')}"
    return [
        clock(get_int(match, "time_ns")),
        get_str(match, "rule"),
        f"{text(match.get('comm'))}[{text(match.get('pid'))}]",
        text(match.get("user")),
        str(match.get("status") or get_str(match, "kind")),
        str(job_id) if job_id else "-",
        outcome or ("no longer kept" if job_id else "-"),
    ]


def _follow(options: Options, wanted_ones: _Filter) -> int:
    """Print the past matches, then the next ones as the daemon reports them. A signal ends it."""
    widths: list[int] = []
    following = Following(lambda known: past_page(options, known), options.after or "")
    with Client(options.runtime_dir) as client:
        stream = client.stream("watch", "match")
        next(stream)  # subscribed: what comes from now on is queued for this client
        if options.after is None:
            following.after = _last_id(options)
            for match in _past(options, wanted_ones):
                following.note(match)
                _print_followed(match, options, widths)
        print("following matches, Ctrl-C ends", file=sys.stderr, flush=True)
        end_after(None)
        for match in chain(following.past(), following.live(stream)):
            if match.get("held_by") is None and _fits(match, wanted_ones):  # held ones are not in the history
                _print_followed(match, options, widths)
    return EX_OK


def past_page(options: Options, after: str) -> list[JsonObject]:
    """Return the first matches of the history after a known one, in order."""
    return _past(options, _Filter(None, None, None, None, None, None, 0, None, PAGE, after))


def _last_id(options: Options) -> str:
    """Return the id of the newest match, or "" if the history is empty."""
    newest = _past(options, _Filter(None, None, None, None, None, None, 0, None, 1))
    return (get_str_or_none(newest[0], "match_id") if newest else None) or ""


def _fits(match: JsonObject, wanted_ones: _Filter) -> bool:
    globs = {"rule": wanted_ones.rule, "comm": wanted_ones.comm, "unit": wanted_ones.unit}
    exact = {"pid": wanted_ones.pid, "uid": wanted_ones.uid, "user": wanted_ones.user}
    return (
        all(wanted(text(match.get(name)), pattern) for name, pattern in globs.items())
        and all(value in (None, match.get(name)) for name, value in exact.items())
        and (wanted_ones.until_ns is None or get_int(match, "time_ns") <= wanted_ones.until_ns)
    )


def _print_followed(match: JsonObject, options: Options, widths: list[int]) -> None:
    """Print a line whose columns are as wide as any before."""
    if options.json:
        print_json(match, line=True)
        return
    row = _row({"job_state": "waiting" if match.get("job_id") else None, **match})
    widths[:] = [
        max(len(cell), *old) for cell, old in zip(row, [[one] for one in widths] or [[0]] * len(row), strict=True)
    ]
    print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)

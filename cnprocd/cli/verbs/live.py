"""`cnprocctl watch` and `top`: matches and events as they occur.

Matches come from the daemon. If this command reads too slowly, it misses some and shows how many. Events come from a
subscription of the command (listening.py) and are matched by a rule made of its options, so a filter means the same as
in a rule file.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING

from cnprocd.cli.arguments import KINDS
from cnprocd.cli.ending import TimeIsUpError, end_after
from cnprocd.cli.grammar import Options
from cnprocd.cli.lines import LINES_A_SECOND, Budget, match_line
from cnprocd.cli.rule_names import known_names, require_rule, wanted
from cnprocd.cli.terminal import Style, columns, print_json
from cnprocd.control.client import Client
from cnprocd.control.protocol import WRONG_USAGE
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.json_value import JsonDict, JsonObject, as_dict, get_int, get_str

if TYPE_CHECKING:  # imported when they are needed, so that `watch` without --match starts at once
    from cnprocd.process.model import Occurrence, Process

Fits = Callable[[JsonObject], bool]


class _EnoughError(Exception):
    """--count is reached."""


def watch(options: Options) -> int:
    """Print lines until the time, the count or a signal ends it."""
    if options.after is not None and options.events:
        raise _wrong("--after conflicts with --events", "only matches of the daemon have an id")
    if options.kinds and not options.events:
        raise _wrong("--kinds needs --events", "the daemon reports matches; give --rule or --match to select some")
    require_rule(options.rule, lambda: known_names(options))
    rate = options.rate if options.rate is not None else LINES_A_SECOND if sys.stdout.isatty() else None
    printer = _Printer(options, None if options.json or rate == 0 else rate)
    with contextlib.suppress(_EnoughError):
        _watch_events(options, printer) if options.events else _watch_matches(options, printer)
    printer.end()
    return EX_OK


class _Printer:
    """Show records within the budget; raise _EnoughError at --count."""

    def __init__(self, options: Options, rate: int | None) -> None:
        self._style = Style()
        self._json = options.json
        self._left = options.count
        self._budget = Budget(rate, time.monotonic)

    def show(self, record: JsonObject, at_s: float) -> None:
        if self._json:
            print_json(record, line=True)
        elif self._budget.take(str(record["kind"])):
            at = time.strftime("%H:%M:%S", time.localtime(at_s)) + f".{int(at_s % 1 * 1000):03}"
            print(match_line(record, self._style, at), flush=True)
        self.tick()
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                raise _EnoughError

    def tick(self) -> None:
        self._note(self._budget.report())

    def skipped(self, count: int, why: str) -> None:
        if self._json:
            print_json({"skipped": count, "why": why}, line=True)
        else:
            self._note(f"... {count} skipped: {why}")

    def end(self) -> None:
        self._note(self._budget.rest())

    def _note(self, text: str | None) -> None:
        if text is not None:
            print(self._style("dim", text), flush=True)


def _watch_matches(options: Options, printer: _Printer) -> None:
    fits = _fits(options)
    if options.after is not None:
        _watch_after(options, printer, fits)
        return
    with Client(options.runtime_dir) as client, contextlib.suppress(TimeIsUpError):
        for item in client.stream("watch", "match"):
            if item is None:
                print("watching for matches, Ctrl-C ends", file=sys.stderr, flush=True)
                end_after(options.duration)
                continue
            if item.skipped:
                printer.skipped(item.skipped, "this command read too slowly")
            record = as_dict(item.data)
            if fits(record):
                printer.show(record, get_int(record, "time_ns") / 1e9)


def _watch_after(options: Options, printer: _Printer, fits: Fits) -> None:
    from cnprocd.cli.following import Following
    from cnprocd.cli.verbs.history import past_page

    following = Following(lambda known: past_page(options, known), options.after)
    with Client(options.runtime_dir) as client, contextlib.suppress(TimeIsUpError):
        stream = client.stream("watch", "match")
        next(stream)
        print("watching for matches, Ctrl-C ends", file=sys.stderr, flush=True)
        end_after(options.duration)
        for record in chain(following.past(), following.live(stream)):
            if fits(record):
                printer.show(record, get_int(record, "time_ns") / 1e9)


def _fits(options: Options) -> Fits:
    """Return the test for records of the daemon: by rule, and by a match of the rule language."""
    if options.match is None:
        return lambda record: wanted(get_str(record, "rule"), options.rule)
    from cnprocd.cli.event_from_options import FIELDS, occurrence_of
    from cnprocd.cli.ruleset import rule_of_match
    from cnprocd.cli.verbs.trial import ACCOUNTS
    from cnprocd.rules.predicate import compile_condition

    test = compile_condition(rule_of_match(options.match, ["all"]).match)

    def fits(record: JsonObject) -> bool:
        known = {name: value for name, value in record.items() if name in FIELDS or name.endswith("_hex")}
        known.pop("status", None)
        return wanted(get_str(record, "rule"), options.rule) and test(occurrence_of(known, ACCOUNTS)) is True

    return fits


def _watch_events(options: Options, printer: _Printer) -> None:
    from cnprocd.cli.listening import Listening
    from cnprocd.cli.ruleset import rule_of_match
    from cnprocd.output.record import match_record
    from cnprocd.process.model import EVERYTHING
    from cnprocd.process.procfs import user_name
    from cnprocd.rules.compile import Matcher
    from cnprocd.rules.language.value_problem import did_you_mean

    kinds = options.kinds.split(",") if options.kinds else ["all"]
    for kind in kinds:
        if kind not in (*KINDS, "all"):
            raise _wrong(f'unknown kind of event "{kind}"', did_you_mean(kind, KINDS) or ", ".join(KINDS))
    if options.rule is not None:
        raise _wrong("--rule conflicts with --events", "omit --events, or use --match")
    matcher = Matcher([rule_of_match(options.match, kinds)])
    with Listening(EVERYTHING) as listening, contextlib.suppress(TimeIsUpError):
        print("watching every process, Ctrl-C ends", file=sys.stderr, flush=True)
        end_after(options.duration)
        lost = 0
        for occurrences in listening.batches():
            for occurrence in occurrences:
                for match in matcher.match(occurrence):
                    record = match_record(match, user_name)
                    for name in ("rule", "job_id", "match_id", "host", "machine_id", "boot_id"):
                        del record[name]
                    printer.show(record, time.time())
            printer.tick()
            lost_now = listening.lost()
            if lost_now > lost:
                printer.skipped(lost_now - lost, "the kernel's buffer was full")
                lost = lost_now


def _wrong(what: str, hint: str) -> CnprocdError:
    error = CnprocdError(what, hint)
    error.exit_status = WRONG_USAGE
    return error


def top(options: Options) -> int:
    """Rank processes by forks, execs, exits and failures, once an interval; with --json one object an interval."""
    from cnprocd.cli.listening import Listening
    from cnprocd.process.model import Wanted

    wanted = Wanted(ids=options.by == "user", cgroup=options.by == "unit")
    board = _Board(options)
    with Listening(wanted, frozenset({"fork", "exec", "exit"})) as listening:
        with contextlib.suppress(TimeIsUpError):
            end_after(options.duration)
            board.begin()
            for occurrences in listening.batches(min(0.2, options.interval)):
                board.add(occurrences)
                if board.is_due():
                    board.draw(listening.lost())
        if not board.drawn:  # --for is shorter than an interval
            board.draw(listening.lost())
    return EX_OK


class _Board:
    """Counts of one interval."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._style = Style()
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._began = time.monotonic()
        self.drawn = False

    def begin(self) -> None:
        self._began = time.monotonic()

    def add(self, occurrences: Iterable[Occurrence]) -> None:
        for occurrence in occurrences:
            counts = self._counts[self._key(occurrence.process)]
            counts[occurrence.kind] += 1
            if occurrence.kind == "exit" and occurrence.status:
                counts["signal" if occurrence.status & 0x7F else "failed"] += 1

    def _key(self, process: Process) -> str:
        from cnprocd.escape import printable
        from cnprocd.process.procfs import user_name

        if self._options.by == "user":
            return user_name(process.uid) if process.uid is not None else "unknown"
        if self._options.by == "unit":
            placement = process.placement
            return "unknown" if placement is None else placement.unit or "no unit"
        return printable(process.comm) if process.comm is not None else "unknown"

    def is_due(self) -> bool:
        interval: float = self._options.interval
        return time.monotonic() - self._began >= interval

    def draw(self, lost: int) -> None:
        self.drawn = True
        took = max(0.001, time.monotonic() - self._began)
        ranked = sorted(self._counts.items(), key=lambda item: -item[1].total())[: self._options.lines]
        total = sum(counts.total() for counts in self._counts.values())
        self._counts, self._began = defaultdict(Counter), time.monotonic()
        if self._options.json:
            rows: list[JsonDict] = [{self._options.by: key, **counts} for key, counts in ranked]
            print_json({"seconds": round(took, 3), "events": total, "lost": lost, "top": rows}, line=True)
            return
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[H\x1b[2J")
        print(f"{total / took:.0f} events a second, {lost} lost; by {self._options.by}, over {took:.1f} s")
        heads = [self._options.by.upper(), "FORKS", "EXECS", "EXITS", "FAILED", "KILLED"]
        names = ("fork", "exec", "exit", "failed", "signal")
        cells = [[key[:40], *(str(counts[name] or "-") for name in names)] for key, counts in ranked]
        height = shutil.get_terminal_size().lines - 3 if sys.stdout.isatty() else len(cells)
        for line in columns(cells[: max(1, height)], heads, self._style):
            print(line)
        print(end="", flush=True)

"""`cnprocctl replay --history`: which rules would fire for the events of past matches.

An event is evaluated as its record describes it. A field that was not recorded is unknown, and a rule that needs one is
reported as unknown instead of guessed. Throttles are left out: what they hold back depends on all other events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from cnprocd.cli.drafts import draft_of
from cnprocd.cli.event_from_options import occurrence_of
from cnprocd.cli.grammar import Options
from cnprocd.cli.reasons import Explained, explain_all
from cnprocd.cli.ruleset import loaded_rules
from cnprocd.cli.spool_access import ask_or_read
from cnprocd.cli.terminal import Style, clock, columns, counted, print_json, text
from cnprocd.cli.verbs.trial import ACCOUNTS
from cnprocd.errors import EX_OK
from cnprocd.json_value import JsonDict, JsonObject, as_dict, get_int, get_list, get_str, get_str_or_none
from cnprocd.rules.compile import CompiledRule, compile_rule
from cnprocd.spool.rows import MatchFilter
from cnprocd.spool.store import Store

_USUAL = 50  # matches without -n
_PAGE = 100  # matches that are asked for at once: an answer has at most 1 MiB
_EVENT = ("boot_id", "pid", "tid", "kernel_time_ns")  # two matches with the same ones are of the same event
_NOT_OF_EVENT = ("rule", "status", "time_ns", "match_id", "job_id")


@dataclass(frozen=True, slots=True)
class Tried:
    """An event of the history: the rules that fired, and those that would now, or perhaps would."""

    match_id: str | None
    time_ns: int
    comm: str | None
    pid: int | None
    status: str
    fired: list[str]
    fires: list[str]
    unknown: list[str]

    @property
    def differs(self) -> bool:
        """Whether other rules would fire than did."""
        return set(self.fired) != set(self.fires)


def replay_history(options: Options) -> int:
    """Show each event of past matches with the rules that fired and would fire, the newest last."""
    loaded = loaded_rules(options.rules, draft=draft_of(options))
    rules = [compile_rule(rule, order) for order, rule in enumerate(loaded.rules) if rule.enabled]
    tried = [_tried(matches, rules) for matches in _by_event(_past(options))]
    if options.json:
        print_json({"events": [asdict(one) for one in tried], "differ": sum(one.differs for one in tried)})
        return EX_OK
    rows = [_row(one) for one in tried]
    heads = ["TIME", "PROCESS", "STATUS", "FIRED", "WOULD FIRE", "UNKNOWN"]
    for line in columns(rows, heads, Style()) if rows else ["no past matches"]:
        print(line)
    differ = sum(one.differs for one in tried)
    print(f"{counted(len(tried), 'event')}; other rules would fire for {differ}")
    return EX_OK


def _past(options: Options) -> list[JsonObject]:
    """Return the newest past matches that the options select, the newest first."""
    found: dict[str, JsonObject] = {}
    until_ns: int | None = None
    limit = options.limit or _USUAL
    while len(found) < limit:
        wanted = MatchFilter(rule=options.rule, until_ns=until_ns, limit=min(_PAGE, limit))
        page = _page(options, wanted)
        before = len(found)
        for match in page:
            found.setdefault(get_str_or_none(match, "match_id") or str(len(found)), match)
        if len(page) < wanted.limit or len(found) == before:
            break
        until_ns = get_int(page[-1], "time_ns")
    return list(found.values())[:limit]


def _page(options: Options, wanted: MatchFilter) -> list[JsonObject]:
    def read(store: Store) -> JsonObject:
        from cnprocd.control.values import match_value

        return {"matches": [match_value(match) for match in store.matches(wanted)]}

    return get_list(ask_or_read(options, "history", asdict(wanted), read), "matches", as_dict)


def _by_event(matches: Iterable[JsonObject]) -> Iterator[list[JsonObject]]:
    """Return the matches of each event together, the newest event last."""
    events: dict[object, list[JsonObject]] = {}
    for match in matches:
        events.setdefault(tuple(str(match.get(name)) for name in _EVENT), []).append(match)
    return reversed(events.values())


def _tried(matches: list[JsonObject], rules: list[CompiledRule]) -> Tried:
    first = matches[0]
    event: JsonDict = {name: value for name, value in first.items() if name not in _NOT_OF_EVENT}
    occurrence = occurrence_of(event, ACCOUNTS)
    explained = [explain_all(rule, occurrence) for rule in rules]
    pid = first.get("pid")
    return Tried(
        match_id=get_str_or_none(first, "match_id"),
        time_ns=get_int(first, "time_ns"),
        comm=get_str_or_none(first, "comm"),
        pid=pid if isinstance(pid, int) else None,
        status=str(first.get("status") or first.get("kind")),
        fired=sorted({get_str(match, "rule") for match in matches}),
        fires=sorted(one.compiled.name for one in explained if one.match is not None),
        unknown=sorted(one.compiled.name for one in explained if one.match is None and _may_fire(one)),
    )


def _may_fire(one: Explained) -> bool:
    """Whether nothing but unknown fields keeps the rule from firing."""
    verdicts = [reason.verdict for reason in one.reasons if reason.depth == 0]
    return False not in verdicts and None in verdicts


def _row(one: Tried) -> list[str]:
    fires = [name if name in one.fired else f"+{name}" for name in one.fires]
    gone = [f"-{name}" for name in one.fired if name not in one.fires and name not in one.unknown]
    process = f"{text(one.comm)}[{text(one.pid)}]"
    names = ([*fires, *gone], one.unknown)
    return [clock(one.time_ns), process, one.status, " ".join(one.fired), *(" ".join(each) or "-" for each in names)]

"""What is found by a look at an exit record is what the rules would have found, and every match is accounted for."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.connector.wire import exit_record, taskstats
from unit.hookkit import Records

from cnprocd.alike import Later
from cnprocd.connector.event import Exit, Fork
from cnprocd.connector.taskrecord import ReadRecords, Shed, Who, decode_record
from cnprocd.connector.uapi import PROC_EVENT_EXIT, PROC_EVENT_FORK
from cnprocd.counts import Counts
from cnprocd.crowd import AWAITED_S, MEMO_S, Crowd
from cnprocd.deferred import Deferred
from cnprocd.delivery import Fate
from cnprocd.dispatch import throttle_of
from cnprocd.failures import Failures
from cnprocd.flood import CALM_S, SHARE, Flood
from cnprocd.output.record import early_fields
from cnprocd.process.executed_file import ended
from cnprocd.process.family import HookFamily
from cnprocd.process.files import FoundFile
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleFileModel

FAMILY, DAEMON, SHELL = 27, 2, 40
SECOND = 1_000_000_000
RULES: dict[str, dict[str, object]] = {
    "logged": {"match": {"comm": "storm*"}},
    "failed": {"match": {"comm": "storm*", "exit_code": 1}},
    "theirs": {"match": {"user": 1000}},
    "others": {"match": {"comm": "storm*", "not": {"comm": "storm-a"}}},
    "hooked": {"match": {"comm": "storm*"}, "run": {"command": ["/bin/true"]}},
    "limited": {"match": {"comm": "storm*"}, "rate_limit": {"count": 2, "per": "1s", "by": "comm"}},
    "cooled": {"match": {"comm": "storm*"}, "cooldown": {"for": "1s"}, "run": {"command": ["/bin/true"]}},
    "repeated": {"match": {"comm": "storm*"}, "after": {"count": 3, "within": "9s", "by": "comm"}},
    "gathered": {"match": {"comm": "storm*"}, "coalesce": {"window": "1s", "by": "comm"}, "run": {"command": ["/a"]}},
}
ON_FILES: dict[str, dict[str, object]] = {"named": {"match": {"exe": "/bin/named"}}}
COMMS = ["storm-a", "storm-b", "storm\udcff", "shell"]


class Died(NamedTuple):
    """A process that ends."""

    pid: int
    comm: str
    status: int = 256
    uid: int = 1000
    ppid: int = SHELL
    inode: int = 5

    @property
    def message(self) -> bytes:
        stats = taskstats(
            16, ac_pid=self.pid, ac_tgid=self.pid, ac_ppid=self.ppid, ac_uid=self.uid, ac_exitcode=self.status,
            ac_flag=0x20, ac_exe_dev=1, ac_exe_inode=self.inode, ac_comm=self.comm.encode("utf-8", "surrogateescape"),
        )  # fmt: skip
        return exit_record(stats, family=FAMILY)

    @property
    def row(self) -> Exit:
        return Exit(PROC_EVENT_EXIT, 0, self.pid * 1_000_000, self.pid, self.pid, self.status, 17, self.ppid, self.ppid)


class Throttles:
    """A delivery with real throttles, and with room for so many jobs."""

    def __init__(self, matcher: Matcher, room: int) -> None:
        self.throttles = {one.name: throttle_of(one.rule) for one in matcher.rules}
        self.jobs, self.dropped = room, Counter[str]()
        self.passed: dict[str, list[int]] = {name: [] for name in self.throttles}
        self.held = Counter[str]()

    def decide(self, match):
        process, name = match.occurrence.process, match.rule.name
        if self.throttles[name].admit(early_fields(process), match.occurrence.kernel_time_ns) is not None:
            self.held[name] += 1
            return Fate.HELD
        self.passed[name].append(process.tgid)
        if match.runs_hook and not self.jobs:
            self.note_dropped(name, 1)
            return Fate.DROPPED
        self.jobs -= match.runs_hook
        return Fate.PASSES

    def holds(self, rule, fields, at_ns):
        return self.throttles[rule].holds(fields, at_ns)

    def is_below(self, rule, fields, more):
        return self.throttles[rule].is_below(fields, more)

    def hold(self, rule, fields, at_ns, count):
        self.held[rule] += count
        self.throttles[rule].hold(fields, at_ns, count)

    def room(self, rule):
        return self.jobs

    def note_dropped(self, rule, count):
        self.dropped[rule] += count


class Line:
    """A crowd amid a flood, with the steps of the pipeline around it."""

    def __init__(
        self,
        *names: str,
        room: int = 1000,
        deferred: int = 10_000,
        more: dict[str, object] | None = None,
        files: Any = None,
    ) -> None:
        known = {**RULES, **ON_FILES, "more": more or {}}
        names = (*names, "more") if more else names
        rules = [{"name": name, "events": ["nonzero_exit"], **known[name]} for name in names]
        self.files = files
        self.matcher = Matcher(plain(RuleFileModel.model_validate({"rules": rules}).rules))
        self.flood, self.family, self.failures = Flood(), HookFamily(DAEMON), Failures(Records(), lambda: 1.0)
        self.deferred: Deferred = Deferred(deferred)
        self.throttles = Throttles(self.matcher, room)
        self.crowd = Crowd(
            self.matcher, self.flood, self.deferred, self.throttles, self.family, lambda: 0, self.failures, files
        )
        self.counts, self.reported, self.shed = Counts(), dict[str, list[int]](), list[int]()

    def batch(
        self,
        *died: Died,
        keeps: bool = True,
        without_events: bool = False,
        forks: tuple[Fork, ...] = (),
        now_s: float | None = None,
    ) -> None:
        at_s = died[-1].pid / 1000 if now_s is None else now_s
        self.flood.note_batch(at_s - 0.2, at_s, at_s)
        sheds = self.crowd.begin(at_s, keeps)
        looks = [(one, sheds(one.pid, one.status, Who.in_message(one.message)) if sheds else None) for one in died]
        shed = [Shed(one.pid, what, one.message) for one, what in looks if what is not None]
        self.settle(shed, [*forks, *([] if without_events else [one.row for one in died])])
        settled = set(self.shed)
        for one in died:
            if one.pid not in settled:
                self.evaluate(one)

    def settle(self, shed: list[Shed], rows: list[Any]) -> None:
        records = ReadRecords([], [one.pid for one in shed], shed)
        self.shed += self.crowd.settle(records, rows, lambda one: decode_record(one, FAMILY), self.counts, 1)

    def evaluate(self, one: Died) -> None:
        occurrence = ended(one.row, decode_record(one.message, FAMILY), self.files)
        occurrence.from_hook = one.ppid in self.family.roots
        found = self.matcher.match(occurrence)
        self.crowd.learn(occurrence, found)
        for match in found:
            self.counts.rules[match.rule.name] += 1
            if not self.flood.active or self.crowd.is_reported(match, "u"):
                self.reported.setdefault(match.rule.name, []).append(one.pid)

    def taken(self) -> dict[str, list[int]]:
        """Take what was deferred: the PIDs by rule."""
        found: dict[str, list[int]] = {}
        while self.deferred:
            one = self.deferred.take()
            rule = one.rule if isinstance(one, Later) else one[0].rule
            pid = one.record.pid if isinstance(one, Later) else one[0].occurrence.process.tgid
            found.setdefault(rule.name, []).append(pid)
        return found


def expected(line: Line, died: list[Died]) -> dict[str, list[int]]:
    """The PIDs that each rule matches, without a look."""
    found: dict[str, list[int]] = {}
    for one in died:
        for match in line.matcher.match(ended(one.row, decode_record(one.message, FAMILY), None)):
            found.setdefault(match.rule.name, []).append(one.pid)
    return found


def storm(count: int, comm: str = "storm-a", first: int = 1000) -> list[Died]:
    return [Died(first + number, comm) for number in range(count)]


names = st.sampled_from(COMMS) | st.integers(0, 99).map("storm{}".format)
deaths = st.lists(
    st.tuples(names, st.sampled_from([256, 512, 9]), st.sampled_from([0, 1000])), min_size=1, max_size=400
)


@given(st.lists(st.sampled_from(sorted(RULES)), min_size=1, max_size=4, unique=True), deaths, st.integers(1, 90),
       st.integers(0, 30), st.integers(0, 30), st.booleans())  # fmt: skip
def test_every_match_is_accounted_for(names, deaths, size, room, deferred, keeps):
    line = Line(*names, room=room, deferred=deferred)
    died = [Died(1000 + number, *one) for number, one in enumerate(deaths)]
    for at in range(0, len(died), size):
        line.batch(*died[at : at + size], keeps=keeps)
    truth = expected(line, died)
    assert dict(line.counts.rules) == {name: len(pids) for name, pids in truth.items()}
    taken = line.taken()
    for name in names:
        sums = (
            len(line.reported.get(name, ()))
            + len(taken.get(name, ()))
            + line.flood.counted[name]
            + line.throttles.held[name]
        )
        assert sums == len(truth.get(name, ())), name
        assert set(line.reported.get(name, ())) <= set(truth.get(name, ()))
        assert set(taken.get(name, ())) <= set(truth.get(name, ()))


@given(deaths, st.integers(1, 90))
def test_after_fires_as_often_and_as_soon(deaths, size):
    """It counts every match, whether the process is matched or only looked at. In a batch the order may differ."""
    line = Line("repeated")
    died = [Died(1000 + number, *one) for number, one in enumerate(deaths)]
    for at in range(0, len(died), size):
        line.batch(*died[at : at + size])
    of = {one.pid: (one.comm, (one.pid - 1000) // size) for one in died}
    assert Counter(of[pid] for pid in line.throttles.passed["repeated"]) == Counter(of[pid] for pid in fires(died))


def fires(died: list[Died]) -> list[int]:
    """The third match of each name, once: the model of `repeated`."""
    seen, found = Counter[str](), list[int]()
    for one in died:
        if one.comm.startswith("storm"):
            seen[one.comm] += 1
            if seen[one.comm] == 3:
                found.append(one.pid)
    return found


def test_a_storm_is_matched_once_and_then_looked_at():
    line = Line("logged")
    for at in range(20):
        line.batch(*storm(64, first=1000 + 64 * at))
    evaluated = 20 * 64 - len(line.shed)
    assert 64 <= evaluated <= 64 + SHARE * (1 + 2 * 1.28) + 10, "the first batch, twice the share, and a few to renew"
    assert line.counts.rules["logged"] == 20 * 64
    assert len(line.taken()["logged"]) == len(line.shed), "they are reported later"


def test_a_storm_of_names_is_looked_at():
    line = Line("hooked", room=10)
    for at in range(20):
        line.batch(*[Died(1000 + 64 * at + number, f"storm{at}-{number}") for number in range(64)])
    assert len(line.shed) >= 18 * 64
    assert line.throttles.dropped["hooked"] == 20 * 64 - 10


@pytest.mark.parametrize(
    "key", [{"lifetime": "> 1s"}, {"unit": "a.service"}, {"cmdline": "*x*"}, {"parent": {"comm": "sh"}}]
)
def test_a_rule_that_needs_more_than_a_look_ends_it(key):
    line = Line("logged", more={"match": key})
    for at in range(20):
        line.batch(*storm(64, first=1000 + 64 * at))
    assert not line.shed


class Files:
    """A lookup that knows one program by its file."""

    knows_all_named = True

    def __init__(self, *unsure: int) -> None:
        self.unsure = unsure

    def find(self, file, comm, start_ns=None):
        return FoundFile(("/bin/named",), True, False) if file.inode == 7 else None

    def is_one_program(self, file):
        return file.inode not in self.unsure

    def is_replaced(self, path, file):
        return False

    def learn(self, process):
        pass


def test_a_file_that_was_another_program_decides_nothing():
    """Processes that started before the program was moved match its old path, and others do not."""
    line = Line("named", files=Files(8))
    for at in range(4):
        line.batch(*[Died(1000 + 100 * at + number, "storm-a", inode=8 + number % 2) for number in range(99)])
    assert line.shed and all((pid - 1000) % 100 % 2 for pid in line.shed)


def test_processes_of_hooks_are_never_shed():
    line = Line("logged")
    line.family.add(5000)
    line.batch(*storm(400))
    for at in range(10):
        first = 1400 + 40 * at
        hooks = Died(first + 30, "storm-a", ppid=DAEMON), Died(first + 31, "storm-a", ppid=5000), Died(5000, "storm-a")
        line.batch(*storm(30, first=first), *hooks, now_s=(first + 32) / 1000)
    assert len(line.shed) > 150 and all((pid - 1400) % 40 < 30 and pid < 5000 for pid in line.shed)


def test_what_is_limited_is_not_deferred_beyond_its_limit():
    line = Line("limited")
    for at in range(10):
        line.batch(*storm(64, first=1000 + 64 * at))
    assert len(line.reported["limited"]) + len(line.taken().get("limited", ())) <= 2
    assert line.throttles.held["limited"] + line.flood.counted["limited"] >= 10 * 64 - 2


def test_what_was_found_is_found_anew():
    """The program of a name may have been replaced."""
    line = Line("logged")
    line.batch(*storm(400))
    now_s = line.flood.seen_s
    line.batch(*storm(100, first=1400), now_s=now_s)
    assert len(line.shed) > 50
    before = len(line.shed)
    line.crowd.learn = lambda *_: None  # type: ignore[method-assign]
    line.batch(*storm(100, first=1500), now_s=now_s + MEMO_S)
    assert 50 < len(line.shed) - before < 100, "one is to be matched, and the rule's share"
    before = len(line.shed)
    line.batch(*storm(100, first=1600), now_s=now_s + 2 * MEMO_S)
    assert len(line.shed) == before, "what was not found anew is known no more"


def test_what_was_found_long_ago_is_known_no_more():
    line = Line("logged")
    line.batch(*storm(400))
    line.crowd.learn = lambda *_: None  # type: ignore[method-assign]
    line.batch(*storm(100, first=1400), now_s=line.flood.seen_s + 0.5)
    assert not line.shed


def test_after_a_silence_the_flood_is_over():
    line = Line("limited", "hooked", room=40)
    line.batch(*storm(400))
    assert line.crowd.begin(line.flood.seen_s + CALM_S - 0.1, True) is not None
    assert line.crowd.begin(line.flood.seen_s + 2 * CALM_S, True) is None
    assert not line.flood.active


def test_what_is_held_now_may_pass_at_the_time_of_the_event():
    """The events of a batch are later than those of the batch before it."""
    line = Line("limited")
    line.batch(*storm(64))
    line.batch(*storm(64, first=1064))
    reported = len(line.reported["limited"])
    line.batch(*storm(5, first=2200), now_s=2.2)
    assert len(line.reported["limited"]) == reported + 2
    assert line.throttles.held["limited"] + reported + 2 + line.flood.counted["limited"] == 133


@pytest.mark.parametrize("by", ["rule", "uid", "comm"])
def test_after_counts_each_match_of_a_storm(by):
    line = Line(more={"match": {"comm": "storm*"}, "after": {"count": 1000, "within": "1h", "by": by}})
    for at in range(20):
        line.batch(*storm(100, first=1000 + 100 * at))
    assert line.throttles.passed["more"] == [1999]


def test_a_hook_that_was_started_in_the_batch_is_matched():
    line = Line("logged")
    line.family.add(5000)
    line.batch(*storm(400))
    line.batch(*storm(60, first=1400))
    before = set(line.shed)
    forks = tuple(
        Fork(PROC_EVENT_FORK, 0, 1, parent, parent, child, child) for parent, child in ((5000, 6000), (6000, 6001))
    )
    hooks = Died(6001, "storm-a"), Died(6002, "storm-a", ppid=6001)
    line.batch(*storm(30, first=1460), *hooks, forks=forks, now_s=1.49)
    assert set(line.shed) - before and not {6001, 6002} & set(line.shed)


def test_an_event_of_the_next_owner_of_a_pid_is_not_joined():
    line = Line("logged")
    line.batch(*storm(400))
    line.taken()
    line.batch(*storm(45, first=1400), without_events=True)
    assert line.crowd.waiting == len(line.shed) > 30
    line.settle([], [Died(pid, "storm-a", status=9).row for pid in line.shed[:10]])
    assert not line.taken() and line.flood.counted["logged"] == 10
    waiting = line.crowd.waiting
    again = [Died(pid, "storm-a") for pid in line.shed[-10:]]
    line.batch(*again, without_events=True, now_s=1.445)
    assert line.crowd.waiting == waiting
    assert line.flood.counted["logged"] + line.shed.count(again[0].pid) - 2 >= 10, "the owners before were counted"
    assert line.flood.counted["logged"] > 10


def test_other_rules_find_anew():
    line = Line("logged")
    line.batch(*storm(200))
    line.batch(*storm(40, first=1200))
    assert line.shed
    line.crowd.use(Line("logged", "failed").matcher)
    count = len(line.shed)
    line.batch(*storm(40, first=1240))
    assert len(line.shed) == count


def test_an_event_that_comes_later_is_waited_for():
    line = Line("logged")
    line.batch(*storm(200))
    line.taken()
    late = storm(20, first=1200)
    line.batch(*late, without_events=True)
    waited = line.shed[-3:]
    assert not set(waited) & set(line.taken().get("logged", ()))
    line.crowd.begin(line.flood.seen_s, True)
    line.settle([], [one.row for one in late])
    assert set(waited) <= set(line.taken()["logged"])


def test_an_event_that_never_comes_is_counted():
    line = Line("logged")
    line.batch(*storm(200))
    line.batch(*storm(20, first=1200), without_events=True)
    counted = line.flood.counted["logged"]
    line.crowd.expire(line.flood.seen_s + AWAITED_S)
    assert line.flood.counted["logged"] == counted and line.crowd.awaits
    line.crowd.expire(line.flood.seen_s + AWAITED_S + 1)
    assert line.flood.counted["logged"] > counted
    assert not line.crowd.awaits

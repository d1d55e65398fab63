"""The plan: requesting less from the kernel must change no match.

The property: for random rules and random histories of a machine, the pipeline under its plan (a kernel that applies the
mask and runs the programs, then Tracker and Matcher) gives exactly the matches of the pipeline that requests
everything, and both give what really happened, for every combination of features that a kernel may lack.
`beyond_counting` lists what cannot be known without exit records; there a match may be missing but never wrong.
"""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from unit.process.machine import (
    INIT,
    MILLISECOND,
    SECOND,
    Machine,
    MachineFiles,
    MachineProcFs,
    Unfolding,
    as_read,
    batches,
    live,
    many_steps,
    steps,
    unread,
)
from unit.rules.simulated_kernel import Kernel, event_message, record_message
from unit.rules.trees import ENDING_KEYS, IDENTITY_KEYS, trees

from cnprocd.connector import uapi
from cnprocd.connector.filter import ConnectorFilter, TaskstatsFilter, connector_program
from cnprocd.connector.request import Features, Request
from cnprocd.connector.status import EVERY_STATUS, FAILURES, NO_STATUS, StatusSet
from cnprocd.process.deaths import HOLD_NS
from cnprocd.process.model import EVERYTHING, Occurrence, Wanted
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking
from cnprocd.rules.compile import CompiledRule, Matcher
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleModel
from cnprocd.rules.plan import Plan, identity_of, make_plan
from cnprocd.rules.ruleset import EVENT_NAMES, Rule

OWN = 50
FORK, EXIT = uapi.PROC_EVENT_FORK, uapi.PROC_EVENT_EXIT
KINDS = frozenset(EVENT_NAMES) - {"nonzero_exit"}
EVERY_BIT = uapi.PROC_EVENT_ALL & ~uapi.PROC_EVENT_NONZERO_EXIT
KERNELS = [Features(mask, taskstats, bpf) for mask, taskstats, bpf in product((True, False), repeat=3)]
WITH_RECORDS = [features for features in KERNELS if features.taskstats]
WITHOUT_RECORDS = [features for features in KERNELS if not features.taskstats]

# --- random rule sets


def written(events, match, include_hooks, threads) -> Rule | None:
    keys = {"events": events, "threads": threads, "include_hooks": include_hooks} | ({"match": match} if match else {})
    try:
        return plain(RuleModel.model_validate({"name": "r", **keys}))
    except ValidationError:
        return None  # it could never match, and is rejected


_any_events = st.lists(st.sampled_from(EVENT_NAMES), min_size=1, max_size=3, unique=True)
_any_exits = st.sampled_from([["nonzero_exit"], ["exit"], ["exit", "coredump"], ["nonzero_exit", "exec"]])
_record_keys = {k: v for k, v in (IDENTITY_KEYS | ENDING_KEYS).items() if k not in ("exe", "cmdline", "cgroup", "unit")}
_proc_keys = {k: v for k, v in IDENTITY_KEYS.items() if k != "unit"}
_threads = st.sampled_from([False, False, False, True])
# One kind of rule for each rung of the ladder of identity sources: see rules/plan.py.
rules = st.one_of(
    st.builds(written, st.sampled_from([["nonzero_exit"], ["exit"]]), st.none(), st.booleans(), _threads),
    st.builds(
        written, st.sampled_from([["nonzero_exit"], ["exit"]]), trees(_record_keys, False, 1), st.booleans(), _threads
    ),
    st.builds(
        written, st.sampled_from([["exec"], ["exec", "comm"]]), trees(_proc_keys, False, 1), st.booleans(), _threads
    ),
    st.builds(written, _any_events, trees(IDENTITY_KEYS, depth=1), st.booleans(), _threads),
    st.builds(written, _any_exits, trees(IDENTITY_KEYS | ENDING_KEYS, depth=1), st.booleans(), _threads),
).filter(bool)
# With this rule, a process that is wrongly reported as vanished shows.
ANY_FAILURE = plain(RuleModel.model_validate({"name": "any", "events": ["nonzero_exit"], "on_unknown_exit": "match"}))
rule_sets = st.lists(rules | st.just(ANY_FAILURE), min_size=1, max_size=4).map(
    lambda chosen: [replace(rule, name=f"r{n}") for n, rule in enumerate(chosen)]
)

# --- the pipelines


def machine_before_us(hooks: bool) -> Machine:
    machine = Machine(own=OWN if hooks else None)
    if hooks:
        machine.put(OWN, INIT, "cnprocd", exe="/usr/sbin/cnprocd", cgroup="/system.slice/cnprocd.service")
    machine.put(60, INIT, "java", threads=3, exe="/usr/bin/java", uid=1000, gid=100, cgroup="/user.slice/u.scope")
    machine.put(70, 60, "ora_pmon_A", exe="/opt/db/ora_pmon_A", uid=54, gid=55, cgroup="/system.slice/oracle.service")
    return machine


def key(name: str, event: str, occurrence: Occurrence) -> tuple:
    process = occurrence.process
    thread = occurrence.tid if occurrence.of_thread else None
    return name, event, process.tgid, thread, occurrence.status, process.comm


class History:
    """The history of a machine as messages, cut into drains."""

    def __init__(self, operations, cut, ahead, sweeps, hooks, lone_codes=(0,), pace_ns=0) -> None:
        machine = machine_before_us(hooks)
        self.before = machine.proc()
        live(machine, operations, lone_codes, spare=[OWN] if hooks else [], pace_ns=pace_ns)
        self.after, self.truth, self.ended_ns = machine.proc(), machine.truth, machine.now
        self.views = {entry.at_ns: entry.proc for entry in machine.log}
        self.drains, now_ns = [], 0
        for events, records, late in batches(machine.log, cut, ahead):
            now_ns = max([now_ns, *(entry.at_ns for entry in (*events, *records))])
            events_seen = [(entry.said, event_message(entry.said)) for entry in events]
            self.drains.append((events_seen, [record_message(entry.said) for entry in records], late, now_ns))
        self.sweeps = sweeps

    def matches(self, matcher: Matcher, plan: Plan, features: Features) -> Counter:
        """Return the matches of the rules under a plan."""
        kernel, reader = Kernel(plan.request, features), MachineProcFs(self.before)
        files = MachineFiles(matcher.exe_paths, matcher.exe_directories is not None)
        tracker = Tracker(plan.tracking, reader, OWN, matcher.cares, files)
        kernel.reader.pass_over(tracker.unasked.asks_for)
        if plan.tracking.table:
            tracker.adopt(reader.scan(plan.tracking.wanted_anew))
        found = Counter()

        def evaluate(occurrences) -> None:
            for occurrence in occurrences:
                for match in matcher.match(occurrence):
                    assert not occurrence.recovered, "nothing was lost"
                    found[key(match.rule.name, match.event, occurrence)] += 1

        swept_ns, held_until = 0, None
        for n, (events, records, late, now_ns) in enumerate(self.drains):
            reader.late = late
            events_seen = [got for event in events if (got := kernel.event(*event)) is not None]
            read = kernel.records(records)
            came_ns = [row[2] for row in events_seen]
            if held_until is not None and min(came_ns, default=0) > held_until:
                evaluate(tracker.take([], [], held_until))  # as the loop does for held deaths
            seen = Unfolding(events_seen, reader, self.views)
            evaluate(tracker.take(seen, read.records, now_ns, read.passed))
            held_until = now_ns + HOLD_NS if tracker.deaths.has_held else None
            if n in self.sweeps and now_ns - swept_ns > SECOND:
                reader.proc, swept_ns = late, now_ns
                evaluate(tracker.sweep(now_ns))
        reader.proc = reader.late = self.after
        evaluate(tracker.take([], [], self.ended_ns + SECOND))
        for seconds in (3, 6):
            evaluate(tracker.sweep(self.ended_ns + seconds * SECOND))
        return found

    def true_matches(self, matcher: Matcher) -> Counter:
        """Return the matches of the rules for what really happened."""
        known = as_read(self.truth, unread([[event for event, _ in events] for events, *_ in self.drains]))
        return Counter(key(m.rule.name, m.event, o) for o in known for m in matcher.match(o))


def unplanned() -> Plan:
    """Return a plan that requests everything."""
    request = Request(uapi.PROC_EVENT_ALL, ConnectorFilter(EVERY_BIT), TaskstatsFilter(), True)
    return Plan(request, Tracking(True, True, EVERYTHING, KINDS, KINDS, exe_files=True))


def relatives(rule: CompiledRule) -> bool:
    return "ancestors" in rule.needs


def beyond_counting(rule: CompiledRule) -> bool:
    """Return what is unknown without exit records: usage, names of ending threads, and the process that had adopted a
    process which was reaped before its end was sent.
    """
    return bool({"usage", "ancestors"} & rule.needs.keys()) or (
        rule.rule.threads and "exit" in rule.kinds and "comm" in rule.needs
    )


def nameless_threads(found: Counter) -> Counter:
    """Return an occurrence without the names of ending threads, which only a record has."""
    nameless = Counter()
    for match, count in found.items():
        _, _, _, thread, status, _ = match
        nameless[(*match[:5], None) if thread is not None and status is not None else match] += count
    return nameless


def only(found: Counter, names: set[str]) -> Counter:
    return Counter({match: count for match, count in found.items() if match[0] in names})


histories = {
    "operations": steps,
    "cut": st.lists(st.integers(1, 200), max_size=8),
    "ahead": st.lists(st.integers(0, 6), max_size=4),
    "sweeps": st.frozensets(st.integers(0, 8), max_size=3),
    "hooks": st.booleans(),
}


# A child of a process outside of any login session may have begun one.
NO_SESSION_AT_A_FORK = (
    [written(["fork"], {"not": {"loginuid": 0}}, False, False)],
    History(many_steps(0, 7), [], [], frozenset(), False, (0, 0, 5)),
)


@given(rule_sets, st.builds(History, **histories, lone_codes=st.just((0, 0, 5))))
@example(*NO_SESSION_AT_A_FORK)
@settings(max_examples=100)
def test_a_full_request_reports_what_happened(rule_set, history):
    """The oracle itself. The parent is left to the next test: /proc has no parent of a dead process."""
    matcher = Matcher(rule_set)
    found, truth = history.matches(matcher, unplanned(), Features()), history.true_matches(matcher)
    known = {rule.name for rule in matcher.rules if not relatives(rule)}
    assert not only(found, known) - truth, "a match that is not one"
    # No event shows that a child is outside of any login session, and it is not inherited: docs/guarantees.md.
    certain = known - {rule.name for rule in matcher.rules if "loginuid" in rule.needs}
    assert only(found, certain) == only(truth, certain)


# The exit record alone decides which of the paths that rules name was executed.
NEGATED_LITERAL = (
    [written(["nonzero_exit"], {"not": {"exe": "/bin/sh"}}, False, False)],
    History(many_steps(0, 4), [], [], frozenset(), False, (0, 0, 5)),
)


# A leader ends, and another thread executes a program in its place and ends, before the events are read.
GONE_BEFORE_ITS_EVENTS = (
    [written(["fork", "exit"], {"comm": "java"}, False, False)],
    History(many_steps(132008, 23), [2, 23], [6], frozenset({2}), False, (0, 0, 5)),
)


# A process changes its comm between two execs that are read at once: no read shows the program of that moment.
COMM_BETWEEN_EXECS = (
    [written(["exec", "comm"], {"exe": "/usr/bin/[!s]*", "cgroup": "/*.slice/*", "euid": 0}, False, False)],
    History(many_steps(369663784, 23), [], [], frozenset(), False, (0, 0, 5)),
)


@given(rule_sets, st.builds(History, **histories, lone_codes=st.just((0, 0, 5))), st.booleans())
@example(*NEGATED_LITERAL, False)
@example(*COMM_BETWEEN_EXECS, False)
@example(*GONE_BEFORE_ITS_EVENTS, False)
@settings(max_examples=150)
def test_the_plan_changes_no_match_where_there_are_exit_records(rule_set, history, follow):
    matcher = Matcher(rule_set)
    expected = history.matches(matcher, unplanned(), Features())
    follow = follow or OWN in history.before
    for features in WITH_RECORDS:
        # The records of these histories name no file.
        plan = make_plan(matcher, features, follow_hooks=follow, unwatched=matcher.exe_paths)
        assert history.matches(matcher, plan, features) == expected, (features, plan)


LONE = st.sampled_from(  # see test_tracker_histories.py
    [
        {"lone_codes": st.just((0,)), "pace_ns": st.just(0)},
        {"lone_codes": st.just((0, 0, 5)), "pace_ns": st.just(10 * MILLISECOND)},
    ]
)


# A death is held until its parent has ended as well; its zombie has another parent by then.
ORPHANED_AT_DEATH = (
    [written(["exit"], {"parent": {"comm": "java"}}, False, False)],
    History(many_steps(136, 4), [], [], frozenset(), False),
)


@given(rule_sets, LONE.flatmap(lambda lone: st.builds(History, **histories, **lone)))
@example(*ORPHANED_AT_DEATH)
@settings(max_examples=100)
def test_the_plan_changes_no_match_where_threads_are_counted(rule_set, history):
    matcher = Matcher(rule_set)
    everything = nameless_threads(history.matches(matcher, unplanned(), Features()))
    certain = {rule.name for rule in matcher.rules if not beyond_counting(rule)}
    for features in WITHOUT_RECORDS:
        plan = make_plan(matcher, features, follow_hooks=OWN in history.before)
        found = nameless_threads(history.matches(matcher, plan, features))
        assert only(found, certain) == only(everything, certain), (features, plan)
        assert not found - everything, "a match that is not one"


# --- requests, rule set by rule set


def plan_of(*given_rules: dict, features: Features | None = None, follow: bool = False) -> Plan:
    chosen = [plain(RuleModel.model_validate({"name": f"r{n}", **keys})) for n, keys in enumerate(given_rules)]
    return make_plan(Matcher(chosen), features or Features(), follow)


FAILED_BY_NAME = {"events": ["nonzero_exit"], "match": {"comm": "ora_*"}}


def test_failed_exits_by_name_cost_nothing_per_success():
    """Neither fork nor exec nor a successful exit is requested, in the mask and in the program."""
    plan = plan_of(FAILED_BY_NAME)
    assert plan.request.mask == uapi.PROC_EVENT_NONZERO_EXIT
    assert plan.request.connector == ConnectorFilter(EXIT, thread_forks=False, exits=FAILURES)
    assert plan.request.taskstats == TaskstatsFilter(FAILURES)
    assert not plan.tracking.table
    assert plan.tracking.wanted == Wanted()


def test_an_old_kernel_is_asked_the_same_by_program():
    plan = plan_of(FAILED_BY_NAME, features=Features(event_mask=False))
    assert plan.request.mask == uapi.PROC_EVENT_ALL
    assert plan.request.connector.exits == FAILURES


def test_one_exit_code_is_all_that_is_asked_for():
    plan = plan_of({"events": ["nonzero_exit"], "match": {"comm": "x", "exit_code": 3}})
    only_3 = StatusSet.of([(3, 3)], ())
    assert (plan.request.connector.exits, plan.request.taskstats) == (only_3, TaskstatsFilter(only_3))
    assert plan.tracking.statuses == only_3


def test_the_statuses_of_several_rules_are_united():
    plan = plan_of(
        {"events": ["nonzero_exit"], "match": {"exit_code": 3}},
        {"events": ["exit"], "match": {"signal": "SIGKILL"}},
        {"events": ["exec"]},
    )
    assert plan.request.connector.exits == StatusSet.of([(3, 3)], [9])


def test_many_exit_codes_are_made_a_coarse_range_that_holds_them():
    odd = [{"events": ["nonzero_exit"], "match": {"exit_code": n}} for n in range(1, 100, 2)]
    plan = plan_of(*odd)
    assert plan.request.connector.exits.codes == ((1, 99),)
    assert len(connector_program(plan.request.connector)) < 256


def test_no_rules_ask_for_next_to_nothing():
    plan = plan_of()
    assert plan.request.mask not in (0, uapi.PROC_EVENT_ALL), "0 would mean everything"
    assert plan.request.connector.events == 0
    assert plan.request.taskstats is None


def test_every_event_of_every_process_is_one_full_request():
    plan = plan_of({"events": "all", "threads": True}, {"events": "all"})
    assert plan.request.mask == uapi.PROC_EVENT_ALL
    assert connector_program(plan.request.connector) == ()
    assert plan.request.sequence, "nothing is filtered, so a gap means a loss"


@pytest.mark.parametrize(
    "keys",
    [{"events": ["exit"]}, {"events": ["nonzero_exit"]}, {"events": "all", "match": {"comm": "x"}}],
    ids=["exit", "nonzero_exit", "all but threads"],
)
def test_gaps_mean_nothing_where_anything_is_filtered(keys):
    assert not plan_of(keys).request.sequence


@pytest.mark.parametrize(
    ("keys", "identity", "without_taskstats"),
    [
        ({"events": ["exit"]}, "none", "table"),
        ({"events": ["nonzero_exit"], "match": {"comm": "x", "user": 0}}, "taskstats", "table"),
        ({"events": ["exit"], "match": {"lifetime": "< 5s", "max_rss": "> 1M"}}, "taskstats", "table"),
        ({"events": ["exit"], "match": {"comm": "x", "exe": "/x"}}, "taskstats", "table"),
        ({"events": ["exit"], "match": {"exe": ["/x", "/y/*"]}}, "table", "table"),
        ({"events": ["exit"], "match": {"exe_claimed": "/x"}}, "table", "table"),
        ({"events": ["exec"], "match": {"exe": "/x"}}, "procfs", "procfs"),
        ({"events": ["exit"], "match": {"parent": {"comm": "x"}}}, "table", "table"),
        ({"events": ["exit"], "match": {"not": {"unit": "x.service"}}}, "table", "table"),
        ({"events": ["exec"]}, "none", "none"),
        ({"events": ["fork", "sid", "coredump"]}, "none", "none"),
        ({"events": ["exec", "comm"], "match": {"comm": "x", "exe": "/x", "unit": "y"}}, "table", "table"),
        ({"events": ["exec", "coredump"], "match": {"comm": "x", "exe": "/x", "unit": "y"}}, "procfs", "procfs"),
        ({"events": ["comm"], "match": {"comm": "x"}}, "none", "none"),
        ({"events": ["exec", "comm"], "match": {"comm": "x"}}, "procfs", "procfs"),
        ({"events": ["exec"], "match": {"ancestor": {"comm": "x"}}}, "table", "table"),
        ({"events": ["fork"], "match": {"comm": "x"}}, "table", "table"),
        ({"events": ["coredump"], "match": {"comm": "x"}}, "procfs", "procfs"),
        ({"events": ["exit", "exec"]}, "none", "table"),
        ({"events": ["exit", "exec"], "match": {"comm": "x"}}, "procfs", "table"),
        ({"events": ["exit", "uid"], "match": {"comm": "x"}}, "table", "table"),
    ],
)
def test_identity_comes_from_the_cheapest_source(keys, identity, without_taskstats):
    keys = {**keys, "log": False}
    (compiled,) = Matcher([plain(RuleModel.model_validate({"name": "r", **keys}))]).rules
    assert identity_of(compiled, Features()) == identity
    assert identity_of(compiled, Features().without_taskstats()) == without_taskstats
    assert plan_of(keys).tracking.table is (identity == "table")


def test_only_files_that_a_rule_needs_are_read():
    plan = plan_of({"events": ["exec"], "match": {"exe": "/x", "not": {"unit": "y"}}})
    assert plan.tracking.wanted == Wanted(exe=True, cgroup=True)


def test_running_hooks_add_forks_and_the_ends_of_leaders():
    plain, following = plan_of(FAILED_BY_NAME), plan_of(FAILED_BY_NAME, follow=True)
    assert following.request.connector == ConnectorFilter(EXIT | FORK, False, FAILURES, leader_exits=True)
    assert following.request.mask == EXIT | FORK
    assert following.tracking.table is plain.tracking.table is False


def test_without_records_every_thread_is_counted():
    plan = plan_of(FAILED_BY_NAME, features=Features().without_taskstats())
    assert (plan.request.taskstats, plan.tracking.records, plan.tracking.table) == (None, False, True)
    assert plan.request.connector.thread_forks
    assert plan.request.connector.exits == EVERY_STATUS
    assert plan.request.mask & (FORK | EXIT) == FORK | EXIT


def test_without_socket_filters_the_mask_alone_narrows():
    plan = plan_of(FAILED_BY_NAME, features=Features(socket_filter=False))
    assert plan.request.connector.passes_everything()
    assert plan.request.mask & EXIT


def test_rules_that_are_off_ask_for_nothing():
    assert plan_of({"events": "all", "enabled": False}) == plan_of()
    assert plan_of({"events": ["exec"]}).request.connector.exits == NO_STATUS

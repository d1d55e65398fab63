"""After a reload the same rules match the same running processes as a daemon that was started at that moment."""

import itertools
from collections import Counter
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st
from unit.process.machine import SECOND, MachineProcFs, Unfolding, batches, live, many_steps, steps
from unit.rules.simulated_kernel import Kernel, event_message, record_message
from unit.rules.test_plan import OWN, WITH_RECORDS, key, machine_before_us, only, relatives, rule_sets, written

from cnprocd.connector.request import Features
from cnprocd.process.deaths import HOLD_NS
from cnprocd.process.tracker import Tracker
from cnprocd.rescan import Rescan
from cnprocd.rules.compile import Matcher
from cnprocd.rules.plan import Plan, make_plan


def feed(tracker, matcher, plan: Plan, features: Features, entries, reader, cut, ahead) -> Counter:
    """Let a daemon read what happened; its matches."""
    kernel, found = Kernel(plan.request, features), Counter()
    kernel.reader.pass_over(tracker.unasked.asks_for)
    views = {entry.at_ns: entry.proc for entry in entries}

    def evaluate(occurrences) -> None:
        for occurrence in occurrences:
            if occurrence.recovered:
                continue  # a PID that is reused before the next sweep: both may take its old owner for vanished
            for match in matcher.match(occurrence):
                found[key(match.rule.name, match.event, occurrence)] += 1

    now_ns = 0
    for events, records, late in batches(entries, cut, ahead):
        now_ns = max([now_ns, *(entry.at_ns for entry in (*events, *records))])
        reader.late = late
        seen = [got for entry in events if (got := kernel.event(entry.said, event_message(entry.said))) is not None]
        read = kernel.records([record_message(entry.said) for entry in records])
        evaluate(tracker.take(Unfolding(seen, reader, views), read.records, now_ns, read.passed))
    evaluate(tracker.take([], [], now_ns + 2 * HOLD_NS))
    for seconds in (3, 6):
        evaluate(tracker.sweep(now_ns + seconds * SECOND))
    return found


def started(matcher, plan: Plan, reader) -> Tracker:
    tracker = Tracker(plan.tracking, reader, OWN, matcher.cares)
    if plan.tracking.table:
        tracker.adopt(reader.scan(plan.tracking.wanted_anew))
    return tracker


# Rules that need what was not read for others, and match often.
TELLING = [
    written(["exit"], match, False, False)
    for match in ({"comm": "*"}, {"exe": "/*"}, {"cgroup": "/*"}, {"cmdline": "*"}, {"parent": {"exe": "/*"}})
]
telling = st.lists(st.sampled_from(TELLING), min_size=1, max_size=2).map(
    lambda chosen: [replace(rule, name=f"r{n}") for n, rule in enumerate(chosen)]
)


# One drain has the end of a process and the core dump of the next one with its PID.
CORE_DUMP_OF_A_REUSED_PID = (
    [TELLING[0]], [TELLING[0]], many_steps(3821, 78), [many_steps(109904, 24)], many_steps(2369630, 10),
    WITH_RECORDS[0], [], [], 1,
)  # fmt: skip

# The same, and the former process had dumped core as well, by the same signal.
CORE_DUMP_AFTER_ANOTHER = (
    [TELLING[0]], [written(["nonzero_exit"], None, True, False)], many_steps(714, 34), [], many_steps(714, 34),
    WITH_RECORDS[2], [], [3, 5, 3], 2,
)  # fmt: skip

# A child of root changes its uid and executes nothing. The former rules knew its program, the new ones do not ask.
CMDLINE_AFTER_EXE = (
    [TELLING[1]], [TELLING[3]], many_steps(10091288, 72), [many_steps(7732, 25), many_steps(33209, 21)],
    many_steps(7732, 25), WITH_RECORDS[1], [2, 6], [2, 6], 1,
)  # fmt: skip

# The scan of the reload shows that a process is outside of any login session before the second look does.
NO_SESSION = (
    [written(["nonzero_exit"], {"loginuid": "unset"}, False, False)], [TELLING[0]], many_steps(0, 8),
    [many_steps(10, 4), many_steps(0, 4)], many_steps(0, 4), WITH_RECORDS[0], [], [], 1,
)  # fmt: skip


@given(
    rule_sets | telling, rule_sets | telling, steps, st.lists(steps, max_size=3), steps, st.sampled_from(WITH_RECORDS),
    st.lists(st.integers(1, 100), max_size=4), st.lists(st.integers(0, 6), max_size=4), st.integers(1, 4),
)  # fmt: skip
@example(*CORE_DUMP_OF_A_REUSED_PID)
@example(*CORE_DUMP_AFTER_ANOTHER)
@example(*CMDLINE_AFTER_EXE)
@example(*NO_SESSION)
@settings(max_examples=150)
def test_a_reload_knows_what_a_fresh_start_knows(before, after, lived, meanwhile, later, features, cut, ahead, slice_):
    """Also if processes start, change and end while /proc is read; and the rules in force match them all the time."""
    machine = machine_before_us(hooks=False)
    reader = MachineProcFs(machine.proc())
    old, new = Matcher(before), Matcher(after)
    old_plan, new_plan = make_plan(old, features), make_plan(new, features)
    running, steady = started(old, old_plan, reader), started(old, old_plan, reader)

    live(machine, lived)
    for tracker in (running, steady):
        feed(tracker, old, old_plan, features, list(machine.log), reader, cut, ahead)
    both = old.and_other(new)
    both_plan = make_plan(both, features)
    running.use(both_plan.tracking, both.cares)
    clock = itertools.count()  # each look at it is one step: a slice is so many groups
    rescan = Rescan(reader, running, None, lambda group: None, lambda: next(clock), lambda: machine.now)
    for some in [*meanwhile, None]:
        machine.wait(10 * SECOND)
        reader.proc = reader.late = machine.proc()
        while not (is_done := rescan.go_on(slice_)) and some is None:
            pass
        if is_done or some is None:
            break
        past, truths = len(machine.log), len(machine.truth)
        live(machine, some)
        happened = machine.log[past:]
        found = feed(running, old, both_plan, features, happened, reader, cut, ahead)
        steady_found = feed(steady, old, old_plan, features, happened, reader, cut, ahead)
        assert not steady_found - found
        # No event shows that a process is outside of any login session, and it is not inherited. The scan shows it.
        more = found - steady_found
        assert {match[0] for match in more} <= {rule.name for rule in old.rules if "loginuid" in rule.needs}
        assert not nameless(more) - true_matches(old, machine.truth[truths:])
    past, truths = len(machine.log), len(machine.truth)
    running.use(new_plan.tracking, new.cares)
    fresh_reader = MachineProcFs(machine.proc())
    fresh = started(new, new_plan, fresh_reader)

    live(machine, later)
    happened = machine.log[past:]
    found = feed(running, new, new_plan, features, happened, reader, cut, ahead)
    fresh_found = feed(fresh, new, new_plan, features, happened, fresh_reader, cut, ahead)
    assert not nameless(fresh_found) - nameless(found), "it may know more, for it has seen more, but not less"
    certain = {rule.name for rule in new.rules if not relatives(rule)}
    assert not nameless(only(found, certain)) - true_matches(new, machine.truth[truths:])


def true_matches(matcher: Matcher, truth) -> Counter:
    """Return the matches of what really happened, without the comm."""
    return nameless(Counter(key(m.rule.name, m.event, o) for o in truth for m in matcher.match(o)))


def nameless(found: Counter) -> Counter:
    """Without the comm: a record of a leader that ended before the start names a process to the older daemon only."""
    counts = Counter()
    for match, count in found.items():
        counts[match[:-1]] += count
    return counts

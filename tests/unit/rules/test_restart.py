"""What is handed on at a restart makes the next daemon match what the former one would have matched."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from unit.process.machine import SECOND, MachineProcFs, live, steps
from unit.rules.test_plan import WITH_RECORDS, machine_before_us, rule_sets, written
from unit.rules.test_reload import feed, started

from cnprocd.process.handed_on import HandedOn, decode_processes, encode_processes
from cnprocd.process.tracker import Tracker
from cnprocd.rules.compile import Matcher
from cnprocd.rules.plan import make_plan


def handed_on(tracker: Tracker, at_ns: int) -> HandedOn:
    """Return what a tracker knows, after its way through the file."""
    known = HandedOn(tracker.table.known(), tuple(tracker.deaths.early_leaders()), at_ns)
    return decode_processes(encode_processes(known, "boot")[0], "boot")


BROAD = [
    replace(rule, name=f"broad {n}")
    for n, match in enumerate(
        (
            {"exe": "/*"},
            {"cmdline": "*"},
            {"cgroup": "/*.slice/*"},
            {"parent": {"comm": "*"}},
            {"ancestor": {"comm": "java"}},
        )
    )
    if (rule := written(["exit"], match, False, False)) is not None
]
"""Rules that most processes match, if they are known."""
rules_to_keep = rule_sets | st.lists(st.sampled_from(BROAD), min_size=1, max_size=3, unique_by=lambda rule: rule.name)


@given(
    rules_to_keep, steps, steps, st.sampled_from(WITH_RECORDS), st.lists(st.integers(1, 100), max_size=4),
    st.lists(st.integers(0, 6), max_size=4),
)  # fmt: skip
@settings(max_examples=100)
def test_a_restart_costs_no_match(rules, lived, meanwhile, features, cut, ahead):
    """The events of the time without a daemon wait in the sockets; /proc is read after them."""
    machine = machine_before_us(hooks=False)
    reader = MachineProcFs(machine.proc())
    matcher = Matcher(rules)
    plan = make_plan(matcher, features)
    former = started(matcher, plan, reader)
    live(machine, lived)
    past = len(machine.log)
    feed(former, matcher, plan, features, list(machine.log), reader, cut, ahead)
    machine.wait(10 * SECOND)
    known = handed_on(former, machine.now)

    live(machine, meanwhile)
    next_reader = MachineProcFs(machine.proc())
    following = Tracker(plan.tracking, next_reader, 50, matcher.cares)
    following.deaths.adopt(known.leaders)
    if plan.tracking.table:
        scan = next_reader.scan(plan.tracking.wanted_anew)
        following.adopt(following.table.take_over(known.processes, known.at_ns, scan))
    queued = machine.log[past:]
    found = feed(following, matcher, plan, features, queued, next_reader, cut, ahead)
    expected = feed(former, matcher, plan, features, queued, reader, cut, ahead)
    assert Counter(found) == Counter(expected)

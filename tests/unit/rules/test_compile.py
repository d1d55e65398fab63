"""Rules to an index: it must find what a search of every rule finds, and the statuses and needs of a rule must include
everything that the rule could match. Brute force over all rules is the oracle.
"""

import os
import signal
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.rules.trees import (
    COMM_PATTERNS,
    COMMS,
    ENDING_KEYS,
    IDENTITY_KEYS,
    STATUSES,
    like,
    listed,
    match_data,
    model,
    occurrences,
    trees,
)

from cnprocd.connector.status import EVERY_STATUS, FAILURES, NO_STATUS
from cnprocd.process.model import Image, Occurrence, Process
from cnprocd.rules import compile as compile_module
from cnprocd.rules.compile import Matcher, compile_rule, evaluate, possible_statuses
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleModel
from cnprocd.rules.needs import needs_of, unknown_attributes
from cnprocd.rules.predicate import compile_condition
from cnprocd.rules.ruleset import EVENT_NAMES, Rule

SOME = [code << 8 for code in (*range(8), 254, 255)] + [n | core for n in (1, 6, 9, 11, 15, 64) for core in (0, 0x80)]
REAL = [code << 8 for code in range(256)] + [n | core for n in range(1, 65) for core in (0, 0x80)]


def rule(name="r", events=("exit",), **keys) -> Rule:
    return plain(RuleModel.model_validate({"name": name, "events": list(events), **keys}))


def exited(comm="sh", status: int | None = 256, **fields) -> Occurrence:
    return Occurrence("exit", Process(100, 1, comm=comm), 100, status, 10**9, **fields)


def names(matches) -> list[str]:
    return [match.rule.name for match in matches]


# --- the index

# Neighbours: prefixes of one another, patterns with nothing before the wildcard, the empty comm.
_letters = st.text("ab", max_size=4)
comm_patterns = st.one_of(
    st.sampled_from(COMM_PATTERNS),
    _letters.filter(bool),
    st.builds("{}*{}".format, _letters, _letters),
    st.builds("{}?{}".format, _letters, _letters),
    st.builds("{}[ab]{}".format, _letters, _letters),
    st.builds("/{}/".format, _letters.filter(bool)),
)
comm_lists = st.lists(comm_patterns, min_size=1, max_size=3, unique=True)
comm_rules = st.one_of(
    st.none(),
    st.builds(lambda comm: {"comm": comm}, comm_lists),
    st.builds(lambda comm: {"all": [{"user": 0}, {"comm": comm}]}, comm_lists),
    st.builds(lambda comm: {"not": {"comm": comm}}, comm_lists),
    st.builds(lambda comm: {"any": [{"comm": comm}, {"user": 0}]}, comm_lists),
)
comms = _letters | st.sampled_from(COMMS) | st.text(max_size=15)


def could_be(match, comm: str | None) -> bool:
    """Return whether a rule of comm_rules can match a comm: only a comm that every match needs excludes it."""
    needed = (match or {}).get("comm") or next((part["comm"] for part in (match or {}).get("all", [])[1:]), None)
    if needed is None:
        return True
    return comm is not None and any(like(pattern, comm) for pattern in listed(needed))


@given(
    st.lists(st.tuples(comm_rules, st.booleans(), st.booleans()), max_size=8), st.lists(comms | st.none(), max_size=8)
)
@settings(max_examples=150)
def test_the_candidates_equal_a_search_of_every_rule(given_rules, asked):
    rules = [
        rule(f"r{n}", match=match, threads=threads, enabled=enabled)
        if match
        else rule(f"r{n}", threads=threads, enabled=enabled)
        for n, (match, threads, enabled) in enumerate(given_rules)
    ]
    matcher = Matcher(rules)
    for comm in asked + asked:  # the second time from memory
        for of_thread in (False, True):
            found = matcher.candidates(exited(comm, of_thread=of_thread))
            expected = [
                f"r{n}"
                for n, (match, threads, enabled) in enumerate(given_rules)
                if enabled and threads is of_thread and could_be(match, comm)
            ]
            assert [compiled.name for compiled in found] == expected
            assert matcher.cares("exit", of_thread, comm) or not expected


@given(st.lists(match_data, min_size=1, max_size=5), st.lists(occurrences, min_size=1, max_size=4))
@settings(max_examples=80)
def test_the_matches_are_those_of_every_rule_alone(matches, happened):
    rules = [rule(f"r{n}", ["exit", "exec", "comm"], match=data) for n, data in enumerate(matches)]
    matcher = Matcher(rules)
    for occurrence in happened:
        expected = [r.name for r in rules if compile_condition(r.match)(occurrence) is True]
        assert [m.rule.name for m in matcher.match(occurrence) if not m.log_only] == expected


def test_candidates_come_in_the_order_of_the_file():
    rules = [
        rule("any"),
        *(rule(f"r{n}", match={"comm": p}) for n, p in enumerate(["/h/", "s*", "sh", "*", "?h", "sh"])),
    ]
    for order in (rules, rules[::-1]):
        assert [c.name for c in Matcher(order).candidates(exited("sh"))] == [r.name for r in order]


def test_rules_of_other_events_are_no_candidates():
    matcher = Matcher([rule("exec", ["exec"]), rule("exit", ["exit"]), rule("all", EVENT_NAMES)])
    for kind, expected in (("exec", ["exec", "all"]), ("exit", ["exit", "all"]), ("sid", ["all"])):
        assert [c.name for c in matcher.candidates(replace(exited(), kind=kind))] == expected
    assert Matcher([]).candidates(exited()) == ()


def test_wanted_events_and_possible_matches():
    matcher = Matcher([rule("a", ["exec"], threads=True), rule("b", ["nonzero_exit"], match={"comm": "ora_*"})])
    assert [k for k in ("fork", "exec", "exit") for t in (False, True) if matcher.wants(k, t)] == ["exec", "exit"]
    assert matcher.wants("exec", threads=True)
    assert not matcher.wants("exec", threads=False)
    assert matcher.cares("exit", False, "ora_pmon")
    assert not matcher.cares("exit", False, "sh")
    assert matcher.cares("exit", False, None), "an unknown comm could match"
    assert not matcher.cares("fork", False, None)


def test_the_memory_of_comms_is_bounded(monkeypatch):
    monkeypatch.setattr(compile_module, "_REMEMBERED_COMMS", 50)
    matcher = Matcher([rule(match={"comm": "x*"})])
    (index,) = (index for index in matcher._indices.values() if index.used)
    for n in range(1000):
        assert len(matcher.candidates(exited(f"x{n}"))) == 1
        assert len(index.remembered) <= 50


def test_no_pattern_is_looked_at_twice_for_one_comm(monkeypatch):
    looked = []
    matcher = Matcher([rule(match={"comm": "x*"})])
    (index,) = (index for index in matcher._indices.values() if index.used)
    look_up = index._look_up
    monkeypatch.setattr(index.__class__, "_look_up", lambda self, comm: looked.append(comm) or look_up(comm))
    for _ in range(5):
        matcher.candidates(exited("x1"))
    assert looked == ["x1"]


# --- statuses and needs


@given(match_data, st.lists(occurrences, min_size=1, max_size=3))
@settings(max_examples=150)
def test_the_possible_statuses_leave_out_none_that_matches(data, happened):
    match = model(data)
    test, possible = compile_condition(match), possible_statuses(match)
    for occurrence in happened:
        for status in SOME:
            if status not in possible:
                killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                oom = occurrence.oom if killed else False  # nothing else is the OOM killer's signal
                assert test(replace(occurrence, kind="exit", status=status, oom=oom)) is not True


@pytest.mark.parametrize(
    ("match", "matching"),
    [
        (None, lambda s: True),
        ({"exit_code": [3, "7-9"]}, lambda s: os.WIFEXITED(s) and os.WEXITSTATUS(s) in (3, 7, 8, 9)),
        ({"signal": [9]}, lambda s: os.WIFSIGNALED(s) and os.WTERMSIG(s) == 9),
        ({"exit_code": 3, "signal": [9]}, lambda s: s == 768 or (os.WIFSIGNALED(s) and os.WTERMSIG(s) == 9)),
        ({"core_dumped": True}, os.WIFSIGNALED),
        ({"core_dumped": True, "signal": [6]}, lambda s: os.WIFSIGNALED(s) and os.WTERMSIG(s) == 6),
        ({"core_dumped": False}, lambda s: True),
        ({"exit_status": "unknown"}, lambda s: False),
        ({"exit_status": "known"}, lambda s: True),
        ({"not": {"exit_code": 3}}, lambda s: True),
        ({"all": [{"exit_code": "1-5"}, {"exit_code": "4-9"}]}, lambda s: s in (4 << 8, 5 << 8)),
        ({"any": [{"exit_code": 1}, {"exit_code": 7}], "exit_code": "5-9"}, lambda s: s == 7 << 8),
        ({"any": [{"exit_code": 1}, {"comm": "sh"}]}, lambda s: True),
    ],
)
def test_the_possible_statuses_of_each_key(match, matching):
    possible = possible_statuses(model(match) if match else None)
    assert [s for s in REAL if s in possible] == [s for s in REAL if matching(s)]


def test_a_rule_s_statuses_are_those_of_its_events():
    assert compile_rule(rule(events=["exit"]), 0).statuses == EVERY_STATUS
    assert compile_rule(rule(events=["nonzero_exit"]), 0).statuses == FAILURES
    assert compile_rule(rule(events=["nonzero_exit", "exit"]), 0).statuses == EVERY_STATUS
    assert compile_rule(rule(events=["exec"]), 0).statuses == NO_STATUS


@pytest.mark.parametrize(
    ("match", "needs"),
    [
        (None, set()),
        ({"exit_code": 3, "signal": 9, "core_dumped": True}, set()),
        ({"comm": "x"}, {"comm"}),
        ({"user": 0, "group": 0}, {"ids"}),
        ({"exe": "/x", "cmdline": "x"}, {"exe_file", "cmdline"}),
        ({"exe": ["/x", "/y/*"]}, {"exe"}),
        ({"exe_claimed": "/x"}, {"exe_claimed"}),
        ({"parent": {"exe": "/x"}}, {"ancestors", "exe"}),
        ({"unit": "x"}, {"cgroup"}),
        ({"cgroup": "/x"}, {"cgroup"}),
        ({"lifetime": "< 1s"}, {"lifetime"}),
        ({"max_rss": "> 1M", "cpu_time": "> 1s"}, {"usage"}),
        ({"not": {"comm": "x"}}, {"comm"}),
        ({"any": [{"user": 0}, {"all": [{"exe": "/x"}]}]}, {"ids", "exe_file"}),
        ({"parent": {"comm": "x"}}, {"ancestors", "comm"}),
        ({"ancestor": {"not": {"parent": {"unit": "x"}}}}, {"ancestors", "cgroup"}),
    ],
)
def test_the_needs_of_each_key(match, needs):
    compiled = compile_rule(replace(rule(match=match) if match else rule(), log=None), 0)
    assert compiled.needs.keys() == compiled.match_needs == needs


@pytest.mark.parametrize(
    ("match", "process", "unknown"),
    [
        ({"exe": "/x"}, {}, [("exe", "gone")]),
        ({"exe": "/x"}, {"exe_is_unnamed": True}, []),
        ({"exe": "/*"}, {"image": Image("/x")}, [("exe", "unverified")]),
        (
            {"not": {"cmdline": "x*y"}},
            {"cmdline": "x", "image": Image(cmdline_is_cut=True)},
            [("cmdline", "truncated")],
        ),
        ({"unit": "x.service", "user": 0}, {}, [("cgroup", "gone"), ("user", "gone")]),
        ({"unit": "x.service", "user": 0}, {"uid": 1}, []),
        ({"comm": "sh", "parent": {"comm": "x"}}, {}, [("parent", "gone")]),
    ],
)
def test_a_rule_that_an_unknown_attribute_decides_is_told(match, process, unknown):
    matcher = Matcher([rule(match=match)])
    occurrence = Occurrence("exit", Process(100, 1, comm="sh", **process), 100, 256, 10**9)
    assert matcher.match(occurrence) == []
    found = [sorted(unknown_attributes(one.match_needs, occurrence)) for one in matcher.undecided]
    assert found == ([unknown] if unknown else [])


@pytest.mark.parametrize(
    ("keys", "needs"),
    [
        ({}, {"comm": ("the default message",)}),
        ({"log": False}, {}),
        (
            {"log": {"message": "{exe} of {unit} by {user}"}},
            {"exe": ("log.message",), "cgroup": ("log.message",), "ids": ("log.message",)},
        ),
        (
            {"log": {"message": "{exe}"}, "match": {"all": [{"exe": "/x"}]}},
            {"exe_file": ("match.all.exe", "log.message")},
        ),
        (
            {"log": {"message": "{exe}"}, "match": {"not": {"exe": "/x"}}},
            {"exe_file": ("match.not.exe",), "exe": ("log.message",)},
        ),
        ({"log": {"message": "{pid} {status} {ppid} {parent_comm}"}}, {}),
        ({"log": {"message": "{cgroup}"}, "match": {"unit": "x"}}, {"cgroup": ("match.unit", "log.message")}),
        ({"log": False, "rate_limit": {"count": 1, "per": "1m", "by": "unit"}}, {"cgroup": ("rate_limit.by",)}),
        ({"log": False, "after": {"count": 5, "within": "1m", "by": "unit"}}, {"cgroup": ("after.by",)}),
        ({"log": False, "cooldown": {"for": "1m", "by": "uid"}}, {"ids": ("cooldown.by",)}),
        ({"log": False, "cooldown": {"for": "1m", "by": "ppid"}}, {}),
        (
            {"log": False, "coalesce": {"window": "1s", "by": "exe"}, "run": {"command": ["/bin/x"]}},
            {"exe": ("coalesce.by",)},
        ),
        (
            {"log": False, "run": {"command": ["/bin/x", "--", "{exe}"], "env": {"U": "{unit}"}}},
            {"exe": ("run.command[2]",), "cgroup": ("run.env.U",)},
        ),
        (
            {"log": False, "run": {"command": ["/bin/x"], "serialize": "comm", "on_failure": {"message": "{cmdline}"}}},
            {"cmdline": ("run.on_failure.message",), "comm": ("run.serialize",)},
        ),
    ],
)
def test_every_line_that_names_an_attribute_needs_it(keys, needs):
    assert needs_of(rule(**keys)) == needs


NEEDED = {
    "comm": ["comm"], "ids": ["uid", "gid"], "exe": ["exe"], "exe_file": ["exe"], "exe_claimed": ["image"],
    "cmdline": ["cmdline"], "cgroup": ["cgroup"],
}  # fmt: skip


def bereft(occurrence: Occurrence, needs) -> Occurrence:
    """Return an occurrence without the attributes that a rule does not need."""
    kept = {field for need, fields in NEEDED.items() if need in needs for field in fields} | {
        "tgid",
        "ppid",
        "start_ns",
    }

    def less(process: Process) -> Process:
        fields = ("comm", "uid", "gid", "exe", "image", "cmdline", "cgroup", "start_ns")
        return replace(process, **{name: None for name in fields if name not in kept})

    above = tuple(map(less, occurrence.ancestors or ())) if "ancestors" in needs and occurrence.ancestors else None
    keep_usage = {"usage", "lifetime"} & set(needs)
    if occurrence.ancestors == ():
        above = ()
    return replace(
        occurrence, process=less(occurrence.process), ancestors=above, usage=occurrence.usage if keep_usage else None
    )


@given(match_data, st.lists(occurrences, min_size=1, max_size=4))
@settings(max_examples=150)
def test_nothing_but_the_needs_decides(data, happened):
    compiled = compile_rule(rule(match=data), 0)
    for occurrence in happened:
        assert compiled.test(bereft(occurrence, compiled.match_needs)) is compiled.test(occurrence)


@given(trees(IDENTITY_KEYS | ENDING_KEYS, depth=1))
@settings(max_examples=30)
def test_a_needed_comm_is_never_one_that_only_some_matches_need(data):
    compiled = compile_rule(rule(match=data), 0)
    if compiled.comm is None:
        return
    unlike = exited("\x01 other", 768)
    if not any(like(p, "\x01 other") for p in _comm_texts(data)):
        assert compiled.test(unlike) is not True


def _comm_texts(data):
    for key, value in data.items():
        if key == "comm":
            yield from listed(value)
        elif key in ("any", "all", "not"):
            for part in value:
                yield from _comm_texts(part)


# --- evaluating


@pytest.mark.parametrize(
    ("events", "status", "said"),
    [
        (["nonzero_exit"], 256, ("nonzero_exit", False)),
        (["nonzero_exit"], 9, ("nonzero_exit", False)),
        (["nonzero_exit"], 0, None),
        (["exit"], 0, ("exit", False)),
        (["exit"], 256, ("exit", False)),
        (["exit", "nonzero_exit"], 256, ("nonzero_exit", False)),
        (["exit", "nonzero_exit"], 0, ("exit", False)),
        (["exit"], None, ("exit", False)),
        (["nonzero_exit"], None, ("nonzero_exit", True)),
    ],
)
def test_the_event_name_of_a_match(events, status, said):
    match = evaluate(compile_rule(rule(events=events), 0), exited(status=status)) or None
    assert said == (match and (match.event, match.log_only))


@pytest.mark.parametrize(
    ("policy", "match", "said"),
    [
        ("match", {"comm": "sh", "exit_code": 3}, ("nonzero_exit", False)),
        ("log", {"comm": "sh", "exit_code": 3}, ("nonzero_exit", True)),
        ("log", {"comm": "sh", "not": {"exit_code": 3}}, ("nonzero_exit", True)),
        ("ignore", {"comm": "sh", "exit_code": 3}, None),
        ("match", {"comm": "java", "exit_code": 3}, None),
        ("match", {"exe": "/bin/sh", "exit_code": 3}, None),
        ("match", {"exit_status": "known"}, None),
        ("ignore", {"exit_status": "unknown"}, None),
        ("match", {"exit_status": "unknown"}, ("nonzero_exit", False)),
    ],
)
def test_on_unknown_exit_decides_about_an_unknown_status(policy, match, said):
    compiled = compile_rule(rule(events=["nonzero_exit"], match=match, on_unknown_exit=policy), 0)
    match = evaluate(compiled, exited(status=None, recovered=True)) or None
    assert said == (match and (match.event, match.log_only))


def test_an_exit_rule_without_status_keys_matches_unknown_status():
    for policy in ("match", "log", "ignore"):
        compiled = compile_rule(rule(events=["exit"], match={"comm": "sh"}, on_unknown_exit=policy), 0)
        match = evaluate(compiled, exited(status=None)) or None
        assert (match.event, match.log_only) == ("exit", False)


@pytest.mark.parametrize("status", STATUSES)
def test_hooks_match_only_rules_that_include_them(status):
    matcher = Matcher([rule("plain"), rule("all", include_hooks=True)])
    assert names(matcher.match(exited(status=status))) == ["plain", "all"]
    assert names(matcher.match(exited(status=status, from_hook=True))) == ["all"]


def test_threads_are_seen_by_thread_rules_alone():
    matcher = Matcher([rule("process"), rule("thread", threads=True)])
    assert names(matcher.match(exited())) == ["process"]
    assert names(matcher.match(exited(of_thread=True))) == ["thread"]

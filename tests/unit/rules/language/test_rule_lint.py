"""The linter's facts about the world; what it warns of is tested with `check` (tests/unit/cli/test_rules_verbs.py)."""

import pytest

from cnprocd.process import cgroup_path
from cnprocd.process.cgroup_path import placement_of
from cnprocd.rules.language.lint import UNIT_SUFFIXES, lint
from cnprocd.rules.language.overlap import Overlaps
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleModel

RUN = {"command": ["/bin/x"], "timeout": "5s"}


def lint_of(rules):
    return list(lint([plain(RuleModel.model_validate({"events": "nonzero_exit", **rule})) for rule in rules]))


@pytest.mark.parametrize("suffix", UNIT_SUFFIXES)
def test_each_unit_suffix_names_a_unit_of_a_cgroup(suffix):
    assert placement_of(f"/system.slice/a{suffix}").unit == f"a{suffix}"


def test_there_are_no_other_unit_suffixes():
    assert {f".{word}" for word in cgroup_path._TYPES.split("|")} == set(UNIT_SUFFIXES)


def test_an_escalation_of_a_rule_is_no_duplicate():
    """One rule restarts at each failure, the other reports the sixth. Without `after` the second is a duplicate."""
    match = {"comm": "worker", "exe": "/usr/bin/worker"}
    both = [{"name": "restart", "match": match}, {"name": "given-up", "match": match}]
    assert [warning.kind for warning in lint_of(both)] == ["duplicate"]
    both[1]["after"] = {"count": 6, "within": "10m", "by": "unit"}
    assert lint_of(both) == []


def test_each_rule_is_compared_with_few_others(monkeypatch):
    """All pairs of 3,000 rules took minutes. Rules that have no literal in common cannot cover each other."""
    compared = []
    covers = Overlaps._covers
    monkeypatch.setattr(Overlaps, "_covers", lambda self, *pair: compared.append(pair) or covers(self, *pair))
    rules = [{"name": f"r{n}", "match": {"comm": f"p{n % 90}*", "user": n}, "run": RUN} for n in range(180)]
    rules += [{"name": f"s{n}", "match": {"comm": f"p{n}", "user": n}, "run": RUN} for n in range(5)]
    rules += [{"name": "twin", "match": {"comm": "p5*", "user": 95}, "run": RUN}]
    rules += [{"name": "wide", "match": {"user": [7, 8]}, "run": {**RUN, "user": 5}}]
    found = [(one.rule, one.kind) for one in lint_of(rules) if one.kind in ("duplicate", "shadowed")]
    assert found == [
        ("r7", "shadowed"),
        ("r8", "shadowed"),
        ("r95", "shadowed"),
        *((f"s{n}", "shadowed") for n in range(5)),
        ("twin", "duplicate"),
    ]
    assert len(compared) < 5 * len(rules) + 5 * 185


def warnings_of(**rule):
    return [(one.kind, one.at) for one in lint_of([{"name": "one", "events": "nonzero_exit", **rule}])]


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_hook_for_a_claimed_path_alone_is_warned_about(user):
    run = {**RUN, "user": 0 if user == "root" else 65534}
    claimed = {"exe_claimed": "/usr/bin/x"}
    assert warnings_of(match=claimed, run=run) == [("claimed", ("match", "exe_claimed"))]
    for more in ({"cgroup": "/a/*"}, {"user": 7}, {"unit": "a.service"}, {"exe": "/usr/bin/x"}):
        assert warnings_of(match={**claimed, **more}, run=run) == []
    for chosen in ({"container": "web"}, {"pod_uid": "1-2"}, {"comm": "x"}, {"euid": 0}, {"loginuid": 7}):
        assert warnings_of(match={**claimed, **chosen}, run=run) == [("claimed", ("match", "exe_claimed"))]
    assert warnings_of(match=claimed) == [], "no hook"


@pytest.mark.parametrize(
    ("rule", "at"),
    [
        ({"events": "fork", "log": {"message": "{comm} {exit_code}"}}, ("log", "message")),
        ({"events": "exec", "record": ["exe", "oom_killed"]}, ("record",)),
        ({"events": "exit", "run": {**RUN, "command": ["/bin/x", "{ruid}"]}, "match": {"user": 5}},
         ("run", "command", 1)),
        ({"events": ["uid", "gid"], "run": {**RUN, "env": {"TRACER": "{tracer_pid}"}}}, ("run", "env", "TRACER")),
        ({"log": {"message": "{job_id}"}}, ("log", "message")),
    ],
)  # fmt: skip
def test_a_field_that_no_event_of_the_rule_has_is_warned_about(rule, at):
    assert warnings_of(**rule) == [("unavailable", at)]


def test_a_field_that_one_event_of_the_rule_has_is_fine():
    rule = {"events": ["fork", "exit", "uid"], "log": {"message": "{exit_code} {ruid} {euid} {comm} {max_rss_kib}"}}
    assert warnings_of(**rule) == []


@pytest.mark.parametrize(
    "match",
    [
        {"comm": "x"}, {"cmdline": "x"}, {"oom_killed": True}, {"parent": {"comm": "x"}},
        {"ancestor": {"cmdline": "x"}},
        {"user_unit": "a.service"}, {"container": "web"}, {"pod_uid": "1-2"}, {"loginuid": "unset"}, {"euid": 0},
        {"loginuid": [7, "unset"]}, {"loginuid": 7}, {"loginuid": 0}, {"signal": "KILL"},
        {"comm": "x", "not": {"user": 7}},
    ],
    ids=str,
)  # fmt: skip
def test_a_root_hook_that_any_user_can_cause_is_warned_about(match):
    """A set-user-ID program called by another name has both its comm and its euid from the user that starts it."""
    assert warnings_of(match=match, run=RUN) == [("fakeable", ("match",))]
    for proof in ({"user": 7}, {"group": 7}, {"unit": "a.service"}, {"cgroup": "/a"}, {"exe": "/a"}):
        assert ("fakeable", ("match",)) not in warnings_of(match={**proof, "all": [match]}, run=RUN)
        assert warnings_of(match={"all": [match], "parent": proof}, run=RUN) == []


@pytest.mark.parametrize(
    "match",
    [
        {"parent": {"user": 0}}, {"parent": {"group": [7, 0]}}, {"ancestor": {"user": 0}},
        {"parent": {"unit": "init.scope"}}, {"parent": {"exe": "/usr/lib/systemd/systemd"}},
        {"parent": {"cgroup": "/*"}},
        {"parent": {"all": [{"user": 0}, {"comm": "systemd"}], "not": {"user": 7}}},
        {"ancestor": {"any": [{"user": 7}, {"exe": "/usr/lib/systemd/*"}]}}, {"parent": {"ancestor": {"user": 0}}},
        {"unit": "*"}, {"unit": "user@*"}, {"unit": "/service/"}, {"unit": "session-*.scope"},
        {"unit": "*.service", "parent": {"comm": "systemd"}},
        {"unit": "*.service", "not": {"unit": "user@*", "user": 7}},
        {"unit": "cron.service"}, {"unit": "*.service", "not": {"unit": "user@*"}}, {"parent": {"unit": "user@*"}},
        {"cgroup": "*"}, {"cgroup": "/user.slice/*"}, {"cgroup": "*/a.service"}, {"cgroup": "/a/"},
        {"cgroup": "/system.slice/c*"}, {"cgroup": "/user.slice/*/app.slice/a.service"},
        {"exe": "*"}, {"exe": "*/java"}, {"exe": "/home/*"}, {"exe": "/java$/"}, {"exe": "/^.tmp/"}, {"exe": "/h*/?/x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_proof_that_any_user_can_forge_is_warned_about(match):
    """An orphan becomes a child of root's init. Sessions, service managers of users and crontabs have units."""
    assert warnings_of(match=match, run=RUN) == [("fakeable", ("match",))]
    assert warnings_of(match={**match, "user": 7}, run=RUN) == []
    assert warnings_of(match={"all": [match, {"parent": {"user": 7}}]}, run=RUN) == []


@pytest.mark.parametrize(
    "match",
    [
        {"user": 0}, {"group": 0}, {"user": 0, "loginuid": 7}, {"parent": {"user": 7}}, {"ancestor": {"group": 7}},
        {"parent": {"user": 0, "comm": "cron"}}, {"parent": {"unit": "a.service"}},
        {"parent": {"exe": "/usr/sbin/cron"}},
        {"parent": {"parent": {"user": 0, "not": {"comm": "x"}, "unit": "a.service"}}},
        {"ancestor": {"any": [{"user": 7}, {"exe": "/a"}]}}, {"unit": "a*.service", "not": {"unit": "atd.service"}},
        {"unit": "*.service", "not": {"unit": ["user@*", "cron*.service", "atd.service"]}},
        {"unit": "user@7.service"}, {"unit": "user@7*"}, {"unit": "/^b/"}, {"cgroup": "/system.slice/b*"},
        {"cgroup": "/user.slice/user-7.slice/*"}, {"cgroup": "/user.slice"}, {"cgroup": "*", "user": 7},
        {"cgroup": "*", "not": {"cgroup": ["/user.slice/*", "/system.slice/*"]}}, {"cgroup": "/^.a/"},
        {"exe": "/usr/*"}, {"exe": "/opt/?*"}, {"exe": "/^.usr/"}, {"exe": "/tmp/a"}, {"exe": "/home/[a-b]/x"},
        {"exe": "/hom?"}, {"any": [{"exe": "*", "user": 7}, {"unit": "a.service"}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_root_hook_with_a_proof_is_not_warned_about(match):
    """Only what the processes of every user certainly can satisfy is warned about."""
    assert warnings_of(match=match, run=RUN) == []


def test_the_hint_for_a_forged_proof_says_why_it_is_none():
    def hint(match):
        (found,) = lint_of([{"name": "one", "match": match, "run": RUN}])
        return found.hint

    assert "an orphan of any user" in hint({"parent": {"user": 0}})
    assert "above all" in hint({"ancestor": {"user": 0}})
    assert "every user" in hint({"unit": "user@*"})
    assert "parent" not in hint({"comm": "x"})


def test_a_root_hook_for_every_process_is_not_warned_about():
    """It asks for no process in particular."""
    assert warnings_of(run=RUN) == []


@pytest.mark.parametrize("key", ["comm", "exe", "exe_claimed", "cmdline"])
def test_the_program_of_a_uid_event_to_come_is_warned_about(key):
    match = {"euid": 0, key: "/usr/bin/sudo"}
    assert warnings_of(events="uid", match=match) == [("too_early", ("match", key))]
    assert warnings_of(events="exec", match=match) == []
    assert warnings_of(events="uid", match={"euid": 0, "ancestor": {key: "/usr/bin/sudo"}}) == []
    assert warnings_of(events="uid", match={key: "/usr/bin/sshd"}) == [], "a daemon that gives up root"

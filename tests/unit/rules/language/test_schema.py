"""The rule language from plain data to typed values; the parsers against naive oracles."""

import fnmatch
import re
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cnprocd.launch.attempt import TERM_GRACE_S
from cnprocd.rules.language import names, syntax
from cnprocd.rules.language.actions import HookModel, LogModel
from cnprocd.rules.language.condition import ConditionModel
from cnprocd.rules.language.names import Context
from cnprocd.rules.language.schema import RuleFileModel, RuleModel, json_schema
from cnprocd.rules.language.value_problem import InvalidValueError
from cnprocd.rules.ruleset import EVENT_NAMES
from cnprocd.rules.values import Comparison, Field, IntSet, Octal, Pattern, Template

CONTEXT = Context(
    lists={"db": ("ora_*", "tnslsnr"), "long": ("a" * 16,), "staff": ("oracle", "77")},
    user={"oracle": 54}.get,
    group={"dba": 55}.get,
)


def rule(**keys):
    return RuleModel.model_validate({"name": "r", "events": ["exit"], **keys}, context=CONTEXT)


def problems(**keys):
    """Return the problems of a rule as (path, message)."""
    with pytest.raises(ValidationError) as caught:
        rule(**keys)
    return [
        ((*error["loc"], *said.at), said.message)
        for error in caught.value.errors()
        for said in getattr(error.get("ctx", {}).get("error"), "problems", ())
    ]


def refused(parse, value):
    with pytest.raises(InvalidValueError) as caught:
        parse(value)
    assert all(said.message for said in caught.value.problems)
    return caught.value.problems[0]


# --- exit codes, against an oracle that evaluates each item for each code

OPERATORS = {
    "": lambda code, n: code == n,
    "==": lambda code, n: code == n,
    "!=": lambda code, n: code != n,
    ">": lambda code, n: code > n,
    ">=": lambda code, n: code >= n,
    "<": lambda code, n: code < n,
    "<=": lambda code, n: code <= n,
}
code_items = st.one_of(
    st.tuples(st.sampled_from(list(OPERATORS)), st.integers(0, 300), st.sampled_from(["", " "])),
    st.tuples(st.just("range"), st.integers(0, 300), st.integers(0, 300)),
    st.tuples(st.just("int"), st.integers(-5, 300), st.none()),
)


def written(item):
    sort, first, second = item
    if sort == "range":
        return f"{first}-{second}"
    return first if sort == "int" else f"{sort}{second}{first}"


def meant(item):
    """The codes an item stands for, or None when it must be refused."""
    sort, first, second = item
    if sort == "range":
        return set(range(first, second + 1)) if first <= second <= 255 else None
    if sort in ("int", "", "==") and not 0 <= first <= 255:
        return None
    return {code for code in range(256) if OPERATORS.get(sort, OPERATORS[""])(code, first)} or None


@given(st.lists(code_items, min_size=1, max_size=5))
def test_exit_codes_mean_what_the_oracle_says(items):
    values = [written(item) for item in items]
    value = values[0] if len(values) == 1 else values
    wanted = [meant(item) for item in items]
    if None in wanted:
        refused(syntax.exit_codes, value)
        return
    parsed = syntax.exit_codes(value)
    assert {code for code in range(-1, 257) if code in parsed} == set().union(*wanted)
    # Canonical: sorted, disjoint, not adjacent. Two equal sets are equal values.
    assert all(a[1] + 1 < b[0] for a, b in zip(parsed.ranges, parsed.ranges[1:], strict=False))


@pytest.mark.parametrize(
    "value", [True, None, 1.0, "", "x", "1-", "-1", "=> 3", "256", "> 255", "< 0", "9-3", [], ["1", []], {}]
)
def test_an_invalid_exit_code_is_rejected_with_a_hint(value):
    assert refused(syntax.exit_codes, value).accepted == syntax.ACCEPT_CODES


def test_the_hint_for_an_empty_range_inverts_it():
    assert refused(syntax.exit_codes, "9-3").hint == 'write "3-9"'


# --- signals


@given(
    st.sampled_from(sorted(signal.Signals.__members__)),
    st.booleans(),
    st.sampled_from([str.lower, str.upper, str.title]),
)
def test_signals_by_name(name, short, case):
    assert syntax.signal_numbers(case(name[3:] if short else name)) == {signal.Signals[name]}


@given(st.integers(-3, 70))
def test_signals_by_number(number):
    if 1 <= number <= 64:
        assert syntax.signal_numbers(number) == syntax.signal_numbers(str(number)) == {number}
    else:
        refused(syntax.signal_numbers, number)


def test_signals_of_every_other_form():
    assert syntax.signal_numbers("SIGRTMIN+3") == {signal.SIGRTMIN + 3}
    assert syntax.signal_numbers("rtmax-1") == {signal.SIGRTMAX - 1}
    assert syntax.signal_numbers(["KILL", 11, "any"]) == set(range(1, 65))
    assert syntax.signal_numbers(["KILL", 11]) == {9, 11}


@pytest.mark.parametrize("value", ["SIGFOO", "SIGRTMIN+31", "RTMAX-31", True, 1.5, "", [], ["KILL", "KIL"], "0", "65"])
def test_an_invalid_signal_is_rejected(value):
    assert refused(syntax.signal_numbers, value).accepted == syntax.ACCEPT_SIGNALS


def test_a_misspelt_signal_is_suggested():
    assert "SIGSEGV" in refused(syntax.signal_numbers, "SIGSEV").hint


# --- durations, sizes, comparisons


@given(st.integers(1, 3650), st.sampled_from(["ms", "s", "m", "h", "d"]), st.sampled_from(["", " "]))
def test_durations_are_seconds(number, unit, space):
    factor = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}[unit]
    assert syntax.duration(f"{number}{space}{unit}") == number * factor / 1000


@pytest.mark.parametrize(
    "value", [30, 1.5, "30", "s", "-1s", "1 s s", "1w", "", True, None, [], "0s", "inf", "1e3s", "9" * 50 + "s"]
)
def test_an_invalid_duration_is_rejected(value):
    assert refused(syntax.duration, value).accepted == syntax.ACCEPT_DURATION


def test_a_duration_of_more_than_ten_years_is_rejected():
    """Times in nanoseconds must stay within 64 bits."""
    assert syntax.duration("3650d") == 3650 * 86400
    assert "3650 days" in refused(syntax.duration, "3651d").message


def test_a_number_without_a_unit_gets_a_hint():
    assert refused(syntax.duration, 30).hint == 'add the unit: "30s"'
    assert syntax.duration_or_zero("0s") == 0


@given(st.integers(0, 10**6), st.sampled_from(["", "B", "K", "M", "G", "T"]))
def test_sizes_are_bytes(number, unit):
    assert syntax.size(f"{number}{unit}") == number * 1024 ** "BKMGT".find(unit or "B")


@pytest.mark.parametrize("value", [-1, True, "64k", "K", "1.5.5M", "", None, [1], "64 KB"])
def test_an_invalid_size_is_rejected(value):
    assert refused(syntax.size, value).accepted == syntax.ACCEPT_SIZE


@given(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), st.integers(1, 9), st.integers(0, 10))
def test_comparisons_hold_as_python_says(op, limit, measured):
    parsed = syntax.time_comparison(f"{op} {limit}s")
    assert parsed == Comparison(op, float(limit))
    assert parsed.holds(measured) is eval(f"{measured} {op} {limit}")


@pytest.mark.parametrize("value", ["5s", "< 5", "<< 5s", "< 5M", 5, "", "< 0s", ["< 5s"]])
def test_an_invalid_time_comparison_is_rejected(value):
    assert refused(syntax.time_comparison, value).accepted == syntax.ACCEPT_TIME_COMPARISON


def test_size_comparisons_are_bytes():
    assert syntax.size_comparison("> 500M") == Comparison(">", 500 * 2**20)
    assert refused(syntax.size_comparison, "> 5s").accepted == syntax.ACCEPT_SIZE_COMPARISON


# --- patterns


@pytest.mark.parametrize(
    ("written_text", "parsed"),
    [
        ("ora_pmon", Pattern("literal", "ora_pmon")),
        ("ora_*", Pattern("glob", "ora_*")),
        ("[ab]c?", Pattern("glob", "[ab]c?")),
        ("/^ora_/", Pattern("regex", "^ora_")),
        ("/^ora_/i", Pattern("regex", "(?i)^ora_")),
        ("/usr/bin/sh", Pattern("literal", "/usr/bin/sh")),
        ("/", Pattern("literal", "/")),
        ("//", Pattern("literal", "//")),
        ("[[]kworker]", Pattern("glob", "[[]kworker]")),
    ],
)
def test_pattern_kinds(written_text, parsed):
    assert names.pattern(written_text) == parsed


@given(st.text(min_size=1, max_size=20))
def test_any_text_is_a_pattern_or_invalid(raw):
    try:
        parsed = names.pattern(raw, "comm")
    except InvalidValueError:
        return
    if parsed.kind == "literal":
        assert parsed.text == raw
        assert len(raw.encode()) <= 15
    if parsed.kind == "regex":
        re.compile(parsed.text)


# Small alphabet, so that globs and the names they match meet often.
@given(st.text("ab*?[]!", min_size=10, max_size=24), st.text("ab", min_size=15, max_size=15))
def test_a_glob_refused_as_too_long_matches_no_comm(glob, comm):
    try:
        names.pattern(glob, "comm")
    except InvalidValueError as error:
        if "never match" in str(error):
            assert not any(fnmatch.fnmatchcase(comm[:n], glob) for n in range(16))


def test_a_long_comm_gets_its_cut_form_as_a_hint():
    said = refused(lambda v: names.pattern(v, "comm"), "gnome-terminal-server")
    assert "15" in said.message
    assert '"gnome-terminal-"' in said.hint
    assert '"ä' + "a" * 13 + '"' in refused(lambda v: names.pattern(v, "comm"), "ä" + "a" * 14).hint
    assert '"ora*"' in refused(lambda v: names.pattern(v, "comm"), "ora*_background_writer").hint
    assert names.pattern("a" * 15 + "*", "comm")
    assert names.pattern("a\nb", "comm") == Pattern("literal", "a\nb")
    assert names.pattern("a" * 16, "text")


@pytest.mark.parametrize(
    "value", ["/(/", "/[[a]/", r"/\u0041/", "[abc", "", 5, True, None, {}, "a\0b", "/" + "(" * 500 + "/"]
)
def test_an_invalid_pattern_is_rejected(value):
    refused(names.pattern, value)


def test_a_path_that_looks_like_a_flagged_regex_is_rejected():
    said = refused(lambda v: names.pattern(v, "path"), "/opt/i")
    assert '"/(?i)opt/"' in said.hint
    assert '"[/]opt/i"' in said.hint
    assert names.pattern("/opt/", "path") == Pattern("regex", "opt")


def test_lists_are_expanded_in_place_and_checked_at_each_use():
    assert rule(match={"comm": ["$db", "x", "tnslsnr"]}).match.comm == (
        Pattern("glob", "ora_*"),
        Pattern("literal", "tnslsnr"),
        Pattern("literal", "x"),
    )
    assert rule(match={"exe": "$long"}).match.exe == (Pattern("literal", "a" * 16),)
    assert "in list $long" in problems(match={"comm": "$long"})[0][1]


def test_an_unknown_list_is_named_and_every_item_is_reported():
    found = problems(match={"comm": ["$dbb", "ok", 7, "a" * 20]})
    assert [path[-1] for path, _ in found] == [0, 2, 3]
    assert '"dbb"' in found[0][1]


# --- people


def test_users_and_groups_by_name_number_and_list():
    parsed = rule(match={"user": ["oracle", 0, "1000", "$staff"], "group": "dba"}).match
    assert parsed.user == (54, 0, 1000, 77)
    assert parsed.group == (55,)


@pytest.mark.parametrize("value", [-1, 2**32 - 1, True, 1.5, [], "", {}])
def test_an_invalid_user_is_rejected(value):
    assert problems(match={"user": value})


def test_an_unknown_user_stays_a_name():
    parsed = rule(match={"user": ["oracle", "larry", "larry"], "not": {"group": "ghosts"}}).match
    assert parsed.user == (54, "larry")
    assert parsed.not_[0].group == ("ghosts",)


# --- templates


def test_templates():
    assert syntax.template("{comm}[{pid}] {{x}}") == Template((Field("comm"), "[", Field("pid"), "] {x}"))
    assert syntax.template("") == Template(())
    assert syntax.template("{comm}[{pid}]").render({"comm": "a", "pid": "1"}) == "a[1]"
    assert syntax.template("{comm}{comm}").fields == {"comm"}


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_template_of_escaped_text_is_that_text(raw):
    escaped = raw.replace("{", "{{").replace("}", "}}")
    assert syntax.template(escaped).render({}) == raw


@pytest.mark.parametrize("value", ["{", "}", "{com}", "{}", "{comm!r}", "{comm.x}", "{{comm}", 5, None, "a\0"])
def test_an_invalid_template_is_rejected(value):
    refused(syntax.template, value)


def test_an_unknown_field_is_suggested():
    assert '"comm"' in refused(syntax.template, "{com}").hint


# --- rules as wholes


def test_events():
    assert rule(events="all").events == rule(events=["all"]).events == EVENT_NAMES
    assert rule(events="fork").events == ("fork",)
    assert rule(events=["exit", "fork", "exit"]).events == ("fork", "exit")
    assert problems(events=["exit", "forx", "foo"]) == [
        (("events", 1), 'unknown event: "forx"'),
        (("events", 2), 'unknown event: "foo"'),
    ]
    for wrong in ([], "", ["all", "exit"], None, 3, [["exit"]], {}):
        assert problems(events=wrong)


def test_defaults():
    plain = rule()
    assert plain.log == LogModel()
    assert plain.log.level == "notice"
    assert (plain.match, plain.run, plain.enabled, plain.threads, plain.on_unknown_exit) == (
        None,
        None,
        True,
        False,
        "log",
    )
    run = HookModel.model_validate({"command": ["/bin/true"]})
    assert (run.timeout_s, run.retries, run.umask, run.output_limit_bytes) == (30.0, 0, 0o077, 65536)
    assert (run.backoff.initial_s, run.backoff.max_s, run.working_directory, run.env) == (1.0, 300.0, "/", {})
    settings = RuleFileModel.model_validate({"rules": []}).settings
    assert (settings.hook_slots, settings.receive_buffer_bytes, settings.history_age_s) == (8, 32 << 20, 604800.0)


def test_log_is_switched_with_true_and_false():
    assert rule(log=False).log is None
    assert rule(log=True).log == LogModel()
    assert rule(log={"level": "error"}).log.level == "error"


def test_everything_at_once():
    parsed = rule(
        events=["nonzero_exit"],
        match={
            "comm": "ora_*",
            "exit_code": ["1-3", 9],
            "signal": "SIGKILL",
            "core_dumped": True,
            "lifetime": "< 5s",
            "max_rss": "> 1G",
            "cpu_time": ">= 1m",
            "parent": {"comm": "sh", "ancestor": {"user": 0}},
            "not": {"comm": "ora_test*"},
            "any": [{"user": "oracle"}, {"not": [{"user": 1}, {"user": 2}]}],
            "all": [{"exe": "/bin/x"}],
        },
        rate_limit={"count": 10, "per": "1m", "by": "comm"},
        cooldown={"for": "5s", "by": "unit"},
        coalesce={"window": "2s"},
        after={"count": 5, "within": "1m"},
        resets="10m",
        run={
            "command": ["/usr/lib/x", "--pid", "{pid}", "--", "{comm}"],
            "user": "oracle",
            "group": 55,
            "timeout": "5s",
            "deadline": "1h",
            "retries": 3,
            "backoff": {"initial": "2s", "max": "10s"},
            "env": {"SID": "{comm}"},
            "umask": "0027",
            "nice": -5,
            "limits": {"open_files": 64, "address_space": "1G", "cpu_time": "10s"},
            "slots": 2,
            "serialize": "comm",
            "on_failure": {"level": "critical"},
        },
    )
    assert parsed.match.exit_code == IntSet(((1, 3), (9, 9)))
    assert parsed.match.not_ == (ConditionModel.model_validate({"comm": "ora_test*"}),)
    assert len(parsed.match.any[1].not_) == 2
    assert parsed.match.parent.ancestor.user == (0,)
    assert (parsed.after.within_s, parsed.resets_s, parsed.coalesce.max) == (60.0, 600.0, 1000)
    assert (parsed.cooldown.for_s, parsed.cooldown.by, parsed.after.by) == (5.0, "unit", "rule")
    assert (parsed.run.user, parsed.run.group, parsed.run.deadline_s, parsed.run.umask) == ("oracle", 55, 3600.0, 0o27)
    assert parsed.run.command[2] == Template((Field("pid"),))
    assert parsed.run.limits.address_space_bytes == 2**30


def test_a_plain_cooldown_is_that_of_the_whole_rule():
    assert rule(cooldown="10m").cooldown == rule(cooldown={"for": "10m"}).cooldown
    assert rule(cooldown="10m").cooldown.by == "rule"


def test_models_do_not_change():
    with pytest.raises(ValidationError):
        rule().name = "other"


@pytest.mark.parametrize(
    ("keys", "path", "phrase"),
    [
        ({"match": {}}, ("match",), "empty"),
        ({"match": {"parent": {}}}, ("match", "parent"), "empty"),
        ({"events": "fork", "match": {"exit_code": 3}}, ("match", "exit_code"), "known only when a process ends"),
        ({"events": "coredump", "match": {"core_dumped": True}}, ("match", "core_dumped"), "known only"),
        ({"events": "fork", "match": {"not": {"any": [{"comm": "x"}, {"signal": 9}]}}},
         ("match", "not", 0, "any", 1, "signal"), "known only"),
        ({"events": "nonzero_exit", "match": {"exit_code": 0}}, ("match", "exit_code"), "never has exit code 0"),
        ({"events": "nonzero_exit", "match": {"all": [{"exit_code": "< 1"}]}},
         ("match", "all", 0, "exit_code"), "never has exit code 0"),
        ({"match": {"exit_status": "unknown", "signal": 9}}, ("match", "signal"), "never holds together"),
        ({"match": {"core_dumped": "yes"}}, ("match", "core_dumped"), "expected true or false"),
        ({"resets": "5s"}, ("resets",), "no effect without after"),
        ({"coalesce": {"window": "5s"}}, ("coalesce",), "no effect without run"),
        ({"cooldown": 5}, ("cooldown",), "duration"),
        ({"cooldown": {"for": "5s", "by": "color"}}, ("cooldown", "by"), "color"),
        ({"after": {"count": 2, "within": "5s", "by": ["unit"]}}, ("after", "by"), "a list"),
        ({"name": "-x"}, ("name",), "invalid rule name"),
        ({"name": "x" * 65}, ("name",), "invalid rule name"),
        ({"name": 5}, ("name",), "expected text"),
        ({"rate_limit": {"count": True, "per": "1s"}}, ("rate_limit", "count"), "expected a whole number"),
        ({"run": {"command": "/bin/x -y"}}, ("run", "command"), "no shell"),
        ({"run": {"command": []}}, ("run", "command"), "empty"),
        ({"run": {"command": ["bin/x"]}}, ("run", "command", 0), "not an absolute path"),
        ({"run": {"command": [""]}}, ("run", "command", 0), "not an absolute path"),
        ({"run": {"command": ["/bin/{comm}"]}}, ("run", "command", 0), "data is never a command"),
        ({"run": {"command": ["/bin/x", -9]}}, ("run", "command", 1), "expected text"),
        ({"run": {"command": ["/bin/x", "{cmdline}"]}}, ("run", "command", 1), "several words"),
        ({"run": {"command": ["/bin/sh", "-c", "rm /tmp/{comm}"]}}, ("run", "command", 2), "would run this text"),
        ({"run": {"command": ["/bin/bash", "-ec", "x {exe}"]}}, ("run", "command", 2), "would run this text"),
        ({"run": {"command": ["/x"], "env": {"LD_PRELOAD": "x"}}}, ("run", "env", "LD_PRELOAD", "[key]"), "reserved"),
        ({"run": {"command": ["/x"], "env": {"1A": "x"}}}, ("run", "env", "1A", "[key]"), "invalid variable name"),
        ({"run": {"command": ["/x"], "env": {"A": 5}}}, ("run", "env", "A"), "expected text"),
        ({"run": {"command": ["/x"], "umask": 77}}, ("run", "umask"), "decimal"),
        ({"run": {"command": ["/x"], "umask": "0089"}}, ("run", "umask"), "invalid umask"),
        ({"run": {"command": ["/x"], "nice": 20}}, ("run", "nice"), "out of range"),
        ({"run": {"command": ["/x"], "working_directory": "tmp"}}, ("run", "working_directory"), "absolute"),
        ({"run": {"command": ["/x"], "backoff": {"initial": "9m"}}}, ("run", "backoff", "initial"), "longer"),
    ],
)  # fmt: skip
def test_rules_that_contradict_themselves(keys, path, phrase):
    found = problems(**keys)
    assert [where for where, _ in found] == [path]
    assert phrase in found[0][1]


def test_unusual_rules_that_are_valid():
    rule(events="nonzero_exit", match={"exit_code": 0, "signal": "any"})
    rule(events="nonzero_exit", match={"not": {"exit_code": 0}})
    rule(events=["fork", "exit"], match={"exit_code": 0})
    rule(run={"command": ["/bin/sh", "-c", "kill {pid}"]})
    rule(run={"command": ["/usr/bin/cc", "-c", "{exe}"]})
    rule(run={"command": ["/bin/sh", "/usr/lib/script", "{comm}"]})
    assert rule(run={"command": ["/x"], "umask": Octal(0o27)}).run.umask == 0o27


def test_a_bad_field_does_not_hide_a_rule_that_never_fires():
    found = problems(events="fork", match={"exit_code": 3}, rate_limit={"count": 0, "per": "1s"})
    assert {path for path, _ in found} == {("match", "exit_code"), ("rate_limit", "count")}


def test_named_lists():
    parsed = RuleFileModel.model_validate({"lists": {"db": ["ora_*", "x"]}})
    assert parsed.lists == {"db": (Pattern("glob", "ora_*"), Pattern("literal", "x"))}
    for wrong in ({"db": []}, {"db": "x"}, {"db": ["$x"]}, {"1 x": ["a"]}, {"db": [5]}):
        with pytest.raises(ValidationError):
            RuleFileModel.model_validate({"lists": wrong})


# --- the editor's schema


def nodes(schema):
    yield schema
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from (node for node in nodes(value) if isinstance(node, dict | list))


def test_the_json_schema_describes_every_key_without_null():
    schema = json_schema()
    for model in (schema, *schema["$defs"].values()):
        assert model["additionalProperties"] is False
        assert model["description"]
        for key, described in model["properties"].items():
            assert described.get("description"), key
            assert described.get("default", ...) is not None
    assert not any(isinstance(node, dict) and node.get("type") == "null" for node in nodes(schema))


def test_the_json_schema_speaks_of_the_yaml_form():
    schema = json_schema()
    run, match_, rule_ = (schema["$defs"][name]["properties"] for name in ("Hook", "Condition", "Rule"))
    assert run["timeout"]["type"] == "string"
    assert run["timeout"]["default"] == "30s"
    assert re.search(run["timeout"]["pattern"], "500ms")
    assert "default" not in schema["$defs"]["After"]["properties"]["count"]
    assert {"$ref": "#/$defs/Condition"} in match_["not"]["anyOf"]
    assert {"type": "boolean"} in rule_["log"]["anyOf"]
    assert "all" in rule_["events"]["anyOf"][0]["enum"]


def test_the_described_grace_is_that_of_the_launcher():
    described = json_schema()["$defs"]["Hook"]["properties"]["timeout"]["description"]
    assert f"SIGKILL {TERM_GRACE_S:g} s later" in described

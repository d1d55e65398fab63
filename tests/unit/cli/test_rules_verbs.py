"""check, schema, rules, test and explain as a user types them: real rule files, real processes, no daemon."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from unit.ctlkit import command, ctl, ctl_json

from cnprocd.errors import EX_CONFIG, EX_OK, EX_UNAVAILABLE

GOOD = """
lists:
  background: ["ora_*", tnslsnr]
rules:
  - name: oracle-died
    events: [nonzero_exit]
    match:
      comm: $background
      signal: [SIGKILL, SIGSEGV]
      exit_code: "1-127"
      user: 54321
      not: {comm: "ora_test*"}
    log: {level: error, message: "{comm}[{pid}] died of {status}"}
    run: {command: [/usr/bin/true, --pid, "{pid}"], timeout: 5s, user: 54321}
  - name: any-exec
    events: [exec]
    match: {parent: {comm: cron}}
"""


@pytest.fixture
def rules(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(GOOD)
    return file


def warned(tmp_path, text):
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n" + text)
    status, found = ctl_json("check", rules=file)
    assert status == EX_OK
    return {(one["kind"], one["line"]) for one in found["warnings"]}


def test_check_of_good_rules_says_so(rules):
    assert command("check", rules=rules) == (EX_OK, f"{rules}: 2 rules, no errors\n", "")


def test_check_shows_every_mistake_with_its_place_and_a_caret(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n  - name: a\n    events: [died]\n    mtch: {comm: x}\n")
    status, out, err = ctl("check", rules=file)
    assert (status, out) == (EX_CONFIG, "")
    assert f"{file}:3:14: " in err
    assert f'{file}:4:5: unknown key "mtch"' in err
    assert err.splitlines()[1:3] == ["        events: [died]", " " * 17 + "^"]
    assert "2 errors" in err


def test_check_as_json_has_the_same(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n  - name: a\n    events: [died]\n")
    status, found = ctl_json("check", rules=file)
    assert (status, found["ok"]) == (EX_CONFIG, False)
    assert [(one["line"], one["column"]) for one in found["problems"]] == [(3, 14)]


HOOK = "run: {command: [/bin/true], timeout: 1s}"
LINTS = {
    "codes that exclude each other": (
        "  - {name: a, events: [nonzero_exit], match: {exit_code: 3, all: [{exit_code: 4}]}}\n",
        {("never", 2)},
    ),
    "a comm that is refused": (
        '  - {name: a, events: [nonzero_exit], match: {comm: foo, not: {comm: "f*"}}}\n',
        {("never", 2)},
    ),
    "a comm that an all refuses": (
        '  - {name: a, events: [exec], match: {comm: foo, all: [{comm: "b*"}]}}\n',
        {("never", 2)},
    ),
    "a user that is refused": (
        "  - {name: a, events: [exec], match: {user: [0, 7], not: [{user: 0}, {user: 7}]}}\n",
        {("never", 2)},
    ),
    "a user that may be another": (
        "  - {name: a, events: [exec], match: {user: [0, 7], not: [{user: 0}, {user: 7, comm: x}]}}\n",
        set(),
    ),
    "a login that an all refuses": (
        "  - {name: a, events: [exec], match: {loginuid: [0, 7], all: [{loginuid: [7, 8]}, {loginuid: [0, 8]}]}}\n",
        {("never", 2)},
    ),
    "ids that agree": (
        "  - {name: a, events: [exec], match: {group: [0, 7], all: [{group: [7, 8]}], not: {group: 0}}}\n",
        set(),
    ),
    "empty ranges": (
        '  - {name: a, events: [exec], match: {comm: ["[z-a]x", "[a-z]x"], not: {cmdline: "*[9-0]"}}}\n',
        {("never", 2)},
    ),
    "paths that are none": (
        "  - name: a\n    events: [exec]\n    match:\n      exe: [relative, /bin/../x, /a//b, /c/.]\n"
        '      any:\n        - {cgroup: "system.slice/*"}\n        - {parent: {exe: /usr/./x}}\n',
        {("never", 5), ("never", 7), ("never", 8)},
    ),
    "unusual paths": (
        '  - {name: a, events: [exec], match: {exe: ["?usr", "[/]x", /..a/b, /a..], cgroup: ["*", /]}}\n',
        set(),
    ),
    "an expression that is too long for comm": (
        '  - {name: a, events: [exec], match: {comm: ["/^averyveryverylongname$/", "/^a{15}$/", "/^(b?){30}$/"]}}\n',
        {("never", 2)},
    ),
    "the same one for cmdline": (
        '  - {name: a, events: [exec], match: {cmdline: "/^averyveryverylongname$/"}}\n',
        set(),
    ),
    "an unknown exit only": ("  - {name: a, events: [exit], match: {exit_status: unknown}}\n", set()),
    "the same twice": (
        "  - {name: a, events: [exit], match: {comm: x}}\n  - {name: b, events: [exit], match: {comm: x}}\n",
        {("duplicate", 3)},
    ),
    "the same match on other events": (
        "  - {name: a, events: [exit], match: {comm: x}}\n  - {name: b, events: [exec], match: {comm: x}}\n",
        set(),
    ),
    "a hook within a hook": (
        f'  - {{name: a, events: [exit], match: {{comm: "ora_*", user: 5}}, {HOOK}}}\n'
        f"  - {{name: b, events: [nonzero_exit], match: {{comm: ora_pmon, user: 5, exit_code: 3}}, {HOOK}}}\n",
        {("shadowed", 3)},
    ),
    "two hooks apart": (
        f'  - {{name: a, events: [exit], match: {{comm: "ora_*", user: 5}}, {HOOK}}}\n'
        f"  - {{name: b, events: [nonzero_exit], match: {{comm: asm_pmon, user: 5}}, {HOOK}}}\n",
        set(),
    ),
    "root on comm alone": (f"  - {{name: a, events: [exit], match: {{comm: x}}, {HOOK}}}\n", {("fakeable", 2)}),
    "root on comm or user": (
        f"  - {{name: a, events: [exit], match: {{comm: x, any: [{{user: 5}}, {{exit_code: 3}}]}}, {HOOK}}}\n",
        {("fakeable", 2)},
    ),
    "root on comm and unit": (f"  - {{name: a, events: [exit], match: {{comm: x, unit: a.service}}, {HOOK}}}\n", set()),
    "another user on comm": (
        "  - {name: a, events: [exit], match: {comm: x}, run: {command: [/bin/true], timeout: 1s, user: 5}}\n",
        set(),
    ),
    "no timeout": (
        "  - {name: a, events: [exit], match: {user: 5}, run: {command: [/bin/true], user: 5}}\n",
        {("timeout", 2)},
    ),
    "a unit without a suffix": ("  - {name: a, events: [exec], match: {unit: myapp}}\n", {("unit", 2)}),
    "a user's unit without a suffix": ("  - {name: a, events: [exec], match: {user_unit: myapp}}\n", {("unit", 2)}),
    "units with suffixes": (
        '  - {name: a, events: [exec], match: {unit: [a.service, "b*", "c@*.scope", "*vice", "d[12]", /e/, "f-?"]}}\n',
        set(),
    ),
    "a glob whose end is no suffix": ('  - {name: a, events: [exec], match: {unit: "my*app"}}\n', {("unit", 2)}),
    "a slice": ("  - {name: a, events: [exec], match: {unit: user.slice}}\n", {("unit", 2)}),
    "units without a suffix, deep down": (
        "  - name: a\n    events: [exec]\n    match:\n      any:\n        - {comm: x, not: {unit: one}}\n"
        "        - all:\n          - {parent: {unit: [b.service, two]}}\n          - ancestor: {unit: three}\n",
        {("unit", 6), ("unit", 8), ("unit", 9)},
    ),
    "a disabled rule": (
        "  - {name: a, enabled: false, events: [exit], match: {comm: x}, run: {command: [/a]}}\n",
        set(),
    ),
}


@pytest.mark.parametrize(("text", "expected"), LINTS.values(), ids=LINTS)
def test_lint(tmp_path, text, expected):
    assert warned(tmp_path, text) == expected


def test_strict_makes_warnings_mistakes(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n" + LINTS["no timeout"][0])
    status, out, _ = ctl("check", "--strict", rules=file)
    assert (status, out) == (EX_CONFIG, f"{file}: 1 rule, no errors, 1 warning, which --strict treats as errors\n")
    assert ctl("check", rules=file)[0] == EX_OK


def test_schema_is_the_models_schema():
    from cnprocd.rules.language.schema import json_schema

    assert ctl_json("schema") == (EX_OK, json_schema())


def test_disable_and_enable(rules):
    assert ctl("rules", "disable", "any-exec", "--runtime-dir", str(rules.parent), rules=rules)[0] == EX_OK
    assert "any-exec" in (rules.parent / "disabled").read_text()
    _, found = ctl_json("rules", "list", rules=rules)
    assert {one["name"]: one["enabled"] for one in found} == {"oracle-died": True, "any-exec": False}
    assert ctl("test", "--kind", "exec", "--parent", "cron", rules=rules)[0] == 1
    done = ctl("rules", "enable", "any-exec", "any-exec", "--runtime-dir", str(rules.parent), rules=rules)
    assert done[:2] == (EX_OK, "any-exec: enabled, from the next start of cnprocd: no daemon runs with these rules\n")
    assert not (rules.parent / "disabled").exists()
    assert ctl("test", "--kind", "exec", "--parent", "cron", rules=rules)[0] == EX_OK


def test_a_name_that_no_rule_has(rules):
    status, _, err = ctl("rules", "disable", "oracle", rules=rules)
    assert status != EX_OK
    assert 'no rule named "oracle"' in err
    (rules.parent / "disabled").write_text("gone # renamed\n")
    status, found = ctl_json("check", rules=rules)
    assert [one["message"] for one in found["warnings"]] == ['there is no rule named "gone"']


def test_a_disabled_file_writable_by_others_is_refused(rules):
    (rules.parent / "disabled").write_text("any-exec\n")
    (rules.parent / "disabled").chmod(0o666)
    assert ctl("check", rules=rules)[0] == EX_CONFIG


FIRES = {
    "code": ["--comm", "ora_pmon_X", "--exit-code", "3", "--user", "54321"],
    "signal": ["--comm", "tnslsnr", "--signal", "kill", "--user", "54321"],
    "number": ["--comm", "tnslsnr", "--status", "11", "--user", "54321"],
    "json": ["--event", '{"kind": "nonzero_exit", "comm": "ora_x", "uid": 54321, "exit_code": 3, "signal": null}'],
    "other": ["--comm", "ora_test1", "--exit-code", "3", "--user", "54321"],
    "success": ["--comm", "ora_pmon_X", "--exit-code", "0", "--user", "54321"],
    "no user": ["--comm", "ora_pmon_X", "--exit-code", "3"],
    "signal not wanted": ["--comm", "ora_pmon_X", "--signal", "TERM", "--user", "54321"],
}


@pytest.mark.parametrize("name", FIRES)
def test_test_says_which_rules_fire(rules, name):
    status, found = ctl_json("test", *FIRES[name], rules=rules)
    fires = name in ("code", "signal", "number", "json")
    assert (status, [one["rule"] for one in found]) == ((EX_OK, ["oracle-died"]) if fires else (1, []))


def test_test_shows_the_record_and_the_hook(rules):
    _, found = ctl_json("test", "--pid", "77", *FIRES["code"], rules=rules)
    assert found[0]["hook"]["argv"] == ["/usr/bin/true", "--pid", "77"]
    assert found[0]["message"] == "ora_pmon_X[77] died of exit code 3"
    assert found[0]["record"]["exit_code"] == 3
    assert found[0]["record"]["exe"] is None  # unknown, not guessed


def test_a_default_message_without_a_pid_says_unknown(rules):
    rules.write_text("rules:\n  - {name: a, events: [nonzero_exit], match: {comm: x}}\n")
    _, (found,) = ctl_json("test", "--comm", "x", "--exit-code", "3", rules=rules)
    assert found["message"] == "a: x[unknown] ended: exit code 3"


def test_test_names_the_exit_code_that_it_assumes(rules):
    assumed = "taken as an exit with code 0, because no end is given"
    rules.write_text("rules:\n  - {name: a, events: [nonzero_exit]}\n")
    for process in (["--pid", "1"], ["--comm", "x"]):
        lines = ctl("test", *process, rules=rules)[1].splitlines()
        assert [lines[0].partition(":")[0], lines[1].partition(";")[0]] == [assumed, "the rule would not fire"]
    for end in (["--exit-code", "0"], ["--signal", "KILL"], ["--kind", "exec"], ["--lost"]):
        assert assumed not in ctl("test", "--comm", "x", *end, rules=rules)[1]


def test_test_of_a_running_process(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(
        f"rules:\n  - {{name: sleeper, events: [exit], match: {{comm: sleep, user: {os.getuid()}, "
        f"parent: {{exe: {Path(sys.executable).resolve()}}}}}}}\n"
    )
    child = subprocess.Popen(["sleep", "1000"])
    try:
        status, found = ctl_json("test", "--pid", str(child.pid), "--status", "9", rules=file)
    finally:
        child.kill()
        child.wait()
    assert status == EX_OK
    assert (found[0]["record"]["signal"], found[0]["record"]["pid"]) == ("SIGKILL", child.pid)


BAD = {
    "a field that is none": (["--event", '{"com": "x"}'], 'did you mean "comm"'),
    "not JSON": (["--event", "{comm: x}"], "invalid JSON"),
    "two ends": (["--exit-code", "3", "--signal", "KILL"], "conflicts with"),
    "a code that cannot be": (["--exit-code", "256"], "0 to 255"),
    "an end of what has not ended": (["--kind", "fork", "--exit-code", "3"], "the kind is fork"),
    "a failure that is none": (["--kind", "nonzero_exit", "--comm", "x"], "--exit-code"),
    "no such user": (["--user", "no-such-user-here"], "unknown user"),
    "no such process": (["--pid", "4194305"], "no process"),
    "a signal that is none": (["--signal", "KIL"], 'invalid signal "KIL": expected SIGKILL, KILL or 9\n'),
    "a number for a text": (["--event", '{"comm": 3}'], "invalid event: comm: expected a string, found an integer"),
    "a text for a boolean": (
        ["--event", '{"recovered": "false"}'],
        "recovered: expected true or false, found a string",
    ),
    "no such file": (["--event", "@/no/such"], "cannot read /no/such: No such file or directory"),
    "bytes that are no text": (["--event", "@/bin/true"], "invalid JSON"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD)
def test_a_description_that_cannot_be_is_refused_with_the_reason(rules, words, said):
    status, out, err = ctl("test", *words, rules=rules)
    assert (status not in (EX_OK, 1) or "no process" in err, out) == (True, "")
    assert said in err
    assert "Traceback" not in err


def verdicts(found, rule):
    (one,) = [one for one in found if one["rule"] == rule]
    return one["fires"], {reason["key"]: reason["verdict"] for reason in one["reasons"] if reason["depth"] == 0}


def test_explain_names_the_sources_that_are_used(rules):
    rules.write_text(
        "rules:\n  - {name: a, events: [uid], match: {euid: root}, record: [cmdline]}\n"
        "  - {name: b, events: [nonzero_exit], match: {oom_killed: true}}\n"
        "  - {name: c, events: [fork], record: [oom_killed]}\n"
    )
    _, shown, _ = ctl("explain", "--without", "taskstats", rules=rules)
    assert (
        "    needs      cmdline from the table, null for many processes that live less than a few ms (record)\n"
        in shown
    )
    assert "euid from the event (match.euid)\n" in shown
    assert "oom from the kernel log (match.oom_killed)\n" in shown
    assert "(record)" not in shown[shown.index("\nc") :], "a fork has no oom_killed"
    assert "deaths are detected by counting threads\n" in shown
    rules.write_text("rules:\n  - {name: a, events: [uid], match: {euid: root}, record: [cmdline]}\n")
    _, shown, _ = ctl("explain", rules=rules)
    assert "    table      kept; no rule asks for the end of processes\n" in shown


def test_explain_an_event_key_by_key(rules):
    _, found = ctl_json("explain", "--comm", "ora_test1", "--signal", "KILL", rules=rules)
    fires, reasons = verdicts(found, "oracle-died")
    expected = {"events": "yes", "comm": "yes", "user": "unknown", "exit_code or signal": "yes", "not": "no"}
    assert (fires, reasons) == (False, expected)
    fires, reasons = verdicts(found, "any-exec")
    assert (fires, reasons) == (False, {"events": "no", "parent": "unknown"})


@pytest.mark.parametrize("event", [[], ["--comm", "ora_test1", "--signal", "KILL"]])
def test_explain_takes_a_glob_for_the_rule(rules, event):
    def explained(name):
        found = ctl_json("explain", name, *event, "--runtime-dir", str(rules.parent), rules=rules)[1]
        return [one["rule"] for one in (found if event else found["rules"])]

    assert explained("oracle*") == ["oracle-died"]
    assert explained("*") == ["oracle-died", "any-exec"]
    assert explained("x*") == []
    assert ctl("explain", "x*", *event, rules=rules) == (EX_OK, "no rules\n", "")


def test_explain_agrees_with_test(rules):
    for words in FIRES.values():
        fired = {one["rule"] for one in ctl_json("test", *words, rules=rules)[1]}
        explained = {one["rule"] for one in ctl_json("explain", *words, rules=rules)[1] if one["fires"]}
        assert fired == explained


def test_explain_what_came_of_a_hook(rules):
    _, found = ctl_json("explain", *FIRES["code"], "--from-hook", rules=rules)
    fires, reasons = verdicts(found, "oracle-died")
    assert (fires, reasons["include_hooks"]) == (False, "no")
    assert ctl("test", *FIRES["code"], "--from-hook", rules=rules)[0] == 1


def test_explain_a_lost_exit(rules):
    """A process that disappeared while events were lost: the policy decides, and identity alone can match."""
    lost = ("--comm", "ora_pmon_X", "--user", "54321", "--lost")
    _, found = ctl_json("explain", *lost, rules=rules)
    (one,) = [one for one in found if one["rule"] == "oracle-died"]
    assert (one["fires"], one["log_only"]) == (True, True)
    _, found = ctl_json("test", *lost, rules=rules)
    assert [(one["rule"], one["hook"], one["only_logged"]) for one in found] == [("oracle-died", None, True)]


def test_explain_the_plan(rules):
    nowhere = ["--runtime-dir", str(rules.parent / "nowhere")]
    _, found = ctl_json("explain", *nowhere, rules=rules)
    assert {one["rule"]: (one["identity"], one["cost"]) for one in found["rules"]} == {
        "oracle-died": ("taskstats", 1),
        "any-exec": ("table", 4),
    }
    assert found["plan"]["costliest_rules"] == ["any-exec"]
    _, alone = ctl_json("explain", *nowhere, "--without", "taskstats", rules=rules)
    assert alone["plan"]["deaths_detected_by"] == "counting threads"


def test_without_a_daemon_it_says_so(tmp_path):
    status, out, err = command("status", "--runtime-dir", str(tmp_path))
    assert (status, out) == (EX_UNAVAILABLE, "")
    assert err.startswith(f"cnprocctl: cnprocd is not running (no {tmp_path}/control.sock): ")


def test_an_error_as_json(tmp_path):
    status, found = ctl_json("status", "--runtime-dir", str(tmp_path))
    assert found["error"]["status"] == status == EX_UNAVAILABLE


@pytest.mark.parametrize("words", [["watch"], ["watch", "--after", "x"], ["history", "-f"]])
def test_an_error_of_a_json_stream_is_one_line(words, tmp_path):
    """A collector that decodes line by line gets an error that it can decode, not the first line of an indented one."""
    status, out, _ = ctl("--json", *words, "--runtime-dir", str(tmp_path))
    assert [json.loads(line)["error"]["status"] for line in out.splitlines()] == [status]


def test_options_stand_before_and_after_the_verb(rules):
    before = ctl("check", rules=rules)
    assert ctl("check", "--rules", str(rules)) == before


def test_what_asks_the_daemon_does_not_import_pydantic(tmp_path):
    for verb in (["status"], ["reload"], ["jobs", "list"], ["history"], ["metrics"], ["watch"]):
        code = (
            "import sys; from cnprocd.cli.cnprocctl import run\n"
            f"status = run({[*verb, '--runtime-dir', str(tmp_path), '--state-dir', str(tmp_path)]!r})\n"
            "assert not {'pydantic', 'asyncio', 'yaml', 'structlog'} & set(sys.modules), 'slow to start'\n"
            "sys.exit(status)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == EX_UNAVAILABLE, done.stderr


def test_no_colour_without_a_terminal(rules):
    assert "\x1b" not in "".join(map(str, ctl("explain", rules=rules)))


def test_colour_on_a_terminal_unless_no_color(rules):
    assert "\x1b[" in on_terminal(["explain", "--rules", str(rules)], {})
    assert "\x1b[" not in on_terminal(["explain", "--rules", str(rules)], {"NO_COLOR": "1"})


def on_terminal(words, env):
    """Return what a command writes when its output is a terminal."""
    main, other = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cnprocd.cli.cnprocctl", *words],
        stdout=other,
        env={**os.environ, "TERM": "xterm", **env},
    )
    os.close(other)
    shown = b""
    try:
        while piece := os.read(main, 4096):
            shown += piece
    except OSError:  # EIO: the other side is closed
        pass
    os.close(main)
    assert process.wait() == 0
    return shown.decode()

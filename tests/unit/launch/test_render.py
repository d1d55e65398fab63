"""render.py: text of a process reaches a hook exactly, and never as an option, a path or a name."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.hookkit import ATTEMPT_ID, HOOK, hook, launch_request

from cnprocd.escape import printable
from cnprocd.launch import render
from cnprocd.launch.request import HookUser

USER = HookUser(1000, 1000, (1000,), "oracle", "/home/oracle", "/bin/bash", switch=True)
COMM = st.binary(min_size=1, max_size=15).filter(lambda raw: b"\0" not in raw)


def request(*events, **more):
    return launch_request(HOOK, *events, user=USER, attempt=2, **more)


def record(comm: bytes):
    text = comm.decode("utf-8", "surrogateescape")
    shown = printable(text)
    return {"pid": 42, "comm": shown} | ({"comm_hex": comm.hex()} if shown != text else {})


def environment(*events, **variables):
    env = {name: hook(value).command[0] for name, value in variables.items()}
    return render.environment(dataclasses.replace(request(*events), hook=hook("/bin/true", env=env)))


@given(COMM)
def test_the_environment_holds_the_very_bytes(comm):
    env = environment(record(comm), ORACLE_SID="{comm}")
    assert env[b"CNPROCD_COMM"] == comm
    assert env[b"ORACLE_SID"] == comm
    assert b"CNPROCD_COMM_HEX" not in env


@given(COMM)
def test_an_argument_is_never_an_option_or_a_path_and_always_one(comm):
    wanted = hook("/bin/x", "{comm}", "--name={comm}", "{pid}")
    argv = render.argv(wanted, record(comm))
    assert len(argv) == 4
    assert not argv[1].startswith((b"-", b"."))
    assert b"/" not in argv[1]
    assert argv[2].startswith(b"--name=")
    assert argv[3] == b"42"


@given(COMM)
def test_standard_input_is_the_record_as_logged_on_one_line(comm):
    event = record(comm)
    lines = render.standard_input(request(event)).splitlines()
    assert [json.loads(line) for line in lines] == [event | {"job_id": 7}]


def test_coalesced_events_are_one_line_each_and_one_job():
    wanted = hook("/bin/x", "{pid}")
    events = ({"pid": 1}, {"pid": 2}, {"pid": 3})
    assert render.argv(wanted, request(*events).first_record)[1] == b"1"
    assert [json.loads(line)["pid"] for line in render.standard_input(request(*events)).splitlines()] == [1, 2, 3]
    assert environment(*events)[b"CNPROCD_EVENTS"] == b"3"


def test_exe_and_cgroup_stay_paths_in_an_argument():
    wanted = hook("/bin/x", "{exe}", "{cgroup}", "{unit}")
    argv = render.argv(wanted, {"exe": "/usr/bin/a b", "cgroup": "/system.slice/x", "unit": "-.mount/x"})
    assert argv[1:] == [b"/usr/bin/a b", b"/system.slice/x", b"\\x2d.mount\\x2fx"]


def test_an_unknown_field_is_no_variable_and_an_empty_argument():
    env = environment({"pid": 1, "uid": None, "core_dumped": False, "cmdline": ["a", "b"]})
    assert b"CNPROCD_UID" not in env
    assert env[b"CNPROCD_CORE_DUMPED"] == b"false"
    assert env[b"CNPROCD_CMDLINE"] == b'["a", "b"]'
    assert render.argv(hook("/bin/x", "{uid}"), {"uid": None})[1] == b""


@given(text=st.text() | st.text(alphabet=st.characters(max_codepoint=127)), number=st.integers())
def test_texts_and_numbers_are_rendered_as_without_a_short_cut(text, number):
    """ASCII text and integers, which nearly all fields are, have a shorter way to the same bytes."""
    plain = "".join("?" if "\ud800" <= ch <= "\udfff" else ch for ch in text)
    assert render._encoded(text) == plain.replace("\0", "").encode()
    assert environment({"pid": number})[b"CNPROCD_PID"] == json.dumps(number).encode()


def test_the_environment_is_ours_alone(monkeypatch):
    for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "WATCHDOG_USEC", "LD_PRELOAD", "SECRET"):
        monkeypatch.setenv(name, "x")
    env = environment({"pid": 1})
    assert {name for name in env if not name.startswith(b"CNPROCD_")} == {
        *(b"PATH", b"LANG", b"HOME", b"USER", b"LOGNAME", b"SHELL")
    }
    assert env[b"PATH"] == render.PATH.encode()
    assert (env[b"USER"], env[b"HOME"], env[b"SHELL"]) == (b"oracle", b"/home/oracle", b"/bin/bash")
    assert (env[b"CNPROCD_JOB_ID"], env[b"CNPROCD_RULE"], env[b"CNPROCD_ATTEMPT"]) == (b"7", b"r", b"2")


def test_an_event_cannot_overrule_what_cnprocd_says_itself():
    env = environment({"job_id": 99, "rule": "other", "attempt_id": "x"})
    assert (env[b"CNPROCD_JOB_ID"], env[b"CNPROCD_RULE"], env[b"CNPROCD_ATTEMPT_ID"]) == (
        b"7",
        b"r",
        ATTEMPT_ID.encode(),
    )


@pytest.mark.parametrize(
    ("event", "result", "code", "status"),
    [
        ({"exit_code": 3, "signal": None}, b"exit-code", b"exited", b"3"),
        ({"exit_code": 0, "signal": None}, b"success", b"exited", b"0"),
        ({"exit_code": None, "signal": 9, "core_dumped": False}, b"signal", b"killed", b"KILL"),
        ({"signal": 11, "core_dumped": True}, b"core-dump", b"dumped", b"SEGV"),
        ({"signal": "SIGTERM"}, b"signal", b"killed", b"TERM"),
        ({"signal": 37}, b"signal", b"killed", b"RTMIN+3"),
        ({"signal": 33}, b"signal", b"killed", b"33"),
    ],
)
def test_systemds_names_where_they_mean_the_same(event, result, code, status):
    env = environment(event | {"unit": "oracle.service"})
    assert env[b"MONITOR_SERVICE_RESULT"] == result
    assert env[b"MONITOR_EXIT_CODE"] == code
    assert env[b"MONITOR_EXIT_STATUS"] == status
    assert env[b"MONITOR_UNIT"] == b"oracle.service"


def test_an_event_that_is_no_exit_has_no_exit_status():
    assert not [name for name in environment({"pid": 1, "exit_code": None}) if name.startswith(b"MONITOR")]


def test_a_huge_or_hostile_text_cannot_make_the_exec_fail():
    env = environment({"cmdline": "x" * (1 << 20), "exe": "a\0b", "unit": "\ud800"})
    assert len(env[b"CNPROCD_CMDLINE"]) == render.MOST_VALUE_BYTES
    assert env[b"CNPROCD_EXE"] == b"ab"
    assert env[b"CNPROCD_UNIT"] == b"?"


def test_a_message_for_people_cannot_deceive():
    template = hook("{comm}[{pid}] is gone").command[0]
    assert render.message(template, record(b"\x1b[2J")) == "\\x1b[2J[42] is gone"


@pytest.mark.parametrize("raw", ["zz", "6", "\udcff", "6 f"])
def test_found_by_fuzzing_a_bad_hex_field_leaves_the_text_field(raw):
    """From a damaged spool or a compromised daemon: the hook runs all the same."""
    assert environment({"comm": "x\\xff", "comm_hex": raw})[b"CNPROCD_COMM"] == b"x\\xff"


@pytest.mark.parametrize("name", ["a\0b", "a=b", "", "comm\n", "\udcff", "é", "x" * 100])
def test_found_by_fuzzing_an_unknown_field_is_not_a_variable(name):
    """From a damaged spool: a NUL in a variable's name would make the exec fail."""
    assert set(environment({"comm": "x", name: 1})) == set(environment({"comm": "x"}))

"""Records that are made quickly have the fields, the order and the text of those that are made plainly."""

import json
import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.output.plain_record import plain_record

from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.output import journal
from cnprocd.output import log as log_module
from cnprocd.output.log import LogOutput, make_log, make_output
from cnprocd.output.match_id import Machine
from cnprocd.output.record import MATCH_FIELDS, match_record, message
from cnprocd.process.files import FileId
from cnprocd.process.model import NO_LOGIN, Image, MoreIds, Occurrence, Process
from cnprocd.rules.compile import Match, compile_rule
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleModel

RULE = compile_rule(plain(RuleModel.model_validate({"name": "r-1", "events": "all"})), 0)
RAW = "".join(map(chr, range(0xDC80, 0xDC84)))  # bytes that are not UTF-8
HOSTILE = 'az09/-. "\\\n\t\0\x1b\x7f\x85\u2028\u202e\u200b\u00e9\U0001d11e' + RAW
TEXTS = st.text(st.sampled_from(HOSTILE), max_size=15) | st.text(max_size=20)
ID = "0123456789abcdef" * 4
CGROUPS = st.sampled_from([
    "/", "/system.slice/ssh.service", f"/system.slice/docker-{ID}.scope", f"/docker/{ID}", "/lxc.payload.web\x1b1/x",
    "/user.slice/user-1000.slice/user@1000.service/app.slice/foo\\x2dbar.service",
    f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod12345678_1234.slice/cri-containerd-{ID}.scope",
    f"/lxc.payload.outer/docker/{ID}/system.slice/in.service", r"/system.slice/mnt-my\x2ddata.mount",
])  # fmt: skip
CGROUP = CGROUPS | TEXTS.map(lambda text: f"/system.slice/{text}.service") | TEXTS
NUMBER = st.integers(0, 1 << 31)
MAYBE = st.none() | NUMBER
STATUS = st.none() | st.integers(0, 0xFFFF) | st.sampled_from([0, 256, 9, 11, 139, 40])
MACHINES = st.sampled_from([Machine(), Machine("db1\x1b", "5" * 32, "b" * 32)])
USAGE = st.builds(
    TaskRecord, NUMBER, NUMBER, NUMBER, NUMBER, st.booleans(), st.booleans(), TEXTS, *[NUMBER] * 12
)  # fmt: skip
IMAGES = st.builds(
    Image, st.none() | TEXTS, st.none() | st.booleans(), st.just(FileId(1, 2)), st.just(()), st.booleans(), st.none()
)
IDS = st.builds(MoreIds, MAYBE, st.none() | st.sampled_from([NO_LOGIN, 1000]))


PROCESSES = st.builds(
    Process, NUMBER, MAYBE, MAYBE, st.none() | TEXTS, uid=MAYBE, gid=MAYBE, exe=st.none() | TEXTS,
    cmdline=st.none() | TEXTS, cgroup=st.none() | CGROUP, image=st.none() | IMAGES, more_ids=st.none() | IDS,
)  # fmt: skip
OCCURRENCES = st.builds(
    Occurrence,
    st.sampled_from(["exit", "exit", "exec", "fork", "uid", "coredump"]),
    PROCESSES, NUMBER, STATUS, MAYBE, MAYBE, st.booleans(), st.booleans(), st.none() | USAGE,
    st.none() | st.lists(PROCESSES, max_size=3).map(tuple),
    oom=st.sampled_from([None, True, False, "lost"]),
    details=st.none() | st.just({"rgid": 1, "egid": 2}),
)  # fmt: skip


def name_of(uid):
    return None if uid % 3 == 0 else f"u{uid}\\"


@settings(max_examples=300)
@given(OCCURRENCES, MACHINES)
def test_a_record_is_the_plain_one(occurrence, machine):
    match = Match(RULE, occurrence, "nonzero_exit" if occurrence.kind == "exit" else occurrence.kind)
    found, expected = (make(match, name_of, machine, "u 1") for make in (match_record, plain_record))
    assert list(found.items()) == list(expected.items())
    assert list(found)[: len(MATCH_FIELDS)] == list(MATCH_FIELDS)
    assert list(match_record(match, name_of, machine, "u 1").items()) == list(expected.items()), "the second time"


@pytest.fixture
def written(monkeypatch):
    """Return a function that returns the line of a record, and one for the same through structlog."""
    monkeypatch.setattr(log_module, "_now", lambda: "2026-11-25T12:00:00.000000Z")
    reader, writer = os.pipe()
    output = make_output("json", writer, False)
    log = make_log(output)

    def lines(record, text):
        texts = [output.write_match("error", text, record)]
        log("error", "rule_matched", message=text, **record)
        return os.read(reader, 1 << 16).splitlines(keepends=True), texts[0]

    yield lines
    os.close(reader)
    os.close(writer)


def test_the_line_of_a_match_is_that_of_structlog(written):
    @settings(max_examples=200)
    @given(OCCURRENCES, MACHINES)
    def check(occurrence, machine):
        record = match_record(Match(RULE, occurrence, occurrence.kind), name_of, machine)
        (quick, plain_line), text = written(record, message(None, record))
        assert quick == plain_line
        assert json.loads(text) == record
        assert json.loads(quick)["message"] == message(None, record)

    check()


@settings(max_examples=200)
@given(OCCURRENCES, MACHINES)
def test_the_datagram_of_a_match_is_that_of_structlog(occurrence, machine):
    output, kept = LogOutput(), []
    output.outputs.append((journal.encode, SimpleNamespace(add=lambda data, rule: kept.append((data, rule)))))
    record = match_record(Match(RULE, occurrence, occurrence.kind), name_of, machine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "_now", lambda: "2026-11-25T12:00:00.000000Z")
        make_log(output)("error", "rule_matched", message=message(None, record), **record)
        assert output.write_match("error", message(None, record), record) is None
    assert kept[0] == kept[1]
    values = {name.removeprefix("CNPROCD_"): value for name, value in journal.fields(record) if name.startswith("CNP")}
    assert values == {name.upper(): plain_value(value) for name, value in record.items() if value is not None}


def plain_value(value):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "surrogateescape")


def test_less_severe_matches_are_not_written(written):
    output = make_output("json", os.open("/dev/null", os.O_WRONLY), False)
    make_log(output, "critical")
    assert output.write_match("error", "text", {"rule": "r"}) is None
    assert output.queued == 0


def test_a_match_of_a_broken_output_goes_to_the_next():
    (reader, writer), (other, sink) = os.pipe(), os.pipe()
    os.close(reader)
    output = make_output("json", writer, False)
    output.outputs += make_output("json", sink, False).outputs
    make_log(output)
    output.write_match("error", "text", {"rule": "r", "pid": 1})
    assert list(json.loads(os.read(other, 1 << 16)))[1:] == ["level", "event", "message", "rule", "pid"]
    for fd in (writer, other, sink):
        os.close(fd)
    output = make_output("json", os.open("/dev/full", os.O_WRONLY), False)
    make_log(output)
    assert output.write_match("error", "text", {"rule": "r"}) is not None
    assert (output.lost.records, output.lost.matches) == (1, 1)


def test_what_is_remembered_is_not_shared_with_a_record():
    """A job id, `held_by` or anything else that is put into a record does not appear in the next one."""
    process = Process(3, 2, comm="c", cgroup=f"/lxc.payload.a/docker/{ID}")
    records = [match_record(Match(RULE, Occurrence("exit", process, 3, 9), "exit")) for _ in range(2)]
    first = dict(records[1])
    records[0].update(dict.fromkeys(records[0], "changed"), held_by="x")
    assert records[1] == first == match_record(Match(RULE, Occurrence("exit", process, 3, 9), "exit"))

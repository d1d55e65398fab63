"""spool/backlog.py: a queue in a file, which a daemon that is killed at any instant leaves to the next one."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnprocd.spool import backlog as module
from cnprocd.spool.backlog import Backlog, Postponed
from cnprocd.spool.job import Gather, JobRequest

BOOT = "b" * 32
STEPS = st.sampled_from(["append", "take", "drop", "drop all", "kill"])


def postponed(number, rule="flooded", text="", gather=None, snapshot="s1"):
    event = {"pid": number, "rule": rule, "comm": text, "cmdline": ["a", None], "uid": None}
    request = JobRequest(f"key{number}", rule, event, "serial", number * 10**9, 17, gather, snapshot)
    return Postponed(request, "error", f"{number} died")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "backlog"


def waiting(backlog):
    return [one for one, _ in backlog.oldest(1 << 20)]


def take(backlog, most):
    found = backlog.oldest(most)
    backlog.remove(found)
    return [one for one, _ in found]


def test_requests_come_out_as_they_went_in_and_in_order(path):
    backlog = Backlog(path, BOOT)
    kept = [postponed(1), postponed(2, text="\x1b\udc80\u2028", gather=Gather("g/x", 2.5, 7)), postponed(3, rule="b")]
    assert backlog.append(kept[:2]) and backlog.append(kept[2:])
    assert (len(backlog), backlog.of_rule("flooded"), backlog.rules) == (3, 2, ["flooded", "b"])
    assert take(backlog, 2) == kept[:2]
    assert take(backlog, 2) == kept[2:]
    assert not backlog and not len(backlog) and backlog.rules == backlog.snapshots() == []


def test_without_a_file_it_takes_nothing(tmp_path):
    for backlog in (Backlog(), Backlog(tmp_path / "no" / "directory", BOOT)):
        assert not backlog.append([postponed(1)])
        assert not backlog and backlog.oldest(3) == []


def test_the_next_daemon_goes_on_with_what_is_not_done(path):
    backlog = Backlog(path, BOOT)
    backlog.append([postponed(number) for number in range(5)])
    take(backlog, 2)
    backlog.oldest(2)  # their jobs are committed, and the daemon is killed before it removes them
    following = Backlog(path, BOOT)
    assert [one.request.key for one in waiting(following)] == ["key2", "key3", "key4"]
    assert (following.of_rule("flooded"), following.snapshots()) == (3, ["s1"])


def test_another_boot_begins_anew(path):
    Backlog(path, BOOT).append([postponed(1)])
    backlog = Backlog(path, "c" * 32)
    assert not backlog
    assert backlog.append([postponed(2)])
    assert waiting(Backlog(path, "c" * 32)) == [postponed(2)]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_write_that_was_cut_loses_its_own_batch_at_most(path, cut):
    """The events of that batch are still in the receive slots."""
    backlog = Backlog(path, BOOT)
    backlog.append([postponed(1), postponed(2)])
    backlog.append([postponed(3)])
    os.truncate(path, os.stat(path).st_size - cut)
    following = Backlog(path, BOOT)
    assert waiting(following) == [postponed(1), postponed(2)]
    assert following.append([postponed(4)])
    assert waiting(Backlog(path, BOOT)) == [postponed(1), postponed(2), postponed(4)]


def test_a_write_that_was_cut_with_garbage_after_it_is_cut_off(path):
    backlog = Backlog(path, BOOT)
    backlog.append([postponed(1)])
    end = os.stat(path).st_size
    backlog.append([postponed(2)])
    with path.open("r+b") as file:
        file.seek(end + 12)
        file.write(b"\0" * 20)
    assert waiting(Backlog(path, BOOT)) == [postponed(1)]


def test_a_kill_while_it_is_emptied_leaves_it_empty(path):
    """The file is cut before its head is changed, so the head can point behind its end."""
    backlog = Backlog(path, BOOT)
    backlog.append([postponed(number) for number in range(9)])
    take(backlog, 8)
    os.truncate(path, module._START)
    following = Backlog(path, BOOT)
    assert not following
    following.append([postponed(10)])
    assert waiting(Backlog(path, BOOT)) == [postponed(10)]


def test_a_directory_without_room_takes_none_of_a_batch(path, monkeypatch):
    backlog = Backlog(path, BOOT)
    backlog.append([postponed(1)])
    size = os.stat(path).st_size
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: len(data) // 2], at))
    assert not backlog.append([postponed(2), postponed(3)])
    assert os.stat(path).st_size == size
    monkeypatch.undo()
    assert waiting(backlog) == [postponed(1)]
    monkeypatch.setattr(module, "MOST_BYTES", size)
    assert not backlog.append([postponed(2)])


def test_its_file_does_not_grow_while_it_is_never_empty(path, monkeypatch):
    monkeypatch.setattr(module, "_LEAST_COMPACTED", 1000)
    backlog = Backlog(path, BOOT)
    backlog.append([postponed(0)])
    for number in range(1, 200):
        backlog.append([postponed(number)])
        assert take(backlog, 1) == [postponed(number - 1)]
        assert os.stat(path).st_size < 3000
    assert waiting(Backlog(path, BOOT)) == [postponed(199)]


def test_what_cannot_be_read_is_given_up_by_rule(path):
    backlog = Backlog(path, BOOT)
    backlog.append([postponed(1), postponed(2, rule="b")])
    with path.open("r+b") as file:
        file.seek(module._START + 12)
        file.write(b"\0" * 20)
    assert backlog.oldest(2) == []
    assert backlog.give_up() == {"flooded": 1, "b": 1}
    assert not backlog and not Backlog(path, BOOT)


def test_dropped_requests_are_skipped_and_later_ones_are_not(path):
    backlog = Backlog(path, BOOT)
    backlog.append([postponed(1), postponed(2, rule="b"), postponed(3)])
    made = backlog.oldest(1)
    assert (backlog.drop("f*ed"), backlog.drop("none*")) == ({"flooded": 2}, {})
    backlog.append([postponed(4)])
    backlog.remove(made)  # its job was made before, and was on the disk only now
    for one in (backlog, Backlog(path, BOOT)):
        assert (len(one), one.of_rule("flooded"), one.of_rule("b")) == (2, 1, 1)
        assert waiting(one) == [postponed(2, rule="b"), postponed(4)]
    assert backlog.drop() == {"flooded": 1, "b": 1}
    assert backlog.give_up() == {}, "nothing was lost"
    assert not backlog


@pytest.fixture(scope="module")
def often_compacted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LEAST_COMPACTED", 300)
        yield


@pytest.mark.usefixtures("often_compacted")
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(1, 6)), max_size=40))
def test_it_is_a_queue_across_kills(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("run") / "backlog"
    backlog, model, number = Backlog(path, BOOT), [], 0
    for what, count in steps:
        if what == "append":
            new = [postponed(number + one, rule=f"r{one}") for one in range(count)]
            number += count
            assert backlog.append(new)
            model += new
        elif what == "take":
            assert take(backlog, count) == model[:count]
            del model[:count]
        elif what == "drop":
            rest = [one for one in model if one.request.rule != f"r{count}"]
            assert backlog.drop(f"r{count}").total() == len(model) - len(rest)
            model = rest
        elif what == "drop all":
            assert backlog.drop().total() == len(model)
            model = []
        else:
            backlog = Backlog(path, BOOT)
        assert len(backlog) == len(model) and (backlog or not model)
        assert all(backlog.of_rule(one.request.rule) for one in model) and len(backlog.snapshots()) == bool(model)
    assert waiting(backlog) == model

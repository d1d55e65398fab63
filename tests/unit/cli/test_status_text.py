"""The lines of `cnprocctl status` about what is given up beside the event loop: only what needs attention is shown."""

from cnprocd.cli.terminal import Style
from cnprocd.cli.verbs.daemon import _counted, _edges, _latency, _log, _owner

STYLE = Style()
CALM = {"name": "names", "waiting": 0, "done": 7, "late": 0, "refused": 0, "failed": 0, "replaced": 0, "stuck": 0}


def test_only_edges_that_gave_something_up_are_shown():
    troubled = {**CALM, "name": "proc", "late": 3, "replaced": 2, "stuck": 1}
    assert list(_edges([CALM, troubled], STYLE)) == ["proc: 1 STUCK, 3 late, 2 replaced; 7 done"]


def test_lost_log_records_are_shown_with_their_matches():
    assert _log({"queued": 0, "lost": 0, "lost_matches": 0}, STYLE) == []
    assert _log(None, STYLE) == []
    assert _log({"queued": 1, "lost": 5, "lost_matches": 4}, STYLE) == [
        ("log", "1 record waiting; 5 LOST, 4 of them matches")
    ]


def test_directories_that_nothing_locks_are_reported():
    assert _owner(["/run/cnprocd"], STYLE) == "holds /run/cnprocd"
    assert "no directory is locked" in _owner([], STYLE)


def test_counted_matches_are_those_of_all_rules_together():
    """Each part is named, so that the parts make the sum: rules beyond those shown, and rules that were removed."""
    rules = [(10 + number, f"r{number}") for number in range(6)]
    head = "matches were counted and not reported: r5 15, r4 14, r3 13, r2 12, r1 11"
    assert _counted(75, rules) == f"75 {head}, other rules 10"
    assert _counted(80, rules) == f"80 {head}, other rules 10, removed rules 5"
    assert _counted(3, [(3, "a"), (0, "b")]) == "3 matches were counted and not reported: a 3"


def test_a_latency_that_was_not_measured_is_called_so():
    """Hooks of recovered exits have run, but their events have no time."""
    assert _latency({"counts": [0, 0]}).startswith("not measured yet")
    assert _latency(None) == _latency({"counts": []})

"""`--draft FILE`: what would hold if a rule file had the content of standard input."""

import io
import sys
from pathlib import Path

import pytest
from unit.ctlkit import ctl, ctl_json

from cnprocd.cli.drafts import Draft, DraftError, dropins_with
from cnprocd.cli.remote import reads_input
from cnprocd.errors import EX_CONFIG, EX_NO, EX_OK
from cnprocd.rules import rule_files
from cnprocd.rules.rule_files import DROPIN_DIRS, MAIN_FILE

GOOD = "rules:\n  - {name: a, events: [exit], match: {comm: saved}}\n"
DRAFT = "rules:\n  - {name: a, events: [exit], match: {comm: draft}}\n"


@pytest.fixture
def draft(monkeypatch, tmp_path):
    """Return a function that puts a text on standard input and returns the path of the saved file."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(GOOD)

    def given(text=DRAFT):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return rules

    return given


def test_check_finds_the_mistakes_of_a_draft_at_its_file(draft):
    rules = draft("rules:\n  - name: a\n    events: [died]\n")
    status, found = ctl_json("check", "--draft", str(rules), rules=rules)
    (problem,) = found["problems"]
    assert (status, problem["file"], problem["line"], problem["column"]) == (EX_CONFIG, str(rules), 3, 14)
    assert rules.read_text() == GOOD


def test_warnings_of_a_draft_are_at_the_lines_of_the_draft(draft):
    rules = draft("\n\nrules:\n  - {name: a, events: [exit], match: {unit: app}}\n")
    status, found = ctl_json("check", "--draft", str(rules), rules=rules)
    (warning,) = found["warnings"]
    assert (status, warning["line"], warning["source_line"].strip()[:8]) == (EX_OK, 4, "- {name:")


def test_test_and_explain_use_the_draft(draft):
    rules = draft()
    assert ctl("test", "--comm", "draft", "--draft", str(rules), rules=rules)[0] == EX_OK
    rules = draft()
    assert ctl("test", "--comm", "saved", "--draft", str(rules), rules=rules)[0] == EX_NO
    rules = draft()
    _, (found,) = ctl_json("explain", "--comm", "draft", "--draft", str(rules), rules=rules)
    assert found["fires"]


def test_explain_reads_an_event_of_standard_input_once(draft):
    rules = draft('{"comm": "saved"}')
    _, (found,) = ctl_json("explain", "--event", "-", "a", rules=rules)
    assert found["fires"]


def test_a_draft_and_an_event_cannot_both_be_standard_input(draft):
    rules = draft()
    status, _, err = ctl("test", "--event", "-", "--draft", str(rules), rules=rules)
    assert (status, err.partition(":")[2].strip()[:7]) == (2, "--draft")


def test_a_new_dropin_is_read_in_the_order_of_names(monkeypatch, tmp_path):
    own, vendor = tmp_path / "etc", tmp_path / "lib"
    for directory, name in ((own, "10-a.yaml"), (own, "30-c.yaml"), (vendor, "40-d.yaml")):
        directory.mkdir(exist_ok=True)
        (directory / name).touch()
    monkeypatch.setattr("cnprocd.cli.drafts.DROPIN_DIRS", (own, vendor))
    monkeypatch.setattr("cnprocd.cli.drafts.find_dropins", lambda: rule_files.find_dropins((own, vendor)))
    names = [path.name for path in dropins_with(None, Draft(own / "20-b.yaml", b""))]
    assert names == [MAIN_FILE.name, "10-a.yaml", "20-b.yaml", "30-c.yaml", "40-d.yaml"]
    assert dropins_with(None, Draft(own / "40-d.yaml", b""))[-1] == own / "40-d.yaml", "it overrides the vendor's"
    with pytest.raises(DraftError, match="takes precedence"):
        dropins_with(None, Draft(vendor / "10-a.yaml", b""))


@pytest.mark.parametrize("path", ["/etc/passwd", str(DROPIN_DIRS[0] / "a.txt"), "/tmp/rules.d/a.yaml"])
def test_a_draft_of_a_file_that_is_not_read_is_refused(tmp_path, path):
    with pytest.raises(DraftError, match="does not read"):
        dropins_with(None, Draft(Path(path), b""))


def test_a_draft_is_passed_on_to_another_host():
    assert reads_input(["check", "--draft", "/etc/cnprocd/rules.yaml"])
    assert not reads_input(["check"])

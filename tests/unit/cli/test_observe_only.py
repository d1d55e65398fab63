"""`--observe-only` and CNPROCD_OBSERVE_ONLY: rules with hooks are errors, in the daemon's check and in every verb."""

from unit.ctlkit import ctl

from cnprocd.cli.cnprocd import run
from cnprocd.cli.observing import VARIABLE, observes_only
from cnprocd.cli.snapshots import last_accepted
from cnprocd.errors import EX_CONFIG, EX_OK
from cnprocd.rules import snapshot_files
from cnprocd.rules.language.disabled import load_with_snapshot

PLAIN = "rules:\n  - {name: a, events: [exit]}\n"
HOOKED = f"{PLAIN}  - {{name: b, enabled: false, events: [exit], run: {{command: [/bin/true]}}}}\n"
EXPECTED = ":3:47: hooks are refused: --observe-only is in effect"


def written(tmp_path, text):
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    return str(file)


def test_check_refuses_hooks_and_gives_the_reason(tmp_path):
    """A disabled rule is refused as well: it can be enabled without a look at its file."""
    file = written(tmp_path, HOOKED)
    status, out, err = ctl("check", "--observe-only", file)
    assert (status, out) == (EX_CONFIG, "")
    assert err.startswith(f"{file}{EXPECTED}\n")
    assert "a hook in a container has the files and users of its image, not those of the host" in err
    assert ctl("check", file)[0] == EX_OK
    assert ctl("check", "--observe-only", "--other-host", file)[0] == EX_CONFIG
    assert ctl("check", "--observe-only", written(tmp_path, PLAIN))[0] == EX_OK


def test_the_daemons_own_check_refuses_hooks(tmp_path, capsys):
    assert run(["--check", "--observe-only", "--rules", written(tmp_path, HOOKED)]) == EX_CONFIG
    assert EXPECTED in capsys.readouterr().err


def test_the_variable_of_the_image_binds_every_verb(tmp_path, monkeypatch):
    file = written(tmp_path, HOOKED)
    monkeypatch.setenv(VARIABLE, "1")
    for words in (["check", file], ["--rules", file, "check"], ["--rules", file, "explain"]):
        status, _, err = ctl(*words)
        assert (status, EXPECTED in err) == (EX_CONFIG, True), words
    assert run(["--check", "--rules", file]) == EX_CONFIG


def test_only_an_empty_variable_or_0_lets_hooks_run():
    assert [observes_only(False, {VARIABLE: value}) for value in ("", "0", "1", "no")] == [False, False, True, True]
    assert (observes_only(False, {}), observes_only(True, {VARIABLE: "0"})) == (False, True)


def test_accepted_rules_with_hooks_do_not_come_back(tmp_path):
    """An earlier daemon accepted them. If the files are invalid now, they would be the rules to fall back on."""
    file, kept = tmp_path / "rules.yaml", tmp_path / "kept"
    file.write_text(HOOKED)
    loaded, snapshot = load_with_snapshot(file)
    snapshot_files.store(kept, snapshot)
    snapshot_files.accept(kept, loaded.snapshot, [])
    accepted = last_accepted(file, kept)
    assert accepted is not None and [rule.name for rule in accepted.rules] == ["a", "b"]
    assert last_accepted(file, kept, observe_only=True) is None

"""Attacks by files: rules and hooks swapped between check and use, bombs in rule files, expensive expressions."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from kernel.harness import PATIENCE_S, child, rename, running, wait_status

from cnprocd.launch.program import comm_is_kept

NOBODY = 65534
FAILED = """
rules:
  - {name: failed, events: [nonzero_exit], match: {comm: "cnptest-*"}}
$MARKER
"""


@contextmanager
def swapping(path, good, evil, user=0, how="link"):
    """Make `path` name one or the other of two files in turn, as fast as rename(2) can, as `user`."""
    code = f"""
import os
os.setresuid({user}, {user}, {user})
while True:
    for source in ({str(evil)!r}, {str(good)!r}):
        os.{how}(source, {str(path)!r} + ".new")
        os.rename({str(path)!r} + ".new", {str(path)!r})
"""
    # Not this interpreter: another user may not have access to it.
    swapper = subprocess.Popen(["/usr/bin/python3", "-IS", "-c", code], cwd="/")
    try:
        yield
        assert swapper.poll() is None
    finally:
        swapper.kill()
        swapper.wait()


def run_swapped(tmp_path, hook, argument, swapping):
    """Let 60 processes die while their hook is swapped. Return why hooks did not run."""
    rules = "rules:\n  - name: hooked\n    events: [nonzero_exit]\n    match: {comm: cnptest-swap}\n"
    rules += f"    run: {{command: [{hook}, {argument}]}}\n$MARKER"
    with running(tmp_path, rules) as daemon, swapping:
        for _ in range(60):
            pid = child(lambda: (rename("cnptest-swap"), os._exit(1)))
            wait_status(pid)
            job = daemon.wait_for("rule_matched", pid=pid)["job_id"]
            while not any(
                one["event"] in ("hook_finished", "job_dead") and one["job_id"] == job for one in daemon.records
            ):
                daemon.next_record()
    return [str(one["reason"]) for one in daemon.records if one["event"] == "hook_failed"]


def test_a_swapped_program_runs_as_checked_or_not_at_all(tmp_path):
    """Root swaps. A binary is executed by the checked descriptor. A script cannot be: see program.py."""
    if not comm_is_kept(os.uname().release):
        pytest.skip("programs are executed by descriptor on Linux 6.14 and newer")
    ours, theirs, hook = (tmp_path / name for name in ("good", "evil", "hook"))
    shutil.copy("/bin/true", ours)
    shutil.copy("/bin/touch", theirs)
    os.chown(theirs, NOBODY, NOBODY)
    os.link(ours, hook)
    refused = run_swapped(tmp_path, hook, tmp_path / "touched", swapping(hook, ours, theirs))
    print(f"\n{60 - len(refused)} ran, {len(refused)} refused")
    assert not (tmp_path / "touched").exists()
    assert all("belongs to user" in reason for reason in refused)


def test_a_user_who_can_swap_a_hook_cannot_run_it(tmp_path):
    """A user owns the directory of the hook and swaps its name with a script of root: refused every time."""
    ours, theirs, hook = tmp_path / "good", tmp_path / "theirs" / "evil", tmp_path / "theirs" / "hook"
    theirs.parent.mkdir()
    for script in (ours, theirs):
        script.write_text('#!/bin/sh\n: > "$1"\n')
        script.chmod(0o755)
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(0o755)
    os.symlink(ours, hook)
    os.chown(theirs.parent, NOBODY, NOBODY)
    os.chown(theirs, NOBODY, NOBODY)
    refused = run_swapped(tmp_path, hook, tmp_path / "ran", swapping(hook, ours, theirs, NOBODY, "symlink"))
    assert not (tmp_path / "ran").exists()
    assert len(refused) == 60


def test_a_rule_file_swapped_after_its_check_is_never_loaded(tmp_path):
    with running(tmp_path, FAILED) as daemon:
        ours, theirs = tmp_path / "good.yaml", tmp_path / "evil.yaml"
        ours.write_text(daemon.rules.read_text())
        theirs.write_text("rules:\n  - {name: evil, events: [nonzero_exit], run: {command: [/bin/true]}}\n")
        os.chown(theirs, NOBODY, NOBODY)
        with swapping(daemon.rules, ours, theirs):
            for count in range(1, 41):
                daemon.process.send_signal(signal.SIGHUP)
                while sum(one["event"] in ("rules_loaded", "rules_rejected") for one in daemon.records) < count:
                    daemon.next_record()
        told = [one for one in daemon.records if one["event"] in ("rules_loaded", "rules_rejected")]
        assert {one["rules"] for one in told if one["event"] == "rules_loaded"} <= {2}
        for one in told:
            assert one["event"] == "rules_loaded" or "belongs to user" in str(one["message"])
        daemon.mark()
        assert daemon.matches("evil") == []


# -- bombs -------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in pairwise("abcdefghij"))
BOMBS = {
    "laughs": LAUGHS,
    "merge": "a: &a {b: c}\nrules: [{<<: *a}]\n",
    "deep": "rules: " + "[" * 100_000,
    "deep-block": "".join(" " * n + "- \n" for n in range(900)),
    "large": "# " + "x" * (2 << 20),
    "long-key": "? " + "k" * 900_000 + "\n: v\n",
    "many-keys": "lists: {" + ", ".join(f"l{n}: [a]" for n in range(60_000)) + "}\nrules: [{}]",
    "numbers": "rules: [" + ", ".join(["9" * 5000] * 100) + "]",
    "expression": 'rules: [{name: r, events: [exit], match: {cmdline: "/(a+)+$/"}}]',
    "binary": "\x00\x01\x02",
}


def test_a_bomb_in_a_rule_file_is_refused_and_changes_nothing(tmp_path):
    with running(tmp_path, FAILED) as daemon:
        for name, text in BOMBS.items():
            daemon.records.clear()
            record = daemon.reload(text)
            assert record["event"] == "rules_rejected", name
            assert len(str(record["message"])) < 2_000_000, name
        resident = int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]) * 4
        print(f"\nresident after all bombs: {resident} KiB")
        pid = child(lambda: (rename("cnptest-bomb"), os._exit(3)))
        wait_status(pid)
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed", comm="cnptest-bomb")] == [pid]
    done = subprocess.run(
        [sys.executable, "-m", "cnprocd.cli.cnprocd", "--rules", "/dev/zero", "--check"],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 78


def test_the_slowest_accepted_regex_does_not_block_the_daemon(tmp_path):
    """Processes with the worst text die again and again, and later failures still match."""
    rules = 'rules:\n  - {name: dear, events: [nonzero_exit], match: {cmdline: "/a.*b/"}}\n'
    rules += "  - {name: failed, events: [nonzero_exit], match: {comm: cnptest-after}}\n$MARKER"
    with running(tmp_path, rules) as daemon:
        for _ in range(20):
            subprocess.run(["/bin/sh", "-c", "exit 1", "a" * 8000], check=False)
        pid = child(lambda: (rename("cnptest-after"), os._exit(3)))
        wait_status(pid)
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed")] == [pid]

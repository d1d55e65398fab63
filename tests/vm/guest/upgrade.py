"""Steps about other versions: from 0.1.0 to this one with jobs waiting, hooks running and events coming, and back."""

from __future__ import annotations

import threading
from pathlib import Path

from crashes import compare, ready, storm
from hooks import prepare
from life import purge
from probe import RULES, SCRATCH, cursor, die, expect, first, main_pid, matched_pids, run, show, until

HERE = Path(__file__).resolve().parent
JOBS = 20  # more than there are slots: some hooks run, the other jobs wait
SPOOL = Path("/var/lib/cnprocd")
# dpkg asks about the edited rules, because the shipped ones changed as well; without a terminal it would fail.
INSTALL = ("apt-get", "-o", "Dpkg::Options::=--force-confold", "install", "-y")


def package(number: str) -> str:
    (deb,) = HERE.glob(f"packages/{number}/*.deb")
    return str(deb)


def ended() -> list[str]:
    """Return the PIDs whose hook ended, in order. A hook writes its line last."""
    return (SCRATCH / "waited").read_text().split() if (SCRATCH / "waited").exists() else []


def install_0_1_0() -> str:
    run("apt-get", "install", "-y", "--no-install-recommends", package("0"), timeout=300)
    run("systemctl", "enable", "--now", "cnprocd.service", timeout=180)
    return run("cnprocd", "--version").stdout.strip()


def upgrade_from_0_1_0() -> str:
    """Upgrade while hooks run, jobs wait and processes fail: each failure matches once, each job ends once."""
    for name in ("waited", "go"):
        (SCRATCH / name).unlink(missing_ok=True)
    prepare()
    after = cursor()
    jobs = [str(die("vmwait", 1)) for _ in range(JOBS)]
    first(after, "CNPROCD_EVENT=hook_started", "CNPROCD_RULE=vm-wait", limit_s=240)
    edited, before = RULES.read_text(), main_pid()
    upgrade = threading.Thread(target=run, args=(*INSTALL, package("2")), kwargs={"timeout": 300})
    upgrade.start()
    died: list[int] = []
    while upgrade.is_alive():
        died += storm(5, "vmstorm", {})
        upgrade.join(0.2)
    until("the new daemon is up", ready, limit_s=180)
    died += storm(20, "vmstorm", {})
    version = run("dpkg-query", "-W", "-f", "${Version}", "cnprocd").stdout
    expect("-2" in version, f"the version is {version}")
    expect(main_pid() != before, "the old daemon still runs")
    expect(RULES.read_text() == edited, "the edited rules were replaced")
    expect(show("cnprocd.service", "UnitFileState") == "enabled", "the service is not enabled any more")
    verdict = compare(died, matched_pids(after, "vm-storm", limit_s=180))
    expect("twice" not in verdict, verdict)
    expect(not ended(), "a hook ended before it was allowed to")
    (SCRATCH / "go").touch()
    seconds = until("every job ended", lambda: bool(run("sync")) and set(ended()) >= set(jobs), limit_s=240)
    expect(sorted(ended()) == sorted(jobs), f"{len(ended())} ends of {len(jobs)} jobs: {ended()}")
    return f"{version}: {verdict}; {len(jobs)} of {len(jobs)} jobs ended once, after {seconds:.0f} s"


def downgrade_to_0_1_0() -> str:
    """Downgrade: 0.1.0 cannot read the newer spool and sets it aside. It then matches and runs hooks."""
    (SCRATCH / "noted").unlink(missing_ok=True)
    run(*INSTALL, "--allow-downgrades", package("0"), timeout=300)
    until("the old daemon is up", ready, limit_s=180)
    after = cursor()
    pid = die("vmnote", 6)
    first(after, "CNPROCD_RULE=vm-note", "CNPROCD_EVENT=hook_finished", limit_s=180)
    expect((SCRATCH / "noted").read_text().split() == [str(pid)], "the hook did not run once")
    expect(show("cnprocd-kmsg.socket", "ActiveState") == "inactive", "the socket of the kernel's log is still active")
    return "matches and runs hooks; in its directory: " + " ".join(sorted(path.name for path in SPOOL.iterdir()))


def purge_0_1_0() -> str:
    """Purge the older version: it leaves nothing of this one behind."""
    return purge()

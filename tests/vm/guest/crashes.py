"""Steps about loss: a storm of failing processes while daemon or runner is killed, restarted, upgraded or hung."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from hooks import prepare
from identity import Kept, unknown_attributes
from probe import RULES, SCRATCH, cursor, die, expect, main_pid, matched_pids, run, show, until

HERE = Path(__file__).resolve().parent
STORM = 400
KEPT = 60
LOAD = Path("/run/systemd/system/cnprocd.service.d")


def storm(count: int, comm: str, at: dict[int, Callable[[], object]]) -> list[int]:
    """Run `count` processes that exit with 1 to 127, one after the other; call the function at the given numbers."""
    pids = []
    for number in range(count):
        if number in at:
            at[number]()
        pids.append(die(comm, number % 127 + 1))
    return pids


def compare(expected: list[int], seen: list[int]) -> str:
    missing, extra = sorted(set(expected) - set(seen)), sorted(set(seen) - set(expected))
    twice = len(seen) - len(set(seen))
    expect(
        not missing and not extra,
        f"{len(expected)} died, {len(missing)} not matched ({missing[:10]}), {len(extra)} extra",
    )
    return f"{len(expected)} expected, {len(set(seen))} seen" + (f", {twice} twice" if twice else "")


def kill_daemon() -> str:
    """Kill the daemon twice in the storm: systemd holds the socket, the next daemon reads the missed events."""
    prepare()
    after = cursor()

    def kill() -> None:
        until("a daemon to kill", lambda: main_pid() > 0)
        os.kill(main_pid(), signal.SIGKILL)

    restarts = int(show("cnprocd.service", "NRestarts"))
    died = storm(
        STORM, "vmstorm", {STORM // 4: kill, STORM // 2: lambda: until("a new one", ready), STORM * 3 // 4: kill}
    )
    until("the last one is up", ready)
    verdict = compare(died, matched_pids(after, "vm-storm"))
    expect(int(show("cnprocd.service", "NRestarts")) == restarts + 2, "not restarted twice")
    return verdict


def ready() -> bool:
    return show("cnprocd.service", "ActiveState") == "active" and main_pid() > 0


def kill_runner() -> str:
    """Kill the runner while hooks run: the daemon still has their jobs."""
    prepare()
    (SCRATCH / "noted").unlink(missing_ok=True)

    def kill() -> None:
        until("a runner to kill", lambda: main_pid("cnprocd-runner.service") > 0)
        os.kill(main_pid("cnprocd-runner.service"), signal.SIGKILL)

    died = storm(60, "vmnote", {20: kill, 40: kill})

    def ran() -> set[int]:
        return (
            {int(line) for line in (SCRATCH / "noted").read_text().split()} if (SCRATCH / "noted").exists() else set()
        )

    until("every hook ran", lambda: bool(run("true")) and ran() >= set(died), limit_s=180)
    return compare(died, sorted(ran())) + " hooks"


def restart_under_load() -> str:
    """Restart the service. What the daemon knew of processes that die meanwhile is handed on."""
    prepare()
    kept = Kept(KEPT)
    after = cursor()
    done = threading.Thread(target=run, args=("systemctl", "restart", "cnprocd.service"))
    at: dict[int, Callable[[], object]] = {n: lambda: kept.end(1) for n in range(0, STORM, STORM // KEPT)}
    died = storm(STORM, "vmstorm", at | {STORM // 4: done.start})
    done.join()
    kept.end(KEPT)
    died += storm(20, "vmstorm", {})
    verdict = compare(died, matched_pids(after, "vm-storm"))
    return f"{verdict}; {kept.compare(after)}"


def kill_and_forget() -> str:
    """Kill the daemon, which hands nothing on: each process matches, or is counted as unknown."""
    prepare()
    kept = Kept(KEPT)
    after = cursor()
    os.kill(main_pid(), signal.SIGKILL)
    kept.end(KEPT // 2)
    until("a new daemon", ready)
    kept.end(KEPT)
    seen = set(matched_pids(after, "vm-kept"))
    unknown = unknown_attributes().get("cmdline", 0)
    expect(seen <= set(kept.ended), f"other processes matched: {seen - set(kept.ended)}")
    expect(len(seen) + unknown >= KEPT, f"{KEPT} died, {len(seen)} matched, {unknown} counted as unknown")
    late = set(kept.ended[KEPT // 2 :])
    expect(len(late - seen) <= KEPT // 10, f"of {len(late)} that lived at the start {len(late & seen)} matched")
    return f"{KEPT} died, {len(seen)} matched, {unknown} unknown"


def upgrade_under_load() -> str:
    """Install the next version of the package while processes die. The edited rules and all knowledge are kept."""
    prepare()
    kept = Kept(KEPT)
    (deb,) = HERE.glob("packages/2/*.deb")
    edited = RULES.read_text()
    before = main_pid()
    after = cursor()
    upgrade = threading.Thread(target=run, args=("apt-get", "install", "-y", str(deb)), kwargs={"timeout": 300})
    upgrade.start()
    died = []
    while upgrade.is_alive():
        died += storm(5, "vmstorm", {})
        kept.end(1)
        upgrade.join(0.2)
    kept.end(KEPT)
    died += storm(20, "vmstorm", {})
    until("the new one is up", ready)
    version = run("dpkg-query", "-W", "-f", "${Version}", "cnprocd").stdout
    expect("-2" in version, f"the version is {version}")
    expect(main_pid() != before, "the old daemon still runs")
    expect(RULES.read_text() == edited, "the edited rules were replaced")
    verdict = compare(died, matched_pids(after, "vm-storm"))
    return f"{version}: {verdict}; {kept.compare(after)}"


def watchdog() -> str:
    """Stop the daemon (SIGSTOP): systemd kills and replaces it, and the processes that died meanwhile match."""
    LOAD.mkdir(parents=True, exist_ok=True)
    (LOAD / "vm.conf").write_text("[Service]\nWatchdogSec=6s\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", "cnprocd.service")
    after = cursor()
    hung = main_pid()
    os.kill(hung, signal.SIGSTOP)
    died = storm(20, "vmstorm", {})
    seconds = until("a new daemon", lambda: ready() and main_pid() != hung, limit_s=120)
    (LOAD / "vm.conf").unlink()
    run("systemctl", "daemon-reload")
    verdict = compare(died, matched_pids(after, "vm-storm"))
    return f"replaced after {seconds:.0f} s; {verdict}"

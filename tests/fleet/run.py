"""`make test-fleet`: three hosts and a collector in network namespaces, with Debian's own packages; count what arrives.

The files of packaging/fleet are installed as docs/fleet.md describes. Each host's journald gets records of matches
that cnprocd's own code made. Meanwhile cables are pulled, agents and the collector's receiver are killed, the
collector's disk is full for a while, and one host is stopped and started again. At the end every match that was sent
must be in the collector's journal, and `fleet-matches` must print each once. Needs root, mmdebstrap, and 300 MB in
.fleet.

With --rsyslog, rsyslog carries the matches instead: its loss is printed, and does not fail the test.

    python tests/fleet/run.py [--records 2500] [--rsyslog]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from machines import Host, Network, run, tree_of, until

from cnprocd.cli.ruleset import rule_of_match
from cnprocd.output.journal import encode
from cnprocd.output.match_id import Machine
from cnprocd.output.record import match_record, message
from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.compile import Matcher

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "packaging" / "fleet"
PACKAGES = ("systemd", "systemd-journal-remote", "openssl", "python3-minimal", "hostname", "rsyslog", "rsyslog-relp")
REMOTE = "/usr/lib/systemd/systemd-journal-remote"
UPLOAD = "/usr/lib/systemd/systemd-journal-upload"
CUT_S, FULL_S = 20.0, 8.0
PERIOD_S = 40.0  # in which a host sends its records


def records(host: str, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield the match id and the journal datagram of each match."""
    machine = Machine(host, None, os.urandom(16).hex())
    matcher = Matcher([replace(rule_of_match(None, ["nonzero_exit"]), name="fleet")])
    for number in range(count):
        process = Process(1000 + number, 1, 1, comm="ora_pmon", uid=54, cgroup="/system.slice/oracle.service")
        (match,) = matcher.match(Occurrence("exit", process, process.tgid, 9, 10**12 + number))
        record = match_record(match, machine=machine)
        head = {"timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "level": "error"}
        found = {**head, "event": "rule_matched", "message": message(None, record), **record}
        yield str(record["match_id"]), encode(found)


class Sender(threading.Thread):
    """Sends a host's matches to its journald. Waits while journald is away, as the daemon's queue does."""

    def __init__(self, host: Host, count: int) -> None:
        super().__init__(daemon=True)
        self._host, self._count, self.host_name = host, count, host.name
        self.sent: list[str] = []
        self.may_send = threading.Event()
        self.may_send.set()

    def run(self) -> None:
        path = str(self._host.root / "run/systemd/journal/socket")
        for match_id, datagram in records(self._host.name, self._count):
            self.may_send.wait()
            while True:
                try:
                    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                        connection.connect(path)
                        connection.send(datagram)
                    break
                except OSError:
                    time.sleep(0.05)
            self.sent.append(match_id)
            time.sleep(PERIOD_S / self._count)


def certificates(directory: Path, names: list[str]) -> None:
    """Make a certificate authority, and a key and certificate for each host."""
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=fleet",
        "-keyout", "ca.key", "-out", "ca.pem", cwd=directory)  # fmt: skip
    for name in names:
        (directory / "ext").write_text(f"subjectAltName=DNS:{name}\n")
        run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}.key",
            "-out", f"{name}.csr", cwd=directory)  # fmt: skip
        run("openssl", "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", "ext", "-out", f"{name}.pem", cwd=directory)  # fmt: skip


def install(host: Host, kind: str, keys: Path) -> None:
    """Install the files of the recipe: `kind` is upload or remote."""
    text = (RECIPE / f"journal-{kind}.conf").read_text().replace("collector.example", "collector")
    if kind == "remote":  # the disk here is small
        text = text.replace("MaxUse=50G", "MaxUse=200M").replace("KeepFree=5G", "KeepFree=1M")
    host.write(f"etc/systemd/journal-{kind}.conf.d/cnprocd.conf", text)
    for target, source in (("journal", "key"), ("certs", "pem")):
        host.write(f"etc/ssl/{target}/journal-{kind}.pem", (keys / f"{host.name}.{source}").read_text())
    (host.root / f"etc/ssl/journal/journal-{kind}.pem").chmod(0o600)
    host.write("etc/ssl/ca/journal.pem", (keys / "ca.pem").read_text())
    host.write("etc/hosts", "127.0.0.1 localhost\n10.99.0.1 collector\n")
    host.write("etc/systemd/journald.conf.d/cnprocd.conf", (RECIPE / "journald.conf").read_text())
    host.write("etc/systemd/journald.conf.d/test.conf", "[Journal]\nAudit=no\nReadKMsg=no\n")


def start(host: Host) -> None:
    """Start journald and the agent, as at a boot."""
    host.write("run/systemd/journal/flushed", "")  # as systemd-journal-flush.service: /var is there
    host.start("journald", "/usr/lib/systemd/systemd-journald")
    until(f"journald of {host.name}", (host.root / "run/systemd/journal/socket").exists)
    host.start("upload", UPLOAD, "--save-state")


def start_rsyslog(host: Host) -> None:
    """Start journald and rsyslogd, as at a boot."""
    host.write("run/systemd/journal/flushed", "")
    if "journald" not in host.services:
        host.start("journald", "/usr/lib/systemd/systemd-journald")
        until(f"journald of {host.name}", (host.root / "run/systemd/journal/socket").exists)
    text = (RECIPE / "rsyslog-sender.conf").read_text().replace("collector.example", "collector")
    host.write("etc/rsyslog-fleet.conf", f'global(workDirectory="/var/lib/rsyslog")\n{text}')
    host.start("upload", "/usr/sbin/rsyslogd", "-n", "-i", "/run/rsyslogd.pid", "-f", "/etc/rsyslog-fleet.conf")


def received_by_rsyslog(collector: Host) -> list[str]:
    """Return the match ids in the collector's file, in order."""
    file = collector.root / "var/log/cnprocd-fleet.json"
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, KeyError):
            found.append(json.loads(line)["CNPROCD_MATCH_ID"])
    return found


def received(collector: Host, program: list[str]) -> list[str]:
    """Return the match ids that a program prints on the collector, in order."""
    lines = run(*collector.command(*program)).splitlines()
    found = (json.loads(line) for line in lines)
    return [one.get("CNPROCD_MATCH_ID") or one["match_id"] for one in found]


RAW = ["journalctl", "-q", "--directory=/var/log/journal/remote", "-o", "json", "--all", "CNPROCD_EVENT=rule_matched"]


def disturb(
    hosts: list[Host], senders: list[Sender], collector: Host, start: Callable[[Host], None], log: Path
) -> list[str]:
    """Do everything that must lose nothing. Return what was done."""
    first, second, third = hosts
    done = []
    first.cut()
    time.sleep(2)
    second.services["upload"].kill()
    time.sleep(2)
    collector.services["remote"].kill()
    time.sleep(CUT_S - 4)
    first.join()
    done += [f"{first.name} cut for {CUT_S:g} s", f"agent of {second.name} killed", "receiver killed"]
    filler = log / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(b"\0" * (1 << 20))
                file.flush()
        except OSError:
            time.sleep(FULL_S)
    filler.unlink()
    done.append(f"disk of the collector full for {FULL_S:g} s")
    senders[2].may_send.clear()
    third.stop_all()
    start(third)
    senders[2].may_send.set()
    done.append(f"{third.name} restarted")
    second.cut()
    first.services["upload"].kill()
    time.sleep(5)
    second.join()
    return [*done, f"{second.name} cut for 5 s", f"agent of {first.name} killed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=2500, help="records of each host (2500)")
    parser.add_argument("--rsyslog", action="store_true", help="measure rsyslog instead")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("make test-fleet needs root: sudo make test-fleet")
    image = image_module()
    tree = tree_of(ROOT / ".fleet", PACKAGES, image.host_apt_options(), image.host_mirror())
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cnprocd-fleet-")))
        network = Network(f"cnf{os.getpid() % 100_000}")
        stack.callback(network.close)
        names = ["collector", "db1", "db2", "db3"]
        machines = []
        for number, name in enumerate(names, start=1):
            machines.append(Host(name, number, network, tree, scratch))
            stack.callback(machines[-1].close)
        collector, *hosts = machines
        keys = scratch / "keys"
        keys.mkdir()
        certificates(keys, names)
        if options.rsyslog:
            measure_rsyslog(collector, hosts, keys, options.records)
        else:
            sys.exit(measure(collector, hosts, keys, options.records, began))


def measure_rsyslog(collector: Host, hosts: list[Host], keys: Path, count: int) -> None:
    """Print what rsyslog loses."""
    log = collector.root / "var/log"
    run("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", log)
    collector.write("etc/rsyslog-fleet.conf", (RECIPE / "rsyslog-collector.conf").read_text())
    collector.start("remote", "/usr/sbin/rsyslogd", "-n", "-i", "/run/rsyslogd.pid", "-f", "/etc/rsyslog-fleet.conf")
    for host in hosts:
        install(host, "upload", keys)
        start_rsyslog(host)
    senders = [Sender(host, count) for host in hosts]
    for sender in senders:
        sender.start()
    print("; ".join(disturb(hosts, senders, collector, start_rsyslog, log)))
    for sender in senders:
        sender.join()
    patience, before = time.monotonic() + 30, -1
    while len(received_by_rsyslog(collector)) != before or time.monotonic() < patience:
        before = len(received_by_rsyslog(collector))
        time.sleep(10)
    found = Counter(received_by_rsyslog(collector))
    for sender in senders:
        lost = [match_id for match_id in sender.sent if match_id not in found]
        doubled = sum(found[match_id] - 1 for match_id in sender.sent if match_id in found)
        print(f"rsyslog, {sender.host_name}: sent {len(sender.sent)}, doubled {doubled}, lost {len(lost)}")


def measure(collector: Host, hosts: list[Host], keys: Path, count: int, began: float) -> int:
    remote = collector.root / "var/log/journal/remote"
    remote.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", remote)
    install(collector, "remote", keys)
    shutil.copy(RECIPE / "fleet-matches", collector.root / "usr/local/bin/fleet-matches")
    collector.start("remote", REMOTE, "--listen-https=19532", "--output=/var/log/journal/remote/")
    for host in hosts:
        install(host, "upload", keys)
        start(host)
    senders = [Sender(host, count) for host in hosts]
    for sender in senders:
        sender.start()
    done = disturb(hosts, senders, collector, start, remote)
    for sender in senders:
        sender.join()
    sent = {match_id for sender in senders for match_id in sender.sent}
    patience = time.monotonic() + 120
    found = received(collector, RAW)
    while sent - set(found) and time.monotonic() < patience:
        time.sleep(2)
        found = received(collector, RAW)
    printed = received(collector, ["fleet-matches"])
    doubled = sum(n - 1 for n in Counter(found).values())
    lost = len(sent - set(found))
    print("; ".join(done))
    starts = {host.name: host.services["upload"].starts for host in hosts}
    print(f"starts of the agents: {starts}, of the receiver: {collector.services['remote'].starts}")
    twice, took_s = len(printed) - len(set(printed)), time.monotonic() - began
    print(f"sent {len(sent)}, received {len(found)}, doubled {doubled}, lost {lost}")
    print(f"fleet-matches printed {len(printed)}, {twice} of them twice; {took_s:.0f} s")
    if lost or set(printed) != sent or len(printed) != len(sent):
        for host in hosts:
            print(f"--- {host.name}\n{host.log('upload')[-1500:]}")
        print(f"--- collector\n{collector.log('remote')[-3000:]}")
        return 1
    return 0


def image_module() -> ModuleType:
    """Return tests/vm/image.py, which knows this machine's Debian archive."""
    spec = importlib.util.spec_from_file_location("image", ROOT / "tests/vm/image.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["image"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()

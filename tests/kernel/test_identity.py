"""Identity: every match key against real processes, compared with the values of the kernel."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kernel.harness import child, exit_thread, rename, running, wait_status

RULES = """
rules:
  - {{name: exe, events: [nonzero_exit], match: {{exe: {program}}}}}
  - {{name: exe-glob, events: [nonzero_exit], match: {{exe: "{directory}/*"}}}}
  - {{name: cmdline, events: [nonzero_exit], match: {{cmdline: "*cnptest-argument*"}}}}
  - {{name: cgroup, events: [nonzero_exit], match: {{cgroup: "*/cnptest.service", comm: "cnptest-*"}}}}
  - {{name: unit, events: [nonzero_exit], match: {{unit: cnptest.service}}}}
  - {{name: parent, events: [nonzero_exit], match: {{parent: {{comm: cnptest-top}}, comm: "cnptest-*"}}}}
  - {{name: ancestor, events: [nonzero_exit], match: {{ancestor: {{comm: cnptest-top}}, comm: "cnptest-*"}}}}
  - {{name: young, events: [nonzero_exit], match: {{comm: cnptest-age, lifetime: "< 100ms"}}}}
  - {{name: old, events: [nonzero_exit], match: {{comm: cnptest-age, lifetime: ">= 100ms"}}}}
  - {{name: big, events: [nonzero_exit], match: {{comm: cnptest-mem, max_rss: "> 100M"}}}}
  - {{name: busy, events: [nonzero_exit], match: {{comm: cnptest-cpu, cpu_time: "> 50ms"}}}}
  - {{name: thread, events: [exit], threads: true, match: {{comm: cnptest-thr}}}}
$MARKER
"""


@pytest.fixture(scope="module", params=[[], ["--refuse=event_mask"]], ids=["this", "no-event-mask"])
def daemon(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cnprocd")
    program = Path(shutil.copy("/bin/sleep", directory / "cnptest-program"))
    rules = RULES.format(program=program, directory=directory)
    with running(directory, rules, *request.param) as daemon:
        daemon.program = program
        yield daemon


def names(daemon, pid):
    daemon.mark()
    return sorted(record["rule"] for record in daemon.matches(pid=pid))


def test_exe_and_cmdline_are_known_after_death(daemon):
    process = subprocess.Popen([daemon.program, "cnptest-argument"], stderr=subprocess.DEVNULL, preexec_fn=None)
    process.wait()  # it fails at once: the argument is not a number
    record = killed_sleeper(daemon)
    for _ in range(5):  # a read of /proc is given up after 50 ms, which an emulated machine may take
        if record["cmdline"] is None and any(one["event"] == "proc_unreadable" for one in daemon.records):
            record = killed_sleeper(daemon)
    assert (record["exe"], record["cmdline"]) == (str(daemon.program), f"{daemon.program} 60 0 -- 0")


def killed_sleeper(daemon):
    process = subprocess.Popen([daemon.program, "60", "0", "--", "0"])
    while Path(f"/proc/{process.pid}/comm").read_text() != "cnptest-program\n":
        pass
    daemon.mark()
    process.kill()
    process.wait()
    assert names(daemon, process.pid) == ["exe", "exe-glob"]
    (record,) = daemon.matches("exe", pid=process.pid)
    return record


def test_cmdline(daemon):
    code = "import sys; sys.stdin.read(); sys.exit(1)"
    process = subprocess.Popen([sys.executable, "-IS", "-c", code, "cnptest-argument"], stdin=subprocess.PIPE)
    daemon.mark()
    process.communicate()
    assert "cmdline" in names(daemon, process.pid)


def test_cgroup_and_unit(daemon):
    hierarchy = next(
        (path for path in map(Path, ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"))
         if (path / "cgroup.procs").exists()), None,
    )  # fmt: skip
    if hierarchy is None:
        pytest.skip("no cgroup hierarchy that systemd would use is mounted")
    group = hierarchy / "cnptest.service"
    group.mkdir()
    try:
        script = f'echo $$ > {group}/cgroup.procs; exec -a cnptest-unit sh -c "read line; exit 1"'
        process = subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE)
        while str(process.pid) not in (group / "cgroup.procs").read_text().split():
            pass
        while Path(f"/proc/{process.pid}/comm").read_text() != "sh\n":
            pass
        daemon.mark()
        process.communicate()
        assert names(daemon, process.pid) == ["unit"]
        (record,) = daemon.matches("unit", pid=process.pid)
        assert (record["unit"], record["cgroup"]) == ("cnptest.service", "/cnptest.service")
    finally:
        group.rmdir()


def test_parent_and_ancestor(daemon):
    read, write = os.pipe()

    def below(depth):
        def body():
            rename(f"cnptest-{depth}")
            if depth < 3:
                os.waitpid(child(below(depth + 1)), 0)
            os.write(write, f"{os.getpid()}\n".encode())
            os._exit(1)

        return body

    top = child(lambda: (rename("cnptest-top"), os.waitpid(child(below(1)), 0), os._exit(0)))
    wait_status(top)
    third, second, first = map(int, os.read(read, 100).split())
    assert names(daemon, first) == ["ancestor", "parent"]
    assert names(daemon, second) == names(daemon, third) == ["ancestor"]


def test_lifetime(daemon):
    young = child(lambda: (rename("cnptest-age"), os._exit(1)))
    wait_status(young)
    gate = threading.Event()
    old = child(lambda: (rename("cnptest-age"), gate.wait(0.2), os._exit(1)))
    wait_status(old)
    assert (names(daemon, young), names(daemon, old)) == (["young"], ["old"])


def test_memory_and_cpu_time(daemon):
    def use_memory():
        rename("cnptest-mem")
        os._exit(len(bytearray(150 << 20)) and 1)

    def use_cpu():
        rename("cnptest-cpu")
        while sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) < 0.1:
            pass
        os._exit(1)

    fat, hot = child(use_memory), child(use_cpu)
    _, _, fat_usage = os.wait4(fat, 0)
    _, _, hot_usage = os.wait4(hot, 0)
    assert (names(daemon, fat), names(daemon, hot)) == (["big"], ["busy"])
    (fat_record,), (hot_record,) = daemon.matches(pid=fat), daemon.matches(pid=hot)
    assert fat_record["max_rss_kib"] == pytest.approx(fat_usage.ru_maxrss, rel=0.05)
    # the kernel accounts by ticks of up to 10 ms
    assert hot_record["cpu_time_ms"] == pytest.approx(1000 * (hot_usage.ru_utime + hot_usage.ru_stime), rel=0.5)


def test_threads_are_seen_by_a_rule_that_asks(daemon):
    def body():
        def one():
            rename("cnptest-thr")
            exit_thread(4)

        thread = threading.Thread(target=one)
        thread.start()
        while os.path.exists(f"/proc/self/task/{thread.native_id}"):
            pass
        os._exit(0)

    pid = child(body)
    wait_status(pid)
    daemon.mark_burst()
    (record,) = daemon.matches("thread", pid=pid)
    assert (record["exit_code"], record["comm"], record["tid"] != pid) == (4, "cnptest-thr", True)

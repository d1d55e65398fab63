"""`cnprocctl -H`: words, hosts, statuses and labels. `ssh` is a script that gives its last word to sh, as sshd does.

tests/fleet/remote_ssh.py does it with a real sshd.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cnprocd.cli import cnprocctl
from cnprocd.cli.remote import Host, command, host_of, split
from cnprocd.errors import CnprocdError

SSH = """#!/bin/sh
# The destination is the word after --, the command the one after that.
echo "$@" >> "$0.log"
while [ "$1" != -- ]; do shift; done
case $2 in (*unreachable) echo "ssh: no route" >&2; exit 255;; esac
PATH=$REMOTE_PATH:/usr/bin:/bin REMOTE_NAME=$2 exec sh -c "$3"
"""
CNPROCCTL = """#!/bin/sh
case $* in (*document*);; (*) for word; do printf '<%s>' "$word"; done; echo;; esac
case $* in
*lines*) echo one; echo two >&2; exit 3;;
*document*) printf '{\\n "a":\\n 1}\\n{"b": 2}\\n'; exit 0;;
*forever*) echo $$ > "$0.$REMOTE_NAME.pid"; cat > /dev/null; echo end > "$0.$REMOTE_NAME.end";;
*-) cat;;
esac
"""


@pytest.fixture
def there(tmp_path):
    """A directory with `ssh` for this side, and one with `cnprocctl` for the other."""
    for name, text in (("here/ssh", SSH), ("there/cnprocctl", CNPROCCTL)):
        file = tmp_path / name
        file.parent.mkdir()
        file.write_text(text)
        file.chmod(0o755)
    return tmp_path


def environment(there):
    return {**os.environ, "PATH": f"{there}/here:{os.environ['PATH']}", "REMOTE_PATH": f"{there}/there"}


def run(there, *words, text=None):
    """Run remote.run() on the words, without the local check of the verb. Return (status, out, err)."""
    program = "import sys; from cnprocd.cli.remote import run, split; hosts, rest = split(sys.argv[1:]);"
    program += "sys.exit(run(hosts, rest, as_json='--json' in rest))"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment(there), input=text, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("text", "destination", "port"),
    [
        ("db1", "db1", None),
        ("root@db1", "root@db1", None),
        ("root@db1.example:2222", "root@db1.example", "2222"),
        ("[2001:db8::1]:22", "2001:db8::1", "22"),
        ("root@[fe80::1%eth0]", "root@fe80::1%eth0", None),
    ],
)
def test_a_host_is_taken_apart(text, destination, port):
    assert host_of(text) == Host(text, destination, port)


@pytest.mark.parametrize("text", ["", "-oProxyCommand=x", "a@-b", "a b", "db1:", "db1:ssh", "::1", "a@b@c"])
def test_what_ssh_could_take_for_an_option_is_refused(text):
    with pytest.raises(CnprocdError, match="invalid host"):
        host_of(text)


@pytest.mark.parametrize(
    "text", ["a;id", "$(id)", "a'b", 'a"b', "`id`", "a|b", "a&b", "a\\b", "u;x@h", "a<b", "(a)", "{a,b}"]
)
def test_a_host_with_characters_of_a_shell_is_refused(text):
    """A ProxyCommand or Match exec of the user's ssh_config gives %h and %r to a shell."""
    with pytest.raises(CnprocdError, match="invalid host"):
        host_of(text)


@pytest.mark.parametrize("text", ["a:0", "a:65536", "a:999999999999"])
def test_a_port_that_none_can_have_is_refused(text):
    with pytest.raises(CnprocdError, match="invalid host"):
        host_of(text)


def test_an_invalid_host_is_shown_without_control_characters():
    with pytest.raises(CnprocdError) as caught:
        host_of("a\n\x1b[31mb")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "words", [["history", "-fH", "db1"], ["history", "-fHdb1"], ["status", "--hos", "db1"], ["status", "--hos=db1"]]
)
def test_no_spelling_of_a_host_lets_the_verb_run_here(words, capsys):
    """argparse takes them for -H. The verb would run on this machine, and `jobs drop` would drop a job of this one."""
    assert cnprocctl.run(words) == 2
    out, err = capsys.readouterr()
    assert (out, "write -H HOST" in err) == ("", True)


def test_hosts_are_taken_out_wherever_they_stand():
    hosts, rest = split(["-H", "a", "status", "-Hb", "--host=c", "--json", "--host", "d", "--", "-H", "e"])
    assert [host.name for host in hosts] == ["a", "b", "c", "d"]
    assert rest == ["status", "--json", "--", "-H", "e"]


WORDS = ["test", "--comm", 'it\'s $(id) `id`\n\\ "x"', "", "*", "--cmdline=a  b"]


def test_words_arrive_on_the_other_side_as_they_were(there):
    status, out, err = run(there, "-H", "db1", *WORDS)
    expected = "".join(f"<{word}>" for word in ["--until-eof", *WORDS])
    assert (status, out, err) == (0, expected + "\n", "")


def test_port_and_destination_are_for_ssh(there):
    assert command(Host("u@h:2", "u@h", "2"), ["status"], reads_input=False)[:-1] == [
        "ssh", "-x", "-T", "-e", "none", "-p", "2", "--", "u@h",
    ]  # fmt: skip


def test_the_status_is_that_of_the_command(there):
    assert run(there, "-H", "db1", "lines")[0] == 3


def test_a_failure_of_ssh_is_told_from_one_of_the_command(there):
    status, _, err = run(there, "-H", "unreachable", "lines")
    assert status == 255
    assert err == (
        "ssh: no route\n"
        "cnprocctl: cannot run cnprocctl on unreachable: ssh failed: its message is above; try `ssh` by hand\n"
    )


def test_a_host_without_cnprocctl_is_reported(there):
    (there / "there" / "cnprocctl").unlink()
    status, _, err = run(there, "-H", "db1", "status")
    assert (status, "cnprocctl is not installed there" in err) == (127, True)


def test_lines_of_several_hosts_are_labelled(there):
    status, out, err = run(there, "-H", "a", "-H", "u@b:5", "-H", "unreachable", "lines")
    assert status == 3
    assert sorted(out.splitlines()) == [
        "a: <--until-eof><lines>", "a: one", "u@b:5: <--until-eof><lines>", "u@b:5: one",
    ]  # fmt: skip
    assert {"a: two", "u@b:5: two", "unreachable: ssh: no route"} <= set(err.splitlines())


def test_json_of_several_hosts_is_one_line_a_document(there):
    status, out, _ = run(there, "-H", "a", "-H", "b", "--json", "document")
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [one["data"] for one in found if one["host"] == "b"] == [{"a": 1}, {"b": 2}]
    assert len(found) == 4


def test_standard_input_goes_to_every_host(there):
    assert run(there, "-H", "a", "check", "-", text="rules: []\n") == (0, "<check><->\nrules: []\n", "")
    status, out, _ = run(there, "-H", "a", "-H", "b", "check", "-", text="rules: []\n")
    assert (status, sorted(out.splitlines())) == (
        0,
        ["a: <check><->", "a: rules: []", "b: <check><->", "b: rules: []"],
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_other_side_ends_with_this_one(there, number):
    """However this side ends, standard input of the command over there ends as well."""
    pids = [there / "there" / f"cnprocctl.{name}.pid" for name in "ab"]
    program = "from cnprocd.cli.remote import run, split; run(*split(['-H', 'a', '-H', 'b', 'forever']), as_json=False)"
    local = subprocess.Popen(
        [sys.executable, "-c", program], env=environment(there), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until(lambda: all(file.exists() and file.read_text().strip() for file in pids))
    assert local.poll() is None
    local.send_signal(number)
    local.wait(30)
    until(lambda: not any(alive(int(file.read_text())) for file in pids))


def until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_until_eof_ends_a_command_with_its_input(tmp_path):
    program = "import time; from cnprocd.cli.remote import end_with_input; end_with_input(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        process.stdin.close()
        assert process.wait(30) == -signal.SIGTERM

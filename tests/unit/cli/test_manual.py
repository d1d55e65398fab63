"""Derived files have not drifted from the code, and a shell completes what the parser accepts."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cnprocd.cli.command_line import parser
from cnprocd.cli.grammar import VERBS

ROOT = Path(__file__).parents[3]
PACKAGING = ROOT / "packaging"


def module():
    sys.path.insert(0, str(PACKAGING))
    try:
        spec = importlib.util.spec_from_file_location("manual", PACKAGING / "manual.py")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found
    finally:
        sys.path.remove(str(PACKAGING))


MADE = dict(module().made())


@pytest.mark.parametrize("path", MADE)
def test_what_is_derived_has_not_drifted(path):
    assert (ROOT / path).read_text() == MADE[path], "run: python packaging/manual.py"


def test_no_placeholder_is_left():
    assert not [line for text in MADE.values() for line in text.splitlines() if line.startswith("@")]


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize(
    "page", ["cnprocd.8", "cnprocctl.1", "cnprocd-rules.yaml.5", "cnprocd-fields.7", "cnprocd-runner.8"]
)
def test_a_page_renders_without_a_warning(page):
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-z", PACKAGING / "man" / page], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_is_in_the_manual_and_has_help(verb, capsys):
    assert f".SS {verb}\n" in (PACKAGING / "man" / "cnprocctl.1").read_text()
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([*verb.split(), "--help"])
    assert ended.value.code == 0
    assert "usage: cnprocctl" in capsys.readouterr().out


# What cnprocctl answers to a completion.
ANSWERS = """cnprocctl() { case "$1 $2 $*" in
    "rules list"*) printf 'RULE STATE\\noracle-died enabled\\ncore enabled\\n' ;;
    "jobs list"*dead*) printf 'JOB STATE\\n7 dead\\n' ;;
    "jobs list"*) printf 'JOB STATE\\n8 done\\n7 dead\\n' ;;
esac; }"""


def complete(*words):
    """Return what bash offers after these words."""
    script = PACKAGING / "completions" / "cnprocctl.bash"
    quoted = " ".join(f"'{word}'" for word in words)
    line = f"{ANSWERS}; source {script}; COMP_WORDS=(cnprocctl {quoted}); COMP_CWORD={len(words)}; _cnprocctl"
    done = subprocess.run(["bash", "-c", line + '; echo "${COMPREPLY[@]}"'], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_verbs_subverbs_options_and_values():
    assert {verb.name.split()[0] for verb in VERBS} <= set(complete(""))
    assert complete("sta") == ["status"]
    assert complete("--rules", "/etc/x", "rel") == ["reload"]
    assert complete("jobs", "re") == ["retry"]
    assert complete("jobs", "list", "--state", "d") == ["done", "dead"]
    assert complete("test", "--kind", "non") == ["nonzero_exit"]
    assert complete("test", "--life") == ["--lifetime"]
    assert complete("help", "rul") == ["rules"]
    assert (
        complete("help", "rules", "") == complete("rules", "") == ["list", "show", "enable", "disable", "read", "write"]
    )
    assert complete("help", "dis") == complete("help", "status", "") == []
    assert complete("-o", "") == ["table", "json"]
    assert {"-n", "--limit", "-f", "--follow", "--until", "-o", "--json"} <= set(complete("history", "-"))


def test_bash_completes_rules_jobs_users_and_signals():
    for words in (
        ["rules", "show"],
        ["rules", "disable"],
        ["explain"],
        ["history", "--rule"],
        ["jobs", "retry", "--rule"],
    ):
        assert complete(*words, "ora") == ["oracle-died"]
    assert complete("rules", "enable", "core", "") == ["oracle-died", "core"]
    assert complete("jobs", "show", "") == complete("explain", "--job", "") == ["8", "7"]
    assert complete("jobs", "retry", "") == ["7"]
    assert "root" in complete("history", "--user", "ro")
    assert "root" in complete("test", "--group", "ro")
    assert complete("test", "--signal", "SIGK") == ["SIGKILL"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_rules_jobs_users_and_signals():
    def offered(line):
        answers = "function cnprocctl; switch \"$argv\"; case 'rules list*'; printf 'RULE\\noracle-died\\n'; "
        answers += "case 'jobs list*dead*'; printf 'JOB\\n7\\n'; case 'jobs list*'; printf 'JOB\\n8\\n7\\n'; end; end"
        script = f"{answers}; source {PACKAGING}/completions/cnprocctl.fish; complete -C '{line}'"
        done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True)
        assert done.stderr == ""
        return [one.partition("\t")[0] for one in done.stdout.splitlines()]

    assert offered("cnprocctl sta") == ["status"]
    assert "kill" in offered("cnprocctl jobs k")
    assert offered("cnprocctl rules show ora") == ["oracle-died"]
    assert sorted(offered("cnprocctl jobs show ")) == ["7", "8"]
    assert offered("cnprocctl jobs retry ") == ["7"]
    assert "root" in offered("cnprocctl history --user ro")
    assert offered("cnprocctl test --signal SIGKI") == ["SIGKILL"]
    assert offered("cnprocctl help rules s") == ["show"]
    assert sorted(offered("cnprocctl -o ")) == ["json", "table"]
    assert sorted(offered("cnprocctl jobs list --state d")) == ["dead", "done"]


@pytest.mark.parametrize(("shell", "file"), [("zsh", "_cnprocctl"), ("fish", "cnprocctl.fish")])
def test_the_other_shells_can_read_theirs(shell, file):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", PACKAGING / "completions" / file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

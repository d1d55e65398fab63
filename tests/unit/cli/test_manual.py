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


def complete(*words):
    """Return what bash offers after these words."""
    script = PACKAGING / "completions" / "cnprocctl.bash"
    quoted = " ".join(f"'{word}'" for word in words)
    line = f"source {script}; COMP_WORDS=(cnprocctl {quoted}); COMP_CWORD={len(words)}; _cnprocctl"
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


@pytest.mark.parametrize(("shell", "file"), [("zsh", "_cnprocctl"), ("fish", "cnprocctl.fish")])
def test_the_other_shells_can_read_theirs(shell, file):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", PACKAGING / "completions" / file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

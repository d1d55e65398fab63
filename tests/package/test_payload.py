"""The files of each package, run: its commands under the Python of its distribution, and under aarch64 emulation.

An interpreter is taken from PATH or from pyenv. Without one, or on another machine without an emulator, a test is
skipped and names what is missing.
"""

from __future__ import annotations

import json
import subprocess

import pytest
from package.built import SELF_CONTAINED, flavours, interpreter, runs_here

CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import pydantic, pydantic_core, structlog, yaml, sdnotify
found = [module.__file__ for module in (pydantic, pydantic_core, structlog, yaml, sdnotify)]
outside = [file for file in found if not file.startswith(sys.argv[1])]
assert not outside, outside
from cnprocd.cli.{program} import main
sys.argv = ["{program}", *sys.argv[2:]]
sys.exit(main())
"""
native = pytest.mark.parametrize("package", [name for name in SELF_CONTAINED if runs_here(name)], indirect=True)


def run(python, tree, program, *arguments):
    """Run a command of the package in an interpreter that sees the package and its standard library only (-I -S)."""
    path = str(tree / flavours.PRIVATE)
    command = [python, "-I", "-S", "-c", CHECK.format(program=program), path, *arguments]
    environ = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, capture_output=True, text=True, env=environ)


@pytest.fixture
def python(package):
    found = interpreter(package.flavour.python)
    if found is None:
        pytest.skip(f"no Python {package.flavour.python} here")
    return found


@native
def test_the_commands_run_on_the_packages_files_alone(package, python, tree, record_property):
    """Both `check` verbs read the shipped rules and every example; the loader process starts from the package too."""
    rules = tree / "etc/cnprocd/rules.yaml"
    done = run(python, tree, "cnprocd", "--check", "--rules", str(rules))
    assert done.returncode == 0, done.stdout + done.stderr
    examples = sorted(map(str, (tree / "usr/share/doc/cnprocd/examples").glob("*.yaml")))
    done = run(python, tree, "cnprocctl", "check", "--other-host", *examples)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(python, tree, "cnprocctl", "test", "--rules", str(rules), "--comm", "x", "--exit-code", "3", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)
    record_property("ran", f"commands on Python {package.flavour.python}")


@native
def test_a_wrong_rule_file_is_refused_with_its_place(package, python, tree, tmp_path):
    wrong = tree / "wrong.yaml"
    wrong.write_text("rules:\n  - name: x\n    events: [nonzero_exits]\n")
    done = run(python, tree, "cnprocd", "--check", "--rules", str(wrong))
    assert done.returncode == 78, done.stdout + done.stderr
    assert "wrong.yaml:3:14" in done.stdout + done.stderr

"""`make test-pythons`: run the unit tests under every Python that the packages use, where one can be had.

Interpreters come from PATH or pyenv. Each gets an environment in .pythons/ with today's newest dependencies. A version
without an interpreter is reported, and fails nothing. Style and instruction counts are left out: they are measured with
one version. Exit status 1 if a test failed under any version.

    python tests/pythons.py [--python 3.12 ...] [PYTEST ARGUMENTS]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from package.built import ROOT, interpreter

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
LEFT_OUT = ("tests/unit/test_lint.py", "tests/unit/test_instruction_guard.py")


def environment(version: str, python: Path) -> Path:
    """Return the interpreter of the environment for this version. Make the environment if it is missing."""
    made = ROOT / ".pythons" / version / "bin/python"
    if not made.exists():
        subprocess.run([python, "-m", "venv", str(made.parents[1])], check=True)
        pip = [
            str(made),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--editable",
            f"{ROOT}[dev]",
        ]
        subprocess.run(pip, check=True)
    return made


def unit_tests(python: Path, arguments: list[str]) -> tuple[bool, str]:
    """Run the unit tests. Return whether they passed, and pytest's last line."""
    files = arguments or ["tests/unit", *(f"--ignore={name}" for name in LEFT_OUT)]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as pytest:
        assert pytest.stdout is not None
        last = ""
        for line in pytest.stdout:
            sys.stdout.write(line)
            last = line.strip() or last
    return pytest.returncode == 0, last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", choices=VERSIONS, help="default: all")
    parser.add_argument("arguments", nargs="*", help="arguments of pytest; default: all unit tests")
    options = parser.parse_args()
    results, failed = [], False
    for version in options.python or VERSIONS:
        found = interpreter(version)
        if found is None:
            results.append((version, "no interpreter here"))
            continue
        ok, last = unit_tests(environment(version, found), options.arguments)
        failed |= not ok
        results.append((version, last))
    for version, last in results:
        sys.stdout.write(f"Python {version}: {last}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

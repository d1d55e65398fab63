"""Programs that are started without standard input, output or error."""

from __future__ import annotations

import subprocess
import sys

import pytest

REPORT = (
    "import os; from cnprocd.cli.standard_files import fill_missing; missing = fill_missing();"
    "fd = os.open('/dev/null', os.O_RDONLY); os.write(FD, repr((sorted(missing), fd > 2)).encode())"
)


@pytest.mark.parametrize("closed", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_missing_standard_files_are_filled(closed, tmp_path):
    """So that the next file gets none of these numbers."""
    out = tmp_path / "out"
    shell = f'exec 9>{out}; exec {" ".join(f"{fd}>&-" for fd in closed)} {sys.executable} -c "{REPORT}"'
    subprocess.run(["sh", "-c", shell.replace("FD", "9")], check=True)
    assert out.read_text() == repr((list(closed), True))


@pytest.mark.parametrize("program", ["cnprocd", "runner"])
@pytest.mark.parametrize("closed", ["1>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_a_closed_output_is_a_clean_error(program, closed, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: []\n")
    command = f"{sys.executable} -m cnprocd.cli.{program} --rules {rules} {closed}"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 71
    assert "Traceback" not in done.stderr
    if "2" not in closed:
        assert len(done.stderr.splitlines()) == 1

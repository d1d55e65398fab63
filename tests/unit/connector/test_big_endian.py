"""The decoders and the socket filter on a big-endian machine: their own tests, with byte-swapped fixtures."""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FILES = ("decode", "sequence", "taskrecord", "filter")
# Left out: it compares a whole batch by memoryview.cast, which the plugin does not swap.
NATIVE = "not whole_batch"


def test_decoders_read_what_a_big_endian_kernel_writes():
    files = [str(HERE / f"test_{name}.py") for name in FILES]
    options = ["-q", "-p", "no:cacheprovider", "-p", "unit.connector.big_endian", "-k", NATIVE]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "tests"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 90


def test_the_plugin_swaps_bytes():
    program = "import sys, struct; print(struct.pack('=I', 1), struct.Struct('=H').pack(1), sys.byteorder)"
    command = [sys.executable, "-c", f"import unit.connector.big_endian; {program}"]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, env={"PYTHONPATH": f"{ROOT}"})
    assert done.stdout.split() == [str(b"\0\0\0\1"), str(b"\0\1"), "big"], done.stderr

"""wrong_clock.py FILE MODULE OPTION...: run a program with a wall clock that is wrong by the seconds in a file.

CLOCK_REALTIME belongs to the whole machine, and a time namespace does not cover it. So `time.time` and `time.time_ns`
of this process read the file at each call. A step of the real clock is tested in the virtual machine (`make test-vm`).
"""

import runpy
import sys
import time
from pathlib import Path

file = Path(sys.argv[1])
real_time, real_time_ns = time.time, time.time_ns
time.time = lambda: real_time() + int(file.read_text())
time.time_ns = lambda: real_time_ns() + int(file.read_text()) * 1_000_000_000
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

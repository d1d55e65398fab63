"""One hypothesis profile and one SIGINT for all tests.

The profile is moderate and without time limits, because the machine may be busy.

In CI the examples are the same in every run, so that only a change can break it. Elsewhere they are new in every run,
which finds rare histories. Every finding becomes a test of its own.

A shell starts background commands with SIGINT ignored, and programs inherit that: a test that sends it would wait for
ever.
"""

import os
import signal

from hypothesis import HealthCheck, settings

settings.register_profile(
    "cnprocd",
    max_examples=60,
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("cnprocd")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

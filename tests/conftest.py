"""One hypothesis profile for all tests: moderate, without time limits, because the machine may be busy.

In CI the examples are the same in every run, so that only a change can break it. Elsewhere they are new in every run,
which finds rare histories. Every finding becomes a test of its own.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "cnprocd",
    max_examples=60,
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("cnprocd")

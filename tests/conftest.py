"""One hypothesis profile for every test: moderate, and never judged by time, because the machine may be busy.

In CI the examples are the same every time: a change is judged by what it changes. Elsewhere they are new every time,
which is how a rare history is found; what was found becomes a test of its own.
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

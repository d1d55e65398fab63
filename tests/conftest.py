"""One hypothesis profile for every test: moderate, and never judged by time, because the machine may be busy."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "cnprocd", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("cnprocd")

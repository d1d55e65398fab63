"""Durations, sizes, counts and moments as a command line gives them.

Durations and moments take the forms of systemd.time(7) that administrators use. A function that argparse calls raises
argparse.ArgumentTypeError, whose text completes "cannot read --since: ".
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

NS = 1_000_000_000
MOST_RESULTS = 1000
_LONGEST_S = 100 * 31557600.0  # 100 years: a time that is so far off still has a date
_FARTHEST_S = 9.2e9  # from 1970; the control protocol has 64 bits for the nanoseconds

_UNITS = {
    0.000_001: ("us", "usec"),
    0.001: ("ms", "msec"),
    1.0: ("s", "sec", "second", "seconds"),
    60.0: ("m", "min", "minute", "minutes"),
    3600.0: ("h", "hr", "hour", "hours"),
    86400.0: ("d", "day", "days"),
    604800.0: ("w", "week", "weeks"),
    2629800.0: ("M", "month", "months"),  # 30.44 days, as in systemd.time(7)
    31557600.0: ("y", "year", "years"),
}
_SECONDS = {name: seconds for seconds, names in _UNITS.items() for name in names}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,9})?"
_SPAN = re.compile(rf"({_NUMBER})\s*([A-Za-z]+)\s*", re.ASCII)
_MOMENT = re.compile(
    r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*,?\s+)?"
    r"(?P<day>[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|today|yesterday|tomorrow)?"
    r"(?:(?:^|\s+|t)(?P<time>[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,9})?)?))?"
    r"\s*(?P<zone>z|utc|[+-][0-9]{2}:?[0-9]{2})?",
    re.ASCII | re.IGNORECASE,
)
_DAYS = {"today": 0, "yesterday": -1, "tomorrow": 1}
MOMENTS = 'now, today, yesterday, 22:00, "yesterday 22:00", 2026-11-25, "2026-11-25 22:00:15", -2h or "2h ago"'


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time in seconds since 1970. If `any_day`, only a time of day was given and the date is today's."""

    at_s: float
    any_day: bool = False


def seconds(value: str) -> float:
    """Return a duration in seconds: `30s`, `5m`, `1h 30min`, `250ms`; a bare number is seconds."""
    found = _duration(value)
    if found is None:
        raise argparse.ArgumentTypeError(f'invalid duration "{value}": expected 30s, 5m, 2h, 1d, "1h 30m" or 250ms')
    if found > _LONGEST_S:
        raise argparse.ArgumentTypeError(f'invalid duration "{value}": expected at most 100y')
    return found


def period(value: str) -> float:
    """Return a duration in seconds, of at least 0.1 s."""
    found = seconds(value)
    if found < 0.1:
        raise argparse.ArgumentTypeError(f'invalid duration "{value}": expected at least 100ms')
    return found


def _duration(value: str) -> float | None:
    text = value.strip()
    if re.fullmatch(_NUMBER, text, re.ASCII):
        return float(text)
    if not text or _SPAN.sub("", text):
        return None
    spans = _SPAN.findall(text)
    if any(unit not in _SECONDS for _, unit in spans):
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in spans)


def octets(value: str) -> int:
    """Return a size in bytes: `512K`, `16M`, `1G`, or a bare number of bytes."""
    unit = value[-1:].upper() if value[-1:].upper() in ("K", "M", "G") else ""
    number = value[: len(value) - len(unit)]
    if not (number.isascii() and number.isdigit()):
        raise argparse.ArgumentTypeError(f'invalid size "{value}": expected 512K, 16M or 1G')
    return int(number) * _BYTES[unit]


def number(value: str) -> int:
    """Return a whole number, which is not negative."""
    if not re.fullmatch(r"[0-9]{1,18}", value, re.ASCII):
        raise argparse.ArgumentTypeError(f'invalid number "{value}"')
    return int(value)


def count(value: str) -> int:
    """Return a whole number, which is not 0."""
    found = number(value)
    if found == 0:
        raise argparse.ArgumentTypeError(f'invalid number "{value}": expected at least 1')
    return found


def limit(value: str) -> int:
    """Return a number of results, from 1 to MOST_RESULTS."""
    if re.fullmatch(r"[0-9]{1,9}", value, re.ASCII) and 1 <= int(value) <= MOST_RESULTS:
        return int(value)
    raise argparse.ArgumentTypeError(f'invalid number of results "{value}": expected 1 to {MOST_RESULTS}')


def moment(value: str) -> Moment:
    """Return a point in time, relative to now where it is relative."""
    return moment_at(value, datetime.now())


def moment_at(value: str, now: datetime) -> Moment:
    """Return the point in time that `value` names. `now` is local time without a zone.

    Without a zone a time is local. A duration alone, with a leading `-`, or with `ago`, is counted back from now.
    """
    try:
        found = _relative(value.strip(), now) or _absolute(value.strip(), now)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f'invalid time "{value}": {error}') from error
    if found is None:
        raise argparse.ArgumentTypeError(f'invalid time "{value}": expected {MOMENTS}')
    if abs(found.at_s) > _FARTHEST_S:
        raise argparse.ArgumentTypeError(f'invalid time "{value}": expected a year before 2261')
    return found


def _relative(text: str, now: datetime) -> Moment | None:
    if text.lower() == "now":
        return Moment(now.timestamp())
    if re.fullmatch(rf"@{_NUMBER}", text, re.ASCII):
        return Moment(float(text[1:]))
    sign = 1 if text.startswith("+") else -1
    span = _duration(text.removesuffix(" ago").removeprefix("+" if sign == 1 else "-"))
    return None if span is None else Moment(now.timestamp() + sign * span)


def _absolute(text: str, now: datetime) -> Moment | None:
    parts = _MOMENT.fullmatch(text)
    if parts is None or not (parts["day"] or parts["time"]):
        return None
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if parts["day"] and parts["day"].lower() in _DAYS:
        midnight += timedelta(days=_DAYS[parts["day"].lower()])
    elif parts["day"]:
        midnight = datetime(*map(int, parts["day"].split("-")))  # type: ignore[arg-type]  # three numbers
    hours, minutes, rest = [*(parts["time"] or "0:0").split(":"), "0"][:3]
    whole, _, fraction = rest.partition(".")
    at = midnight.replace(
        hour=int(hours), minute=int(minutes), second=int(whole), microsecond=int(fraction[:6].ljust(6, "0"))
    )
    return Moment(at.replace(tzinfo=_zone(parts["zone"])).timestamp(), any_day=not parts["day"])


def _zone(text: str | None) -> timezone | None:
    if text is None:
        return None
    if text.lower() in ("z", "utc"):
        return UTC
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[-2:]))
    return timezone(-offset if text[0] == "-" else offset)


def window_ns(since: Moment | None, until: Moment | None, now_s: float) -> tuple[int, int | None]:
    """Return both ends of a window in nanoseconds since 1970; None where it is open.

    A time of day without a date is the last such time for `since`. For `until` it is the next one after such a `since`,
    else today's. So `--since 22:00 --until 06:00` is last night, at any time of the day.
    """
    since_s = since.at_s if since is not None else 0.0
    if since is not None and since.any_day and since_s > now_s:
        since_s = _other_day(since_s, -1)
    until_s = until.at_s if until is not None else None
    if since is not None and until is not None and since.any_day and until.any_day:
        days = [_other_day(until.at_s, shift) for shift in (-1, 0, 1)]
        until_s = next((day for day in days if day >= since_s), until.at_s)
    return int(since_s * NS), None if until_s is None else int(until_s * NS)


def _other_day(at_s: float, days: int) -> float:
    """Return the same local time on another day."""
    return (datetime.fromtimestamp(at_s) + timedelta(days=days)).timestamp()

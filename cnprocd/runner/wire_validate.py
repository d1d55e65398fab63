"""What the runner service lets through from the reader: exactly the frames of wire.py, or nothing. PURE.

The runner is root and the reader is not: a compromised one may send what it likes. So types are taken as they are
(no text becomes a number), unknown keys are refused, and the bounds are those that wire.py's classes hold.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from cnprocd.runner import wire

_FROM_READER: TypeAdapter[wire.FromReader] = TypeAdapter(Annotated[wire.FromReader, Field(discriminator="type")])


def from_reader(body: bytes) -> wire.FromReader:
    """What the reader said. Raises WireError."""
    try:
        return _FROM_READER.validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        raise wire.WireError(f"{'.'.join(map(str, found['loc']))}: {found['msg']}") from error

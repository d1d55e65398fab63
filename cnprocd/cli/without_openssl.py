"""Keep OpenSSL out of the daemon. Import it before everything that imports asyncio or hashlib.

asyncio imports ssl if there is one, and hashlib prefers OpenSSL's digests. This takes 4.7 MB, and the daemon never uses
it: both work without. None in sys.modules means that a module is not there ("The module cache" in the reference of
Python).
"""

import sys
from importlib.util import find_spec

# What hashlib has of its own: since Python 3.12, and before. Fedora builds its Python without.
if find_spec("_sha2") is not None or find_spec("_sha256") is not None:
    for _name in ("ssl", "_hashlib"):
        sys.modules.setdefault(_name, None)  # type: ignore[arg-type]

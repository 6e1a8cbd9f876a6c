"""Random seeds that are derived, not drawn: the same names give the same seed on every platform."""

from __future__ import annotations

import hashlib


def derived_seed(*names: object) -> int:
    """63 bits of the SHA-256 of `names`, joined as text: every seeding function used here takes that many."""
    text = "|".join(["ray_stateful seed 1", *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

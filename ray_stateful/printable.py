"""Text that others wrote, as it may be printed: names and values in a checkpoint are a stranger's. Pure."""

from __future__ import annotations

import re

# What moves the cursor, colours the screen, or turns the direction of what follows; and halves of characters.
_INSTRUCTIONS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "\n\t") -> str:
    """`text` with what would be an instruction to a terminal shown as text, but for the characters of `keep`."""
    return _INSTRUCTIONS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)

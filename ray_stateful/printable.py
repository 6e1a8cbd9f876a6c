"""Makes text that others wrote safe to print: names and values in a checkpoint come from strangers. Pure."""

from __future__ import annotations

import re

# Characters that move the cursor, colour the screen, or change the direction of text; and lone surrogates.
_INSTRUCTIONS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "\n\t") -> str:
    """`text` with each character that would be an instruction to a terminal escaped, except those in `keep`."""
    return _INSTRUCTIONS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)

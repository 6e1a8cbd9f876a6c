"""Links from a page to a file of the repository that is not part of the site.

On GitHub they are links. The site has no such page, so there it is the file's path in the repository. A link to a file
that is not there is a warning, and so an error, in both.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

# Not of images: those are copied to wherever the site is.
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#\s]+)(?:#[^)]*)?\)")


def rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    page, pages = Path(app.env.doc2path(docname)), Path(app.srcdir)

    def as_path(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / link["target"]))
        if target.is_relative_to(pages):
            return link[0]
        if not target.exists():
            logger.warning("no such file in the repository: %s", link["target"], location=docname)
        path = target.relative_to(pages.parent).as_posix()
        return link["text"] if path in link["text"] else f"{link['text']} (`{path}`)"

    source[0] = _LINK.sub(as_path, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True}

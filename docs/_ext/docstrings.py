"""The API reference: every public name of a module, from its `__all__`, by its docstring.

Docstrings here have Markdown's code blocks; autodoc reads reStructuredText, and is given those instead.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def with_code_blocks(lines: list[str]) -> list[str]:
    """`lines` with each fenced block as a `code-block`. Pure."""
    found, fence = [], None
    for line in lines:
        text = line.lstrip()
        indent = line[: len(line) - len(text)]
        if text.startswith("```") and fence is None:
            fence = indent
            found += ["", f"{indent}.. code-block:: {text[3:].strip() or 'text'}", ""]
        elif text.startswith("```"):
            fence = None
            found.append("")
        else:
            found.append(f"   {line}" if fence is not None and text else line)
    return found


def _rewrite(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = with_code_blocks(lines)


class PublicNames(SphinxDirective):
    """`{public-names} MODULE`: all of its `__all__`, or the names that stand in the directive's body."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        module = import_module(self.arguments[0])
        names = " ".join(self.content).split() or module.__all__
        lines = []
        for name in names:
            thing = getattr(module, name)
            kind = "class" if inspect.isclass(thing) else "function"
            kind = "exception" if inspect.isclass(thing) and issubclass(thing, BaseException) else kind
            lines += [f".. auto{kind}:: {module.__name__}.{name}"]
            lines += ["   :members:", "   :show-inheritance:", ""] if kind != "function" else [""]
        return self.parse_text_to_nodes("```{eval-rst}\n" + "\n".join(lines) + "\n```")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("public-names", PublicNames)
    # Before napoleon, which has the default priority and would take the body of a block for a section.
    app.connect("autodoc-process-docstring", _rewrite, priority=400)
    return {"parallel_read_safe": True}

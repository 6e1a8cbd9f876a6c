"""The documentation: its code runs, its errors are all errors there are, and it has the loop that is tested."""

import re

import pytest

from ray_stateful import errors
from tests import pages


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_every_block_is_run_or_says_why_not_or_is_nothing_to_run(page):
    unknown = [
        (block.line, block.language)
        for block in pages.blocks_of(page)
        if block.language not in (*pages.RUN, *pages.SHOWN) and not block.language.startswith("{")
    ]
    assert unknown == []


@pytest.mark.parametrize("page", pages.to_be_run(with_ray=False), ids=pages.name_of)
def test_the_code_of_a_page_runs_as_it_stands(page, tmp_path):
    pages.run(page, tmp_path)


def test_code_on_a_page_is_run_unless_a_reason_stands_before_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n```python\nassert 1 == 1\n```\n\n<!-- not executed: it is wrong -->\n```python\nassert 1 == 2\n```\n\n"
        "- a list\n  ```sh\n  exit 3\n  ```\n\n<!-- not executed: -->\n```python\nassert 1 == 3\n```\n"
    )

    assert [(block.line, block.is_run, block.reason) for block in pages.blocks_of(page)] == [
        (4, True, None),
        (9, False, "it is wrong"),
        (14, True, None),
        (19, True, None),  # no reason was given
    ]
    script = pages.script_of(page).splitlines()
    assert script[3] == "assert 1 == 1"
    assert "'exit 3'" in script[13]
    assert script[18] == "assert 1 == 3"
    assert "assert 1 == 2" not in script


def test_the_page_about_the_loop_has_all_of_the_readmes_and_nothing_else():
    (loop,) = [block.code for block in pages.blocks_of(pages.ROOT / "README.md") if block.language == "python"]
    begin = loop.index("def train_func")
    pieces = [block.code for block in pages.blocks_of(pages.ROOT / "docs/loop.md") if block.language == "python"]

    assert [line for piece in pieces for line in piece.splitlines() if line] == [
        line for line in loop[begin:].splitlines() if line
    ]


def test_every_error_is_on_the_page_about_errors_and_says_when_where_and_what_to_do():
    text = (pages.ROOT / "docs/errors.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE))

    assert sorted(sections) == sorted(errors.__all__)
    bases = {"CheckpointError", "RestoreFailed"}  # never raised themselves
    for name in sections.keys() - bases:
        for question in ("*When:*", "*On which ranks:*", "*What to do:*"):
            assert question in sections[name], (name, question)
    # Also in the drawing, below their bases.
    tree = text[text.index("```text") :].split("```")[1]
    assert sorted(re.findall(r"[A-Z]\w+", tree)) == sorted(errors.__all__)

"""Open files that are kept: which are opened anew, and which are let go."""

import pytest

from ray_stateful.storage.handles import Handles


def test_a_file_that_could_not_be_opened_is_opened_again_for_the_next_who_asks():
    failures = [ConnectionResetError("reset")]

    def open_file(path):
        if failures:
            raise failures.pop()
        return "open"

    handles = Handles(open_file)
    with pytest.raises(ConnectionResetError):
        handles.get("a")
    assert [handles.get("a") for _ in range(2)] == [("open", True), ("open", False)]


def test_an_open_that_fails_late_leaves_the_file_that_was_opened_meanwhile():
    opened = []

    def open_file(path):
        opened.append(path)
        if len(opened) == 1:
            assert handles.get("a", fresh=True) == ("open", True)
            raise ConnectionResetError("reset")
        return "open"

    handles = Handles(open_file)
    with pytest.raises(ConnectionResetError):
        handles.get("a")
    assert handles.get("a") == ("open", False)


def test_the_files_that_were_used_last_are_kept_and_no_more():
    opened = []
    handles = Handles(lambda path: opened.append(path), max_handles=2)
    for path in "abaca":
        handles.get(path)
    assert opened == ["a", "b", "c"]
    handles.get("b")
    assert opened == ["a", "b", "c", "b"]
    # It is another file now.
    handles.forget("b")
    handles.get("b")
    handles.forget_all()
    handles.get("a")
    assert opened == ["a", "b", "c", "b", "b", "a"]

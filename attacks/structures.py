"""Paths and trees that make up no structure, or another than there seems to be."""

from __future__ import annotations

import dataclasses

from attacks.corpus import attack
from ray_stateful.format.rows import IntKey, tree_row


def moved(workshop, key, path):
    workshop.row(key, key=".".join(map(str, path)), path=path)


@attack
def path_that_is_not_its_key(workshop):
    """The key says one place and the path another: what is checked is not what is filled."""
    workshop.row("thing.weights", path=("thing", "other"))


@attack
def path_without_steps(workshop):
    """A value at the root, instead of the whole state."""
    workshop.row("thing.name", key="", path=())


@attack
def path_without_end(workshop):
    """A thousand steps, for whoever follows them by recursion."""
    moved(workshop, "thing.name", ("thing", *["x"] * 1000))


@attack
def position_far_out(workshop):
    """Position a million in a list: filled up to there, and that in each of sixty lists."""
    moved(workshop, "thing.name", ("thing", "far", *[2**20 - 1] * 60))


@attack
def position_that_is_negative(workshop):
    """Position -1, the last in Python."""
    moved(workshop, "thing.layers.0", ("thing", "layers", -1))


@attack
def position_that_is_missing(workshop):
    """A list without its first entry, which would be None where a tensor was."""
    moved(workshop, "thing.layers.0", ("thing", "layers", 2))


@attack
def list_that_is_a_dict(workshop):
    """A container with a position and a key below it."""
    moved(workshop, "thing.name", ("thing", "layers", "name"))


@attack
def list_for_a_part(workshop):
    """A part that has a key and a position below it."""
    moved(workshop, "thing.name", ("thing", 0))


@attack
def value_with_something_below(workshop):
    """An entry below a value, to be put into a text."""
    moved(workshop, "thing.weights", ("thing", "name", "weights"))


@attack
def tree_that_hides_tensors(workshop):
    """An empty tree above the tensors of a model, which stands for them: the model would stay as it was."""
    workshop.write_rows([*workshop.rows(), tree_row(("model",), "{}")])


@attack
def tree_below_a_tree(workshop):
    """A tree within another, to be put into whatever the other is."""
    workshop.write_rows([*workshop.rows(), tree_row(("thing", "counts", IntKey(1)), '{"a": 1}')])


@attack
def tree_with_a_file(workshop):
    """A tree of which bytes would be read."""
    row = tree_row(("thing", "more"), "{}")
    workshop.write_rows([*workshop.rows(), dataclasses.replace(row, checksums=b"12345678")])


@attack
def tree_that_stands_there_twice(workshop):
    """Two trees at one place."""
    workshop.write_rows([*workshop.rows(), tree_row(("thing", "counts"), "{}")])


@attack
def tree_that_is_no_json(workshop):
    """A tree whose text is not one."""
    tree = next(row for row in workshop.rows() if row.is_tree and row.key == "thing.counts")
    rows = [row for row in workshop.rows() if row != tree]
    workshop.write_rows([*rows, dataclasses.replace(tree, value="{")])


@attack
def part_with_a_dot(workshop):
    """A part whose name reads as an entry of another."""
    moved(workshop, "thing.name", ("thing.layers", "name"))


@attack
def part_that_writes_to_the_terminal(workshop):
    """A part's name clears the screen and claims that all is verified."""
    moved(workshop, "thing.name", ("\x1b[2Jresumed, verified\n", "name"))


def rank_part(workshop, *names):
    rows = [row for row in workshop.rows() if row.path[0] != "stream"]
    tree = next(row for row in workshop.rows() if row.path[0] == "stream" and not row.is_tree)
    workshop.write_rows(
        [*rows]
        + [dataclasses.replace(tree, key=f"stream.{name}.number", path=("stream", name, "number")) for name in names]
    )


@attack
def rank_that_is_negative(workshop):
    """The value of rank -1."""
    rank_part(workshop, "rank_-1")


@attack
def rank_with_a_leading_zero(workshop):
    """Ranks 0 and 01, which are two names and may be one number."""
    rank_part(workshop, "rank_0", "rank_01")


@attack
def rank_of_a_billion(workshop):
    """The value of a rank that never was; a list of all ranks up to it is long."""
    rank_part(workshop, "rank_0", "rank_999999999")


@attack
def rank_in_other_digits(workshop):
    """A digit that `isdigit` knows and `int` does not."""
    rank_part(workshop, "rank_\u00b2")


@attack
def rank_without_a_prefix(workshop):
    """A value under a bare number."""
    rank_part(workshop, "0")


@attack
def paths_as_deep_as_they_may_be(workshop):
    """Ten thousand values, 62 dicts deep, and a list without its first entry: to look for it, what is in each dict?"""
    moved(workshop, "thing.layers.0", ("thing", "layers", 2))
    value = next(row for row in workshop.rows() if row.key == "thing.name")
    paths = (("thing", f"n{number}", *[""] * 62) for number in range(10_000))
    many = [dataclasses.replace(value, key=".".join(path), path=path) for path in paths]
    workshop.write_rows([*workshop.rows(), *many])

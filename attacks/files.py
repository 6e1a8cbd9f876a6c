"""What lies in the directory is not what it seems: links, special files, files of other checkpoints."""

from __future__ import annotations

import json
import os
import shutil

from attacks.corpus import attack
from ray_stateful.format import layout


def linked(workshop, name):
    path = workshop.directory / name
    elsewhere = workshop.directory.parent / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


@attack
def item_that_is_a_link(workshop):
    """An item file is a link to one outside of the directory, which somebody else may change."""
    linked(workshop, workshop.item_file())


@attack
def index_that_is_a_link(workshop):
    """The index is a link."""
    linked(workshop, layout.INDEX)


@attack
def manifest_that_is_a_link(workshop):
    """The manifest is a link."""
    linked(workshop, layout.MANIFEST)


@attack(foreign=True)
def item_of_a_plain_directory_that_is_a_link(workshop):
    """An item file of a plain DCP directory is a link."""
    linked(workshop, "__0_0.distcp")


@attack
def item_that_is_a_pipe(workshop):
    """An item file is a named pipe: to open it waits for ever."""
    path = workshop.directory / workshop.item_file()
    path.unlink()
    os.mkfifo(path)


@attack
def item_that_is_a_directory(workshop):
    """An item file is a directory."""
    path = workshop.directory / workshop.item_file()
    path.unlink()
    path.mkdir()


@attack
def item_that_is_endless(workshop):
    """An item file is a link to /dev/zero."""
    path = workshop.directory / workshop.item_file()
    path.unlink()
    path.symlink_to("/dev/zero")


@attack(late=True)
def item_of_another_checkpoint(workshop):
    """An item file of the right name and size, with other bytes: of another step."""
    path = workshop.directory / workshop.item_file()
    path.write_bytes(os.urandom(path.stat().st_size))


@attack(late=True)
def items_swapped(workshop):
    """Two item files have each other's name."""
    first, second = (workshop.directory / name for name in sorted(p.name for p in workshop.directory.glob("*.distcp")))
    aside = workshop.directory.parent / "aside"
    shutil.move(first, aside)
    shutil.move(second, first)
    shutil.move(aside, second)


@attack
def manifest_missing_next_to_an_index(workshop):
    """Without a manifest, a checkpoint of ours passes for a plain DCP directory, whose bytes nobody checks."""
    (workshop.directory / layout.MANIFEST).unlink()


@attack
def manifest_of_an_emptied_directory(workshop):
    """The manifest alone."""
    for path in workshop.directory.iterdir():
        if path.name != layout.MANIFEST:
            path.unlink()
    json.loads((workshop.directory / layout.MANIFEST).read_bytes())

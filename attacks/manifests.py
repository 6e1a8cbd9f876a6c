"""Manifests that vouch for themselves, and say what no writer says."""

from __future__ import annotations

import json

from attacks.corpus import attack
from ray_stateful.format import layout
from ray_stateful.format.checksums import checksum


def raw(workshop, data):
    (workshop.directory / layout.MANIFEST).write_bytes(data)


@attack
def manifest_of_a_newer_format(workshop):
    """Format 2, whose rules this version can't know."""
    workshop.manifest(lambda body: body.update(format=2))


@attack
def manifest_of_format_true(workshop):
    """`true` equals 1 in Python."""
    workshop.manifest(lambda body: body.update(format=True))


@attack
def manifest_of_format_zero(workshop):
    """A format that never was."""
    workshop.manifest(lambda body: body.update(format=0))


@attack
def manifest_with_a_step_of_infinity(workshop):
    """A step that no step comes after: this checkpoint would always be the newest."""
    workshop.manifest(lambda body: body.update(step=float("inf")))


@attack
def manifest_with_a_step_of_nan(workshop):
    """A step that is neither before nor after any other."""
    workshop.manifest(lambda body: body.update(step=float("nan")))


@attack
def manifest_with_a_negative_step(workshop):
    """A step before the first."""
    workshop.manifest(lambda body: body.update(step=-1))


@attack
def manifest_with_a_huge_time(workshop):
    """A time that is an int too large for a float, on which `math.isfinite` raises what nobody expects."""
    workshop.manifest(lambda body: body.update(created_s=10**400))


@attack
def manifest_with_an_endless_number(workshop):
    """A number of a million digits, which takes time that grows with their square to read."""
    workshop.manifest(lambda body: body.update(samples=0))
    data = (workshop.directory / layout.MANIFEST).read_bytes()
    raw(workshop, data.replace(b'"samples": 0', b'"samples": ' + b"9" * 1_000_000))


@attack
def manifest_with_a_key_twice(workshop):
    """Two lists of files: one reader takes the first, another the last."""
    data = (workshop.directory / layout.MANIFEST).read_bytes()
    raw(workshop, b'{"files": {}, ' + data.lstrip()[1:])


@attack
def manifest_nested_without_end(workshop):
    """Brackets, and nothing else."""
    raw(workshop, b"[" * 1_000_000)


@attack
def manifest_nested_just_so(workshop):
    """Nested as deep as can be read and deeper than can be written again for the checksum."""
    for depth in range(900, 1000):
        raw(workshop, b'{"format": 1, "a": ' + b"[" * depth + b"]" * depth + b"}")


@attack
def manifest_of_gigabytes(workshop):
    """A manifest that takes no room on the disk and all of the memory: one hole."""
    with open(workshop.directory / layout.MANIFEST, "wb") as file:
        file.truncate(1 << 40)


@attack
def manifest_in_another_encoding(workshop):
    """UTF-16, in which a checksum over text and one over bytes may differ."""
    raw(workshop, (workshop.directory / layout.MANIFEST).read_text().encode("utf-16"))


@attack
def manifest_without_a_checksum(workshop):
    """Nothing to compare with, and so nothing that differs."""
    body = json.loads((workshop.directory / layout.MANIFEST).read_bytes())
    del body["checksum"]
    raw(workshop, json.dumps(body).encode())


@attack
def manifest_with_a_file_above(workshop):
    """A file outside of the directory, whose checksum would be compared."""
    workshop.manifest(lambda body: body["files"].update({"../secret": {"size": 1, "xxh3": "0" * 16}}))


@attack
def manifest_with_an_absolute_file(workshop):
    """A file of the machine."""
    workshop.manifest(lambda body: body["files"].update({"/etc/passwd": {"size": 1, "xxh3": "0" * 16}}))


@attack
def manifest_with_a_look_alike(workshop):
    """Digits of another script, which `\\d` and `int` take for digits."""
    workshop.manifest(lambda body: body["files"].update({"__\u0661_0.distcp": {"size": 1, "xxh3": "0" * 16}}))


@attack
def manifest_with_a_newline_in_a_name(workshop):
    """A name that ends as it should, but for a newline, which `$` lets pass."""
    workshop.manifest(lambda body: body["files"].update({"__0_0.distcp\n": {"size": 1, "xxh3": "0" * 16}}))


@attack
def manifest_with_a_negative_size(workshop):
    """A size that makes a sum of sizes small."""
    workshop.manifest(lambda body: body["files"].update({"__9_0.distcp": {"size": -(1 << 62), "xxh3": "0" * 16}}))


@attack
def manifest_without_an_index(workshop):
    """No index is named, so none is checked."""
    workshop.manifest(lambda body: body["files"].pop(layout.INDEX))


@attack
def manifest_of_another_checkpoint(workshop):
    """The manifest of another step, for the same files: its values would be called those of that step."""
    workshop.manifest(lambda body: body.update(step=1000, attempt="abcdef"))


@attack
def manifest_with_other_parts(workshop):
    """It names parts that are not there, and not those that are."""
    workshop.manifest(lambda body: body.update(parts=["something"]))


@attack
def manifest_with_a_world_of_none(workshop):
    """Saved by no worker, which somebody will divide by."""
    workshop.manifest(lambda body: body.update(world_size=0))


@attack
def manifest_with_more_to_say(workshop):
    """A field that this format does not have."""
    workshop.manifest(lambda body: body.update(on_load="os.system"))


@attack
def manifest_that_is_a_list(workshop):
    """JSON, and no object."""
    raw(workshop, json.dumps([{"checksum": checksum(b"[]")}]).encode())


@attack
def manifest_of_two_billion_ranks(workshop):
    """So many ranks saved, it says, that a list of them takes all memory."""
    workshop.manifest(lambda body: body.update(world_size=2 * 10**9))


@attack
def manifest_of_empty_lists(workshop):
    """Twenty million empty lists in sixty megabytes of a manifest."""
    raw(workshop, b'{"format":1,"parts":[' + b"[]," * 20_000_000 + b"[]]}")

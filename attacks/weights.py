"""Safetensors that a run is to begin from: headers, indexes and directories that no writer makes."""

from __future__ import annotations

import json
import os
import pickle
import struct
from typing import Any

from attacks.corpus import attack
from attacks.victim import WEIGHTS
from ray_stateful.format import hf_layout

INTACT = {
    "bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
}


def write(workshop: Any, header: Any, body: bytes = bytes(32)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (workshop.directory / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_index(workshop: Any, *files: str) -> None:
    weight_map = {f"tensor_{number}": file for number, file in enumerate(files)}
    (workshop.directory / f"model{hf_layout.INDEX_SUFFIX}").write_text(json.dumps({"weight_map": weight_map}))


@attack(initial=True)
def header_that_is_longer_than_memory(workshop):
    """A header of some gigabytes, in a file with a hole that takes no disk."""
    path = workshop.directory / WEIGHTS
    path.write_bytes(struct.pack("<Q", 5 << 30))
    os.truncate(path, 6 << 30)


@attack(initial=True)
def index_of_safetensors_that_is_longer_than_memory(workshop):
    """An index of some gigabytes."""
    path = workshop.directory / f"model{hf_layout.INDEX_SUFFIX}"
    path.touch()
    os.truncate(path, 6 << 30)


@attack(initial=True)
def header_of_deep_nesting(workshop):
    """A header nested so deep that a reader of JSON overruns its stack."""
    write(workshop, b"[" * 1_000_000)


@attack(initial=True)
def header_with_a_number_of_many_digits(workshop):
    """Offsets of a million digits, which take time that grows with their square."""
    write(workshop, b'{"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, ' + b"9" * 1_000_000 + b"]}}")


@attack(initial=True)
def shape_of_nothing_with_absurd_strides(workshop):
    """A tensor without elements whose other sizes overflow its strides."""
    entry = {"dtype": "F32", "shape": [0, 2**61, 2**61], "data_offsets": [0, 0]}
    write(workshop, {"weight": entry}, b"")


@attack(initial=True)
def shape_larger_than_its_bytes(workshop):
    """A tensor of the size of a data centre, in 32 bytes."""
    write(workshop, {"weight": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 32]}})


@attack(initial=True)
def tensors_over_each_other(workshop):
    """Two tensors are the same bytes, as often as it takes for a small file to become a large model."""
    write(workshop, {f"tensor_{n}": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} for n in range(1000)})


@attack(initial=True)
def name_that_stands_for_two_tensors(workshop):
    """A key twice in a header: one reader takes the first, another the last."""
    text = json.dumps(INTACT)
    write(workshop, f'{text[:-1]}, "weight": {json.dumps(INTACT["bias"])}}}'.encode())


@attack(initial=True)
def name_that_cannot_be_printed(workshop):
    """Half a surrogate pair for a name: the message that names it is an error of its own."""
    write(workshop, {"\ud800": INTACT["bias"], "weight": INTACT["weight"]})


@attack(initial=True)
def index_that_leads_outside(workshop):
    """The index names a file above the directory."""
    (workshop.directory / WEIGHTS).rename(workshop.directory.parent / "secret.safetensors")
    write_index(workshop, "../secret.safetensors")


@attack(initial=True)
def index_that_names_files_without_end(workshop):
    """An index of 200,000 files that are not there, each of which would be asked for."""
    write_index(workshop, *(f"model-{number}.safetensors" for number in range(200_000)))


@attack(initial=True)
def index_with_a_file_of_another_type(workshop):
    """The index names numbers and lists for files."""
    path = workshop.directory / f"model{hf_layout.INDEX_SUFFIX}"
    path.write_text(json.dumps({"weight_map": {"weight": [WEIGHTS], "bias": 7}}))


@attack(initial=True)
def pickle_in_place_of_safetensors(workshop):
    """A pickle under the name of a safetensors file."""
    (workshop.directory / WEIGHTS).write_bytes(_pickle(workshop))


@attack(initial=True)
def pickle_beside_nothing(workshop):
    """Only `pytorch_model.bin` is there, which other readers fall back to, and which runs."""
    (workshop.directory / WEIGHTS).unlink()
    (workshop.directory / "pytorch_model.bin").write_bytes(_pickle(workshop))


@attack(initial=True)
def weights_that_are_endless(workshop):
    """The file is a link to /dev/zero: links are followed here, as Hugging Face's cache is made of them."""
    path = workshop.directory / WEIGHTS
    path.unlink()
    path.symlink_to("/dev/zero")


@attack(initial=True)
def weights_that_are_a_pipe(workshop):
    """The file is a named pipe: to open it waits for ever."""
    path = workshop.directory / WEIGHTS
    path.unlink()
    os.mkfifo(path)


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def _pickle(workshop: Any) -> bytes:
    return pickle.dumps(_Touch(str(workshop.canary)))


@attack(initial=True)
def header_of_empty_lists(workshop):
    """Fifteen million empty lists in a header of forty-five megabytes."""
    write(workshop, b'{"a":[' + b"[]," * 15_000_000 + b"[]]}")


@attack(initial=True)
def headers_of_gigabytes_together(workshop):
    """Twenty files that take no room on the disk, each with a header as long as one may be."""
    for number in range(20):
        with open(workshop.directory / f"model-{number}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", hf_layout.MAX_HEADER_BYTES))
            file.truncate(8 + hf_layout.MAX_HEADER_BYTES)


@attack(initial=True)
def file_whose_name_is_not_text(workshop):
    """A file whose name is not UTF-8, beside the weights of which one is missing."""
    (workshop.directory / WEIGHTS).unlink()
    open(os.fsencode(workshop.directory) + b"/\xff.safetensors", "wb").close()

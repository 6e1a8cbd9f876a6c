"""A DCP `StorageWriter`: streams items to storage, several files at a time, and computes checksums on the way.

No temporary directory, no second copy: a tensor's bytes are handed to the filesystem from where they are (from one
tensor-sized host copy, for a tensor on a device). Works under bare `dcp.save(state,
storage_writer=CheckpointWriter(uri))` as well.
"""

from __future__ import annotations

import errno
import io
import math
import os
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from typing_extensions import Buffer

from ray_stateful.format import values
from ray_stateful.format.checksums import RunningChecksum, block_bytes_for, block_checksums
from ray_stateful.format.chunks import Box
from ray_stateful.format.dtypes import dtype_name
from ray_stateful.format.layout import item_file
from ray_stateful.format.manifest import Manifest, StoredFile
from ray_stateful.format.rows import StoredChunk, tree_row
from ray_stateful.format.torch_item import envelope
from ray_stateful.storage import commit, streams
from ray_stateful.storage.assignment import SMALL_BYTES, item_bytes
from ray_stateful.storage.base import Storage
from ray_stateful.storage.commit import Committed, Description, Repeated, WrittenFile
from ray_stateful.storage.planner import BalancedSavePlanner
from ray_stateful.storage.retries import DeadlineSink, write_file
from ray_stateful.storage.uris import resolve

DEFAULT_NUM_FILES = 2

# Per rank. Numbers from here on are those of files that were tried again.
_MAX_FILES = 10_000

# Small enough that one part that is hashed and one that the filesystem takes at the same time both stay in cache.
_PART_BYTES = 4 << 20

# How many bytes are handed to the storage in one call: each call has a deadline, which costs waking a thread.
_TOGETHER_BYTES = 4 << 20


class CheckpointWriter(StorageWriter):
    """Writes a checkpoint of format 1 into one directory.

    Args:
        path: Of the checkpoint's directory; a URI if `storage` is not given. The directory must be new.
        storage: Where `path` is.
        num_files: Files this rank writes at a time, each in a thread of its own.
        description: What the manifest says besides the files.

    `num_bytes` is the size of the item files that this rank wrote. `may_be_committed` says that the manifest was sent;
    it stays true if that failed, as a storage that gave no answer may still have written the manifest.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        storage: Storage | None = None,
        *,
        num_files: int = DEFAULT_NUM_FILES,
        description: Description | None = None,
    ) -> None:
        check_num_files(num_files)
        super().__init__()
        self._num_files = num_files
        self._description = description
        self._storage, self._path = (storage, os.fspath(path)) if storage is not None else resolve(os.fspath(path))
        self._rank = 0
        self.num_bytes = 0
        self.may_be_committed = False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._storage, self._path = resolve(os.fspath(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = int(kwargs.get("rank", torch.distributed.get_rank() if torch.distributed.is_initialized() else 0))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Called by DCP, on the coordinator alone, before any file is written. `save` does not need it.

        Raises:
            FileExistsError: the directory has files in it.
        """
        there = sorted(self._storage.sizes(self._path))
        if there:
            # Its files would be overwritten one by one: even a save that fails would destroy a checkpoint there.
            raise FileExistsError(
                errno.EEXIST,
                f"a checkpoint needs a directory of its own, but this one has {there[0]!r} in it: use a different one, "
                "or delete this one first",
                self._path,
            )
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items; the results carry the rows of the index and the checksums of the files.

        Raises:
            StorageError: on this rank: a file can't be written. Raised in this thread, after all writing has ended.
        """
        bins = distribute(plan.items, self._num_files, getattr(self._storage, "max_file_bytes", None))
        results: list[WriteResult] = []
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # untyped in torch
            with torch.no_grad():
                streams.wait_before_other_threads(_tensors_of(plan, planner))
        with ThreadPoolExecutor(max_workers=self._num_files, thread_name_prefix="checkpoint-write") as pool:
            jobs = [pool.submit(self._write_file, number, items, planner) for number, items in enumerate(bins)]
        for job in jobs:
            results += job.result()
        self.num_bytes = sum(result.size_in_bytes for result in results if isinstance(result.storage_data, WrittenFile))
        trees = planner.trees if isinstance(planner, BalancedSavePlanner) else {}
        results += [commit.tree_result(tree_row(path, text)) for path, text in trees.items()]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Prove the checkpoint complete and commit it. Called on the coordinator alone.

        Raises:
            ValueError: an item that was planned is not among the results, or the written chunks leave a gap.
        """
        self.commit(metadata, results)

    def commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> Committed:
        """Like `finish`; returns what `commit_again` needs after a later save to the same places."""
        described = self._described(len(results))
        committed, manifest = commit.prepare(self._storage, self._path, metadata, results, described)
        self._write_manifest(manifest)
        return committed

    def commit_again(self, committed: Committed, everyone: list[Repeated]) -> None:
        """Like `finish`, if all ranks wrote to the places of `committed`. Called on the coordinator alone."""
        described = self._described(len(everyone))
        self._write_manifest(commit.prepare_again(self._storage, self._path, committed, everyone, described))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def _described(self, world_size: int) -> Description:
        return self._description or Description(world_size=world_size)

    def _write_manifest(self, manifest: Manifest) -> None:
        self.may_be_committed = True
        commit.write_manifest(self._storage, self._path, manifest)

    def _write_file(self, number: int, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        name = ""

        def path(attempt: int) -> str:
            nonlocal name
            name = item_file(self._rank, number + attempt * _MAX_FILES)
            return posixpath.join(self._path, name)

        def stream(sink: DeadlineSink) -> list[WriteResult]:
            file = _ItemFile(name, sink)
            # Grad mode is per thread. When it is on, a DTensor gives its shard through autograd, which takes as long as
            # everything else together.
            with torch.no_grad():
                results = [file.add(item, planner) for item in items]
            file.hand_over()
            whole = WrittenFile(name, StoredFile(size=file.offset, xxh3=file.checksum.hexdigest()))
            return [*results, commit.file_result(whole)]

        return write_file(self._storage, path, stream)


class _ItemFile:
    """One item file being written: keeps track of the offset and of the checksum of the whole file."""

    def __init__(self, name: str, sink: DeadlineSink) -> None:
        self.offset = 0
        self.checksum = RunningChecksum()
        self._name = name
        self._sink = sink
        self._pending: list[memoryview] = []
        self._pending_bytes = 0
        # Hyperparameters repeat for every parameter: the same bytes are stored once, and all entries point to them.
        self._stored: dict[bytes, tuple[int, int, bytes]] = {}

    def add(self, item: WriteItem, planner: SavePlanner) -> WriteResult:
        data = planner.resolve_data(item) if item.type != WriteItemType.BYTE_IO else None
        row = (
            self._add_tensor(item, data, planner) if isinstance(data, torch.Tensor) else self._add_value(item, planner)
        )
        return WriteResult(index=item.index, size_in_bytes=row.item_length, storage_data=row)

    def _add_tensor(self, item: WriteItem, tensor: torch.Tensor, planner: SavePlanner) -> StoredChunk:
        assert item.tensor_data is not None
        tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        sizes = tuple(item.tensor_data.chunk.sizes)
        if tensor.numel() == 0 == math.prod(sizes):
            # If rows have no elements, FSDP2 keeps no rows in the local tensor, but still plans them.
            tensor = tensor.reshape(sizes)
        if tuple(tensor.shape) != sizes:
            raise ValueError(f"{item.index.fqn}: planned a chunk of sizes {sizes}, found one of {tuple(tensor.shape)}")
        header, trailer = envelope(tensor.dtype, sizes)
        # The bytes without a copy; viewed as uint8 first, as numpy has no bfloat16 and no float8. `as_strided` sets the
        # stride: a tensor of one element counts as contiguous whatever its stride is, and `view` would keep it.
        flat = tensor.as_strided((tensor.numel(),), (1,))
        raw = memoryview(cast(Buffer, flat.view(torch.uint8).numpy()) if tensor.numel() else b"")
        shape = tuple(item.tensor_data.size)
        block_bytes = block_bytes_for(math.prod(shape) * tensor.element_size())
        item_offset = self.offset
        self._write(header)
        checksums = b"".join(
            self._write_part(raw[at : at + _PART_BYTES], block_bytes) for at in range(0, len(raw), _PART_BYTES)
        )
        self._write(trailer)
        return StoredChunk(
            key=item.index.fqn,
            path=_path_of(item, planner),
            dtype=dtype_name(tensor.dtype),
            shape=shape,
            box=Box(tuple(item.tensor_data.chunk.offsets), sizes),
            file=self._name,
            item_offset=item_offset,
            item_length=self.offset - item_offset,
            data_offset=item_offset + len(header),
            block_bytes=block_bytes,
            checksums=checksums,
        )

    def _add_value(self, item: WriteItem, planner: SavePlanner) -> StoredChunk:
        key = item.index.fqn
        pickled, text = _value_of(item, planner)
        block_bytes = block_bytes_for(len(pickled))
        if pickled not in self._stored:
            self._stored[pickled] = (self.offset, len(pickled), block_checksums(pickled, block_bytes))
            self._write(pickled)
        offset, length, checksums = self._stored[pickled]
        return StoredChunk(
            key=key,
            path=_path_of(item, planner),
            dtype=None,
            shape=(),
            box=Box((), ()),
            file=self._name,
            item_offset=offset,
            item_length=length,
            data_offset=offset,
            block_bytes=block_bytes,
            checksums=checksums,
            value=text,
        )

    def _write_part(self, data: memoryview, block_bytes: int) -> bytes:
        self._write(data)
        return block_checksums(data, block_bytes)

    def hand_over(self) -> None:
        """Give the sink everything that is still pending; to be called before the file ends."""
        if self._pending:
            self._sink.write_all(self._pending)
        self._pending, self._pending_bytes = [], 0

    def _write(self, data: Buffer) -> None:
        view = memoryview(data)
        self.checksum.update(view)
        self.offset += view.nbytes
        # A view keeps its tensor alive, so no copy is needed.
        self._pending.append(view)
        self._pending_bytes += view.nbytes
        if self._pending_bytes >= _TOGETHER_BYTES:
            self.hand_over()


def check_num_files(num_files: int) -> None:
    """Refuse a number of files that a rank can't write.

    Raises:
        ValueError: `num_files` is not from 1 to 9,999.
    """
    if not 1 <= num_files < _MAX_FILES:
        raise ValueError(f"num_files is {num_files}; it must be at least 1, and below {_MAX_FILES:,}")


def distribute(items: list[WriteItem], num_files: int, max_file_bytes: int | None) -> list[list[WriteItem]]:
    """Spread items over files of about equal size: `num_files` of them, or more if the storage limits a file's size.

    Within a file, values come first, then small tensors that are not shards, then all other tensors, each by key: what
    is restored together lies together.
    """
    sizes = list(map(item_bytes, items))
    order = sorted(
        range(len(items)), key=lambda at: (-sizes[at], items[at].index.fqn, tuple(items[at].index.offset or ()))
    )
    # The average file has half of the limit at most: how much more than the average one gets is not known beforehand.
    least = 0 if max_file_bytes is None else -(-2 * sum(sizes) // max_file_bytes)
    bins: list[list[WriteItem]] = [[] for _ in range(max(num_files, least))]
    loads = [0] * len(bins)
    for at in order:
        lightest = loads.index(min(loads))
        bins[lightest].append(items[at])
        loads[lightest] += sizes[at]
    return [sorted(part, key=_place) for part in bins if part]


def _tensors_of(plan: SavePlan, planner: SavePlanner) -> Iterator[torch.Tensor]:
    for item in plan.items:
        data = planner.resolve_data(item) if item.type != WriteItemType.BYTE_IO else None
        if isinstance(data, torch.Tensor):
            yield data


def _place(item: WriteItem) -> tuple[int, str, tuple[int, ...]]:
    data = item.tensor_data
    is_large = data is not None and (data.chunk.sizes != data.size or item_bytes(item) > SMALL_BYTES)
    return 0 if data is None else 2 if is_large else 1, item.index.fqn, tuple(item.index.offset or ())


def _path_of(item: WriteItem, planner: SavePlanner) -> tuple[str | int, ...]:
    mappings = getattr(planner, "mappings", None)
    return tuple(mappings[item.index.fqn]) if mappings else (item.index.fqn,)


def _value_of(item: WriteItem, planner: SavePlanner) -> tuple[bytes, str]:
    """A value as bytes of `torch.save`, for stock tools, and as JSON."""
    key = item.index.fqn
    if not isinstance(planner, DefaultSavePlanner):
        raise TypeError(f"{key}: values can be stored with a DefaultSavePlanner only, not {type(planner).__name__}")
    text = (
        planner.encoded[key]
        if isinstance(planner, BalancedSavePlanner)
        else values.encode(planner.lookup_object(item.index), key)
    )
    return _pickled(text, key), text


def _pickled(text: str, key: str) -> bytes:
    # Cached: torch.save of a number takes longer than writing it. A JSON text has only one value, so it can be the key.
    known = _pickles.get(text)
    if known is None:
        file = io.BytesIO()
        # Pickle the value decoded from the text, so that the pickle and the JSON are the same value.
        torch.save(values.decode(text, key), file)
        known = file.getvalue()
        if len(text) <= 64:
            if len(_pickles) > 4096:
                _pickles.clear()
            _pickles[text] = known
    return known


_pickles: dict[str, bytes] = {}

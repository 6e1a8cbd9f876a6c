"""Committing a 70B-parameter model's save of many ranks: at first, and again in the same places; and opening it.

The rows are of real plans, and the files are holes of the right sizes: what is measured is what rank 0 does between
the last byte of a shard and the manifest, and what every rank does before it reads one.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from benchmarks.large_plans import VALUE, entries_of_model, plans_to_send
from benchmarks.measuring import memory_of, reset_peak
from ray_stateful import collector
from ray_stateful.format import layout
from ray_stateful.format.checksums import block_bytes_for, num_blocks
from ray_stateful.format.chunks import Box
from ray_stateful.format.manifest import StoredFile
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage import opening
from ray_stateful.storage.assignment import item_bytes
from ray_stateful.storage.commit import WrittenFile, file_result, repeated
from ray_stateful.storage.local import LocalStorage
from ray_stateful.storage.planner import BalancedSavePlanner
from ray_stateful.storage.writer import CheckpointWriter

_NO_CHECKSUM = "0" * 16


def run(num_ranks: int) -> dict[str, Any]:
    """Seconds and bytes, each measured in a process of its own: what one frees is no memory for the next."""
    with tempfile.TemporaryDirectory(prefix="benchmarks_") as directory:
        return {**_alone(_commit, num_ranks, directory), **_alone(_open, directory)}


def _alone(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def _commit(num_ranks: int, directory: str) -> dict[str, Any]:
    with collector.paused():
        plans, metadata = BalancedSavePlanner().create_global_plan(plans_to_send(list(entries_of_model()), num_ranks))
        results = [_results(plan, rank) for rank, plan in enumerate(plans)]
    del plans
    path = os.path.join(directory, str(layout.CheckpointName(0, _NO_CHECKSUM[:6])))
    _make_files(path, results)
    writer = CheckpointWriter(path, LocalStorage())
    began = time.perf_counter()
    committed = writer.commit(metadata, results)
    first_s = time.perf_counter() - began
    again = [repeated(of_rank) for of_rank in results]
    began = time.perf_counter()
    writer.commit_again(committed, again)
    return {"commit_s": first_s, "commit_again_s": time.perf_counter() - began}


def _open(directory: str) -> dict[str, Any]:
    (name,) = os.listdir(directory)
    path = os.path.join(directory, name)
    raw = opening.fetch(LocalStorage(), path)
    before = reset_peak()
    began = time.perf_counter()
    found = opening.parse(raw)
    seconds = time.perf_counter() - began
    assert found.manifest is not None
    # The index itself is in memory before it is decoded, and parts of it stay.
    return {
        "index_bytes": len(raw.index),
        "open_s": seconds,
        "open_peak_bytes": memory_of("VmHWM") - before + len(raw.index),
    }


def _results(plan: SavePlan, rank: int) -> list[WriteResult]:
    """What a rank's writer would say of its items, one behind the other in one file."""
    name, position = layout.item_file(rank, 0), 0
    found = []
    for item in plan.items:
        data, num_bytes = item.tensor_data, item_bytes(item)
        shape = () if data is None else tuple(data.size)
        block_bytes = block_bytes_for(num_bytes if data is None else 4 * math.prod(shape))
        row = StoredChunk(
            key=item.index.fqn,
            path=(item.index.fqn,),
            dtype=None if data is None else "float32",
            shape=shape,
            box=Box((), ()) if data is None else Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes)),
            file=name,
            item_offset=position,
            item_length=num_bytes,
            data_offset=position,
            block_bytes=block_bytes,
            checksums=bytes(8 * num_blocks(num_bytes, block_bytes)),
            value=VALUE if data is None else None,
        )
        found.append(WriteResult(index=MetadataIndex(row.key), size_in_bytes=num_bytes, storage_data=row))
        position += num_bytes
    return [*found, file_result(WrittenFile(name, StoredFile(size=position, xxh3=_NO_CHECKSUM)))]


def _make_files(path: str, results: list[list[WriteResult]]) -> None:
    os.makedirs(path)
    for *_, written in results:
        file = written.storage_data
        with open(os.path.join(path, file.name), "wb") as target:
            # A hole takes no room on the disk.
            target.truncate(file.file.size)

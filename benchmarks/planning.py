"""Planning a 70B-parameter model's save for many ranks, in one process: at first, and once the structure is known.

Every rank's plan is real; no tensor is. What ranks send each other is pickled and measured, and not sent.
"""

from __future__ import annotations

import pickle
import time
from typing import Any

from benchmarks import committing
from benchmarks.large_plans import entries_of_model, plans_to_send, shared_by_all
from benchmarks.measuring import Ratio
from benchmarks.settings import Settings
from ray_stateful import collector
from ray_stateful.ranks import ROW_BYTES
from ray_stateful.storage.assignment import left_out
from ray_stateful.storage.plan_cache import PlanCache, agree, entries_digest, structure_digest
from ray_stateful.storage.planner import BalancedSavePlanner

Row = dict[str, Any]


def run(settings: Settings) -> tuple[list[Row], list[Ratio]]:
    rows = [{**_plan(num_ranks), **committing.run(num_ranks)} for num_ranks in settings.planning_ranks]
    for row in rows:
        print(
            f"  {row['num_ranks']:5d} ranks  {row['items_a_rank']:6d} items a rank"
            f"  cold: {row['cold_s']:8.2f} s on rank 0, {row['cold_bytes'] / 1e6:9.2f} MB sent"
            f"  warm: {row['warm_s'] * 1e3:8.1f} ms a rank, {row['warm_bytes']:7d} B sent"
            f"  commit: {row['commit_s']:6.2f} s, later {row['commit_again_s']:6.2f} s"
            f"  index: {row['index_bytes'] / 1e6:8.2f} MB, opened in {row['open_s']:6.2f} s"
            f" and {row['open_peak_bytes'] / 1e6:8.2f} MB",
            flush=True,
        )
    first, last = rows[0], rows[-1]
    speed_ups = [row["cold_s"] / row["warm_s"] for row in rows]
    growth = last["warm_s"] / first["warm_s"]
    sent = [row["warm_bytes"] / row["num_ranks"] for row in rows]
    return rows, [
        Ratio("planning.warm_vs_cold", speed_ups[-1], min(speed_ups), max(speed_ups)),
        Ratio("planning.warm_growth_with_ranks", growth, growth, growth),
        Ratio("planning.warm_bytes_a_rank", sent[-1], min(sent), max(sent), ROW_BYTES, at_most=True),
    ]


def _plan(num_ranks: int) -> Row:
    entries = list(entries_of_model())
    tensors, values = shared_by_all(entries)
    began = time.perf_counter()
    plans = plans_to_send(entries, num_ranks)
    local_s = (time.perf_counter() - began) / num_ranks

    # Cold: every plan to rank 0, one plan for all, and what each leaves to others back. Pickling a plan is done on each
    # rank, unpickling on one.
    sent = [pickle.dumps(plan) for plan in plans]
    del plans
    began = time.perf_counter()
    with collector.paused():
        plans = [pickle.loads(plan) for plan in sent]
    unpickle_s = time.perf_counter() - began
    began = time.perf_counter()
    with collector.paused():
        finals, metadata = BalancedSavePlanner().create_global_plan(plans)
    left = [pickle.dumps(left_out(*pair)) for pair in zip(plans, finals, strict=True)]
    global_s = time.perf_counter() - began
    num_bytes = sum(map(len, [*sent, *left]))
    cold_s = unpickle_s + global_s

    # Warm: the same on every rank: digests of its own state, gathered, compared.
    cache = PlanCache()
    descriptions = [_description(key, shape, num_ranks) for key, shape in entries]
    found = [structure_digest(descriptions, num_ranks), entries_digest(tensors), entries_digest(values)]
    cache.keep([found[0]] * num_ranks, finals[0], metadata)

    began = time.perf_counter()
    descriptions = [_description(key, shape, num_ranks) for key, shape in entries]
    mine = [structure_digest(descriptions, num_ranks), entries_digest(tensors), entries_digest(values)]
    everyone = [mine] * num_ranks
    cached = cache.find([structure for structure, *_ in everyone])
    assert cached is not None
    assert agree([of_values for *_, of_values in everyone])
    warm_s = time.perf_counter() - began
    return {
        "part": "planning",
        "num_ranks": num_ranks,
        "items_a_rank": len(entries),
        "items_sent_a_rank": len(plans[num_ranks // 2].items),
        "local_plan_s": local_s,
        "cold_s": cold_s,
        "unpickle_s": unpickle_s,
        "global_plan_s": global_s,
        "cold_bytes": num_bytes,
        "warm_s": warm_s,
        "warm_bytes": ROW_BYTES * num_ranks,
    }


def _description(key: str, shape: tuple[int, ...] | None, num_ranks: int) -> str:
    """What `BalancedSavePlanner.describe` says of a DTensor that is sharded along dim 0 of one mesh axis."""
    path = tuple(key.split(".", 1))
    if shape is None:
        return f"{key} {path} value"
    return f"{key} {path} {shape} torch.float32 (Shard(dim=0),) ('dp',) ({num_ranks},) {num_ranks:016x} [0]"

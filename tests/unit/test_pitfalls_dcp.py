"""What bites users of torch.distributed.checkpoint, a sentence a test; others are where the thing itself is tested."""

import ast
import gc
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import ray_stateful
from ray_stateful import checkpoint
from ray_stateful.checkpoint import Saving
from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint, SaveFailed
from ray_stateful.format.chunks import Box
from ray_stateful.format.index import from_bytes, to_bytes
from ray_stateful.ranks import Outcome, Ranks
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage import commit, opening
from ray_stateful.storage.assignment import assign
from ray_stateful.storage.plan_cache import PlanCache
from ray_stateful.storage.planner import BalancedSavePlanner
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.storage.reader import CheckpointReader, read_requests, value_of
from ray_stateful.storage.reading import Request, read
from ray_stateful.storage.uris import resolve
from ray_stateful.storage.writer import DEFAULT_NUM_FILES, CheckpointWriter
from ray_stateful.testing import Fail, FaultyStorage, Truncate
from tests.part import Part, opened


def saved(tmp_path, value, storage=None, **options):
    inner = resolve(str(tmp_path))[0].inner
    run = DirectoryRun(storage(inner) if storage else inner, str(tmp_path), str(tmp_path))
    return checkpoint.save({"part": Part(value)}, step=1, run=run, **options)


def test_an_error_that_derives_from_base_exception_is_caught_at_the_boundary():
    outcome = Outcome()
    with outcome.catch():
        raise CheckpointException("lost", {})
    assert isinstance(outcome.error, CheckpointException)


def test_of_several_errors_of_one_rank_the_first_is_told():
    outcome = Outcome()
    for text in ("the cause", "a consequence"):
        with outcome.catch():
            raise OSError(text)
    assert str(outcome.error) == "the cause"


def test_a_shard_is_read_without_the_rest_of_its_chunk(tmp_path):
    report = saved(tmp_path, {"t": torch.arange(1 << 20, dtype=torch.float32).reshape(1024, 1024)})
    (chunk,) = opened(report).chunks["part.t"]
    storage, path = resolve(report.uri)
    eighth = chunk.box.__class__((256, 0), (128, 1024))
    into = torch.empty(128, 1024)

    statistics = read(storage, path, {"part": [Request(chunk, eighth, into)]})["part"]

    assert torch.equal(into, torch.arange(1 << 20, dtype=torch.float32).reshape(1024, 1024)[256:384])
    assert statistics.bytes_read <= 1.02 * into.nbytes


def test_an_exception_in_a_writer_thread_reaches_the_caller_whatever_its_file(tmp_path):
    tensors = {f"t{n}": torch.zeros(1000) for n in range(8)}
    for nth in (1, 2, 3, 4):
        fault = Fail("open_sink", nth=nth, error=PermissionError(13, f"file {nth}"))
        with pytest.raises(SaveFailed, match=f"file {nth}"):
            saved(tmp_path / str(nth), tensors, lambda inner, fault=fault: FaultyStorage(inner, [fault]), num_files=4)
        assert not list((tmp_path / str(nth)).glob("*/manifest.json"))


def shard(key, offset, rows, of_rows, columns=4):
    chunk = ChunkStorageMetadata(torch.Size((offset, 0)), torch.Size((rows, columns)))
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(torch.float32), size=torch.Size((of_rows, columns)))
    return WriteItem(index=MetadataIndex(key, (offset, 0)), type=WriteItemType.SHARD, tensor_data=data)


def test_replicated_entries_are_balanced_by_the_bytes_of_shards_and_not_of_whole_tensors():
    # Rank 0 has a small shard of a huge tensor, rank 1 a larger one of a small tensor; ten entries are on both.
    shared = [shard(f"shared{n}", 0, 10, 10) for n in range(10)]
    plans = [SavePlan([shard("huge", 0, 1, 10_000), *shared]), SavePlan([shard("small", 0, 60, 60), *shared])]

    first, second = assign(plans)

    loads = [sum(math.prod(item.tensor_data.chunk.sizes) for item in plan.items) for plan in (first, second)]
    assert abs(loads[0] - loads[1]) <= 40
    assert sorted(item.index.fqn for item in [*first.items, *second.items]) == sorted(
        ["huge", "small", *(f"shared{n}" for n in range(10))]
    )


def test_shards_that_do_not_make_up_a_tensor_are_refused_before_anything_is_written():
    plans = [SavePlan([shard("t", offset, 2, 5)], planner_data={}) for offset in (0, 2)]
    with pytest.raises(ValueError, match=r"do not make up whole tensors:\s+t: chunks hold 16 of 20 elements"):
        BalancedSavePlanner().create_global_plan(plans)


def test_two_models_in_one_process_do_not_take_each_others_plans(tmp_path):
    run = DirectoryRun(resolve(str(tmp_path))[0], str(tmp_path), str(tmp_path))
    ranks, plans = Ranks(), PlanCache()
    for step, value in enumerate([{"a": torch.ones(3)}, {"b": torch.ones(5)}, {"a": torch.full((4,), 2.0)}]):
        saving = Saving({"part": Part(value)}, None, step=step, samples=0, run=run, plans=plans)
        saving.collect()
        saving.write(ranks)
        saving.report(ranks)
        fresh = Part()
        assert checkpoint.restore({"part": fresh}, run=run).step == step
        assert fresh.value.keys() == value.keys()
        assert all(torch.equal(fresh.value[key], value[key]) for key in value)


def test_a_tensor_of_other_sizes_than_its_plan_has_is_not_written(tmp_path):
    planner = BalancedSavePlanner()
    planner.set_up_planner({"part": {"t": torch.zeros(3)}})
    (final,), _ = planner.create_global_plan([planner.create_local_plan()])
    planner.state_dict["part.t"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"part\.t: planned a chunk of sizes \(3,\), found one of \(4,\)"):
        CheckpointWriter(str(tmp_path)).write_data(planner.finish_plan(final), planner)


def test_two_saves_of_one_step_never_share_a_directory(tmp_path):
    names = {saved(tmp_path, {"t": torch.zeros(1)}).name for _ in range(5)}
    assert len(names) == 5


def test_what_was_written_and_is_not_exactly_what_was_planned_is_not_committed(tmp_path):
    planner = BalancedSavePlanner()
    planner.set_up_planner({"part": {"n": 1, "t": torch.zeros(3), "u": torch.zeros(2)}})
    _, metadata = planner.create_global_plan([planner.create_local_plan()])
    written = opened(saved(tmp_path, {"n": 1, "t": torch.zeros(3), "u": torch.zeros(2), "v": torch.zeros(2)})).chunks
    n, t, u, v = (row for (row,) in map(written.get, ("part.n", "part.t", "part.u", "part.v")))
    commit.prove(metadata, [n, t, u])
    for rows, problem in [
        ([n, t], r"part\.u: planned and not written"),
        ([n, t, u, v], r"part\.v: written and not planned"),
        ([n, t, u, n], r"part\.n: a value written 2 times"),
    ]:
        with pytest.raises(ValueError, match=problem):
            commit.prove(metadata, rows)


def test_chunks_that_leave_a_gap_or_overlap_are_not_loaded(tmp_path):
    report = saved(tmp_path, {"t": torch.arange(12.0).reshape(6, 2)})
    (row,) = opened(report).chunks["part.t"]
    box = row.box.__class__
    sizes = {name: path.stat().st_size for path in Path(report.uri).iterdir() for name in [path.name]}
    for boxes, named in (([box((0, 0), (5, 2))], "10 of 12"), ([box((0, 0), (4, 2)), box((3, 0), (3, 2))], "overlap")):
        blocks = [-(-b.num_elements * 4 // row.block_bytes) * 8 for b in boxes]
        rows = [
            row.__class__(**{f: getattr(row, f) for f in row.__slots__} | {"box": b, "checksums": b"\0" * n})
            for b, n in zip(boxes, blocks, strict=True)
        ]
        with pytest.raises(DamagedCheckpoint, match=named):
            opening._opened("here", opened(report).manifest, from_bytes(to_bytes(rows), "here", sizes))


def test_the_reader_has_no_way_to_fall_back_to_another_ranks_stale_metadata():
    # DCP tries `__<rank>.metadata` after any error, if the reader would take `rank=`.
    assert list(inspect.signature(CheckpointReader.read_metadata).parameters) == ["self"]


def test_the_only_private_names_of_dcp_are_those_a_checkpoint_itself_is_made_of():
    root = Path(ray_stateful.__file__).parent
    private = {
        alias.name
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed.checkpoint")
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert private <= {"_StorageInfo"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # stock DCP's, of a save without ranks
def test_a_shard_of_what_stock_dcp_wrote_is_read_without_the_rest_of_its_chunk(tmp_path):
    whole = torch.arange(1 << 20, dtype=torch.float32).reshape(1024, 1024)
    dcp.save({"t": whole, "u": whole.t()}, checkpoint_id=str(tmp_path))
    storage, path = resolve(str(tmp_path))
    found = opening.parse(opening.fetch(storage, path))
    for key, most in (("t", 1.02), ("u", 1.02 * 8)):  # what is no plain contiguous tensor is read whole
        (chunk,) = found.chunks[key]
        into = torch.empty(128, 1024)
        request = Request(chunk, chunk.box.__class__((256, 0), (128, 1024)), into)

        statistics = read_requests(storage, path, {"part": [request]}, None)["part"]

        assert torch.equal(into, (whole if key == "t" else whole.t())[256:384])
        assert statistics.bytes_read <= most * into.nbytes


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # stock DCP's, of a save without ranks
def test_values_of_many_equal_and_many_different_parts_are_read_from_what_stock_dcp_wrote(tmp_path):
    shape, name = (48, 16), "layer"
    value = (
        [(0, 0.5)] * 3000 + [(0, 0.5, None) for _ in range(3000)],
        [(step, 1 / (1 + step), True) for step in range(3000)],
        [(shape, name, complex(n, -n)) for n in range(3000)],
        [torch.Size((n % 7, 3)) for n in range(3000)] + [torch.Size(())],
        {(layer, head): torch.full((2,), layer) for layer in range(50) for head in range(30)},
        {2**61 - 1, 2**70, -5, (torch.float32, "cpu")},
    )
    dcp.save({"value": value}, checkpoint_id=str(tmp_path))
    storage, path = resolve(str(tmp_path))
    (chunk,) = opening.parse(opening.fetch(storage, path)).chunks["value"]

    found = value_of(storage, path, chunk)

    assert found[:4] + found[5:] == value[:4] + value[5:]
    assert found[4].keys() == value[4].keys()


def test_many_small_tensors_take_few_requests(tmp_path):
    tensors = {f"t{n:03}": torch.full((100,), float(n)) for n in range(200)}
    report = saved(tmp_path, tensors)
    fresh = Part()

    restored = checkpoint.restore({"part": fresh}, run=str(tmp_path), limits=ReadLimits())

    assert restored.statistics.num_requests <= 4
    assert all(torch.equal(fresh.value[name], tensor) for name, tensor in tensors.items())
    assert report.num_bytes > 0


def test_the_step_counters_between_large_moments_are_one_request_a_file(tmp_path):
    kinds = {"exp_avg": torch.ones(50_000), "step": torch.tensor(7.0)}
    saved(tmp_path, {f"{n:03}.{kind}": value * n for n in range(40) for kind, value in kinds.items()})
    storage, path = resolve(str(next(tmp_path.glob("checkpoint_s*"))))
    chunks = opening.parse(opening.fetch(storage, path)).chunks
    steps = {key: torch.tensor(0.0) for key in chunks if key.endswith("step")}
    requests = [Request(chunks[key][0], Box((), ()), into) for key, into in steps.items()]

    statistics = read_requests(storage, path, {"part": requests}, None)["part"]

    assert len(requests) == 40
    assert statistics.num_requests <= DEFAULT_NUM_FILES
    assert sum(into.item() for into in steps.values()) == 7 * sum(range(40))


@pytest.mark.parametrize("was_on", [True, False])
def test_the_search_for_cycles_is_on_after_an_index_that_is_refused_if_it_was_before(tmp_path, monkeypatch, was_on):
    def refuse(*args):
        refused.append(gc.isenabled())
        raise HostileCheckpoint("here", "no")

    refused = []
    saved(tmp_path, {"t": torch.arange(10.0)})
    storage, path = resolve(str(next(tmp_path.glob("checkpoint_s*"))))
    raw = opening.fetch(storage, path)
    monkeypatch.setattr(opening.index, "from_bytes", refuse)
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(HostileCheckpoint):
            opening.parse(raw)
        assert (refused, gc.isenabled()) == ([False], was_on)
    finally:
        gc.enable()


def test_a_file_that_is_shorter_than_it_was_written_is_not_committed(tmp_path):
    def truncating(inner):
        return FaultyStorage(inner, [Truncate("sink.write", nth=2, keep_bytes=100)])

    with pytest.raises(SaveFailed, match=r"__0_0\.distcp: has 559 bytes where rank 0 looks; 20,459 were written"):
        saved(tmp_path, {"t": torch.arange(5000.0)}, truncating)
    assert checkpoint.restore({"part": Part()}, run=str(tmp_path)) is None

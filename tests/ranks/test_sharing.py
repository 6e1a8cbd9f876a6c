"""Replicas: each byte is read from storage once, by one of the ranks that want it, and is right on all of them."""

import warnings
from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard as Shard1
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.tensor import Replicate, Shard

from ray_stateful import Checkpointer, ModelState, RandomState, checkpoint
from ray_stateful.errors import NoIntactCheckpoint, RankFailed
from ray_stateful.ranks import Ranks
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage import sharing
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import FaultyStorage, Flip, run_ranks
from tests.ranks.placed import Placed, Whole, counted

SHAPES = {"large": (4096, 64), "uneven": (37, 5), "one_row": (1, 8), "scalar": (), "bfloat16": (300, 2), "none": (0, 3)}


VALUES = counted(SHAPES, {"bfloat16"}) | {"plain": torch.arange(1000.0)}


def restore_as(run, placements_of_case):
    sharing._BUCKET_BYTES = 64 << 10  # so that several buckets, and tensors larger than one, are sent
    sharing._TOGETHER_BYTES = 0
    results = []
    world = dist.get_world_size()
    if run.endswith("saved"):
        state = {"part": Placed(VALUES, (world,), [Shard(0)], True), "random": RandomState()}
        checkpoint.save(state, step=1, run=run, timeout_s=30)
    storage, path = resolve(run)
    for mesh_shape, placements in placements_of_case:
        part = Placed(VALUES, mesh_shape, placements, False)
        # Beside a part that is another one on every rank, as random streams are.
        # What is sent goes through the host, whatever device is the default. (Of a shard torch asks that one.)
        with torch.device("meta") if placements == [Replicate()] else nullcontext():
            report = checkpoint.restore({"part": part, "random": RandomState()}, run=run, timeout_s=30)
        of_part = next(line for line in str(report).splitlines() if line.startswith("  part"))
        results.append((part.is_right(), report.statistics.bytes_read, report.statistics.bytes_wanted, of_part))
    # One rank meets damage among what it reads for all: the others must not be left waiting for it.
    faulty = FaultyStorage(storage.inner, [Flip("read", path="__", rank=1, num_times=None, byte=300)])
    try:
        checkpoint.restore(
            {"part": Placed(VALUES, (world,), [Replicate()], False)}, run=DirectoryRun(faulty, path, run), timeout_s=30
        )
        results.append("restored")
    except NoIntactCheckpoint as error:
        results.append(type(error).__name__)
    return results


def count_meetings(run):
    state = {"part": Placed(VALUES, (dist.get_world_size(),), [Shard(0)], True), "random": RandomState()}
    checkpoint.save(state, step=1, run=run, timeout_s=30)
    with patch.object(Ranks, "within_deadline", autospec=True, side_effect=Ranks.within_deadline) as meetings:
        checkpoint.restore(state, run=run, timeout_s=30)
    return [call.args[1] for call in meetings.call_args_list]


def test_the_ranks_meet_nine_times_in_a_restore_whatever_there_is_in_it(tmp_path):
    phases = ["compare parts", "look for checkpoints", "collect the state", "match the state", "plan to read", "read"]
    # Of what all of them hold whole, little as it is: one sends it to the others, and all say that they have it.
    phases += ["send what was read", "send what was read", "load the state"]
    assert run_ranks(2, count_meetings, str(tmp_path)) == [phases] * 2


def count_meetings_of_a_save(run):
    state = {"part": Placed(VALUES, (dist.get_world_size(),), [Shard(0)], True), "random": RandomState()}
    saver = Checkpointer(state, every_n_steps=1, run=run, at_end=False)
    found = []
    for _ in range(2):
        with patch.object(Ranks, "within_deadline", autospec=True, side_effect=Ranks.within_deadline) as meetings:
            saver.save()
        found.append([call.args[1] for call in meetings.call_args_list])
    return found


def test_the_ranks_meet_six_times_in_a_save_of_a_known_structure_and_four_more_in_the_first(tmp_path):
    planning = ["plan", "gather plans", "plan", "scatter plans"]
    before, after = ["agree on the step", "compare plans"], ["write", "gather results", "commit", "report"]
    assert run_ranks(2, count_meetings_of_a_save, str(tmp_path)) == [[before + planning + after, before + after]] * 2


BYTES = sum(value.nbytes for value in VALUES.values())


def test_replicated_tensors_are_read_once_and_sent_to_the_other_replicas(tmp_path):
    cases = [
        ((4,), [Replicate()]),
        ((4,), [Shard(0)]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((2, 2), [Shard(0), Replicate()]),
        ((2, 2), [Shard(0), Shard(1)]),
    ]
    outcomes = run_ranks(4, restore_as, str(tmp_path / "saved"), cases)

    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        for (right, bytes_read, bytes_wanted, of_part), case in zip(outcome, cases, strict=False):
            assert right, case
            # Whatever the placement: what the world needs, once; and each rank's own stream of 5,056 bytes.
            assert bytes_wanted == BYTES + 4 * 5056, case
            assert bytes_read <= 1.02 * bytes_wanted or case[1] == [Shard(0), Shard(1)], case
            assert "x of what this world needs" in of_part
        assert outcome[-1] == "NoIntactCheckpoint"


LAYOUTS = {
    "one element of a row": lambda value: torch.tensor([[value, 2.0]])[:, 0],
    "conjugated": lambda value: torch.tensor([value + 1j, 2.0]).conj(),
    "negated": lambda value: torch.tensor([value + 1j, value + 2j]).conj().imag,
    "negated complex": lambda value: torch._neg_view(torch.tensor([value + 1j, 2.0], dtype=torch.complex128)),
}


def restore_layouts(run):
    checkpoint.save({"part": Whole({n: make(3.0) for n, make in LAYOUTS.items()})}, step=1, run=run, timeout_s=20)
    tensors = {name: make(0.0) for name, make in LAYOUTS.items()}
    checkpoint.restore({"part": Whole(tensors)}, run=run, timeout_s=20)
    wrong = [name for name, make in LAYOUTS.items() if not torch.equal(tensors[name], make(3.0))]
    # The weights of adapters are sent, too: rank 0 has them, as they were loaded from anywhere.
    adapter = torch.nn.Module()
    adapter.lora_scale = torch.nn.Parameter(torch.zeros(1))
    saved = {"base_model.model.lora_scale": torch.tensor([[3.0, 2.0]])[:, 0]} if dist.get_rank() == 0 else {}
    ModelState(adapter, is_peft=True).load_state_dict(saved)
    return wrong if torch.equal(adapter.lora_scale, torch.tensor([3.0])) else [*wrong, "adapter"]


def test_a_replica_is_sent_what_it_holds_in_whatever_layout_it_holds_it(tmp_path):
    assert run_ranks(2, restore_layouts, str(tmp_path)) == [[], []]


def restore_where_nothing_can_be_copied_to(run):
    checkpoint.save({"part": Whole({"first": torch.ones(4), "second": torch.ones(4)})}, step=1, run=run, timeout_s=20)
    # Rank 0 reads for both. Four elements in one place can't be copied to, and rank 1 finds out when it is sent them.
    first = torch.zeros(4) if dist.get_rank() == 0 else torch.zeros(1).expand(4)
    part = Whole({"first": first, "second": torch.zeros(4)})
    try:
        checkpoint.restore({"part": part}, run=run, timeout_s=20)
    except RankFailed as error:
        return sorted(error.causes), str(error)


def test_a_rank_that_can_not_copy_what_it_is_sent_is_every_ranks_error_with_the_cause(tmp_path):
    outcomes = run_ranks(2, restore_where_nothing_can_be_copied_to, str(tmp_path))

    assert [outcome[0] for outcome in outcomes] == [[1], [1]]
    for _, text in outcomes:
        assert "failed to send what was read" in text
        assert "refers to a single memory location" in text


def restore_beside_shards(run):
    """Whether a tensor that FSDP1 has cut, and whole ones beside it, are right; and how many bytes all ranks read."""
    rank = dist.get_rank()

    def state(value):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch: these tensors are deprecated
            cut = init_from_local_shards([Shard1.from_tensor_and_offsets(torch.full((3,), value), [3 * rank], rank)], 6)
        whole = {name: torch.full((1 << 18,), value) for name in ("first", "second")}
        return Whole({"cut": cut, **whole})

    checkpoint.save({"part": state(7.0)}, step=1, run=run, timeout_s=30)
    part = state(0.0)
    report = checkpoint.restore({"part": part}, run=run, timeout_s=30)
    local = part.tensors["cut"].local_shards()[0].tensor
    right = torch.equal(local, torch.full((3,), 7.0)) and torch.equal(
        part.tensors["first"], torch.full((1 << 18,), 7.0)
    )
    return right, report.statistics.bytes_read


def test_tensors_beside_what_fsdp1_has_cut_are_read_once(tmp_path):
    outcomes = run_ranks(2, restore_beside_shards, str(tmp_path))

    assert [right for right, _ in outcomes] == [True, True]
    # Two tensors of 1 MiB, and 24 bytes.
    assert all((2 << 20) + 24 <= num_bytes < 1.01 * (2 << 20) for _, num_bytes in outcomes)


def restore_where_a_rank_has_no_shard(run):
    """The shards of two rows on three ranks, of a part that saves in the foreground, or in the background."""
    rank, found = dist.get_rank(), []

    def state(value):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch: these tensors are deprecated
            shards = [Shard1.from_tensor_and_offsets(torch.full((1,), value), [rank], rank)] if rank < 2 else []
            return Whole({"cut": init_from_local_shards(shards, 2)})

    for background in (False, True):
        where = f"{run}/{background}"
        saver = Checkpointer({"part": state(7.0)}, every_n_steps=1, background=background, run=where, timeout_s=30)
        with saver:
            saver.step()
        part = state(0.0)
        checkpoint.restore({"part": part}, run=where, timeout_s=30)
        found.append([shard.tensor.tolist() for shard in part.tensors["cut"].local_shards()])
    return found


def test_what_fsdp1_has_cut_is_restored_on_ranks_some_of_which_have_no_shard_of_it(tmp_path):
    outcomes = run_ranks(3, restore_where_a_rank_has_no_shard, str(tmp_path))

    assert outcomes == [[[[7.0]]] * 2, [[[7.0]]] * 2, [[], []]]

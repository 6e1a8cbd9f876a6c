"""Initial weights on several ranks: each reads its own shards, and a checkpoint of the run is never overlooked."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from ray_stateful import Checkpointer, ModelState, OptimizerState, RandomState, checkpoint
from ray_stateful.errors import NoInitialWeights, NoIntactCheckpoint, RestoreFailed, StateMismatch
from ray_stateful.storage import sharing
from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.testing import run_ranks
from tests.ranks.wrapper_models import Tied, assert_same, ddp, fsdp2, leaves

# Nothing is read along: a byte that is asked for is a byte of a shard.
EXACT = ReadLimits(max_gap_bytes=0)


def write_weights(directory, *, tied=True, dtype=None, prefix=""):
    """Two files and an index, as Hugging Face has them; a tied head is in none of them."""
    directory.mkdir()
    state = Tied(tied=tied, seed=1).state_dict()
    state = {f"{prefix}{name}": value for name, value in state.items() if not (tied and "lm_head" in name)}
    cast = {name: value.to(dtype) if dtype and value.is_floating_point() else value for name, value in state.items()}
    names = sorted(cast)
    files = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for file, of_file in files.items():
        save_file({name: cast[name].clone() for name in of_file}, directory / file)
    weight_map = {name: file for file, of_file in files.items() for name in of_file}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def as_the_library_reads(directory):
    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        found |= load_file(file)
    return found


@contextmanager
def reads_of(suffix):
    """Every range that this process asks storage for, of files with this suffix: (path, offset, bytes that came)."""
    inner, reads = PyarrowStorage.read, []

    def read(self, path, offset=0, length=None):
        data = inner(self, path, offset, length)
        if path.endswith(suffix):
            reads.append((path, offset, len(data)))
        return data

    PyarrowStorage.read = read
    try:
        yield reads
    finally:
        PyarrowStorage.read = inner


def bytes_of_tensors(reads):
    """What was read behind the headers."""
    begins = {}
    for path in {path for path, _, _ in reads}:
        begins[path] = 8 + int.from_bytes(Path(path).read_bytes()[:8], "little")
    return sum(size for path, offset, size in reads if offset >= begins[path])


def begin(model, weights, run, **of_model):
    part = ModelState(model, **of_model)
    with reads_of(".safetensors") as reads:
        report = checkpoint.restore({"model": part}, initial=str(weights), run=str(run), limits=EXACT, timeout_s=30)
    shards = [value.to_local() for value in part.state_dict().values() if isinstance(value, DTensor)]
    return {
        "state": leaves(part.state_dict()),
        "head": leaves({"head": getattr(model, "module", model).lm_head.weight.detach()})["head"],
        "read": bytes_of_tensors(reads),
        "shards": sum(shard.nbytes for shard in shards),
        "report": str(report),
        "counted": (report.statistics.bytes_read, report.statistics.bytes_wanted),
    }


def begin_each(weights, half, untied, run):
    sharing._TOGETHER_BYTES = 0  # or one rank would read all of so small a model, for all
    found = [
        begin(fsdp2(Tied(seed=2)), weights, run),
        begin(ddp(Tied(seed=2)), weights, run),
        begin(fsdp2(Tied(seed=2)), half, run),
        begin(fsdp2(Tied(tied=False, seed=2)), untied, run, skip_task_head_prefixes=["lm_head."]),
    ]
    fresh = leaves({"head": fsdp2(Tied(tied=False, seed=2)).lm_head.weight.detach()})["head"]
    return found, fresh


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_each_rank_reads_the_bytes_of_its_own_shards_and_gets_what_the_library_reads(tmp_path, num_ranks):
    weights = write_weights(tmp_path / "weights")
    half = write_weights(tmp_path / "half", dtype=torch.bfloat16, prefix="module._orig_mod.")
    untied = write_weights(tmp_path / "untied", tied=False)
    expected = as_the_library_reads(weights)
    total = sum(value.nbytes for value in expected.values())

    ranks = run_ranks(num_ranks, begin_each, weights, half, untied, tmp_path / "run")

    for outcome in ranks:
        assert not isinstance(outcome, BaseException), outcome
    sharded, replicated, cast, headless = zip(*(found for found, _ in ranks), strict=True)
    for found in (*sharded, *replicated):
        assert_same(found["state"], expected)
        assert torch.equal(found["head"], expected["embed_tokens.weight"])
    # Each byte of the files is asked for once, whoever wants it; buffers of 8 bytes are dealt out among the ranks.
    assert sum(found["read"] for found in sharded) == total == sum(found["read"] for found in replicated)
    for found in sharded:
        assert found["read"] - found["shards"] in (0, 8, 16)
        assert found["counted"] == (total, total)
    assert max(found["read"] for found in replicated) <= total - (num_ranks - 1) * 100

    halves = {name.removeprefix("module._orig_mod."): value for name, value in as_the_library_reads(half).items()}
    for found in cast:
        assert_same(found["state"], {n: v.float() if v.is_floating_point() else v for n, v in halves.items()})
        assert "cast from bfloat16 to float32: 14 tensors" in found["report"]
        assert "1.00x of what this world needs; unverified" in found["report"]
    assert sum(found["read"] for found in cast) == sum(value.nbytes for value in halves.values())

    body = {name: value for name, value in as_the_library_reads(untied).items() if name != "lm_head.weight"}
    for found, (_, fresh) in zip(headless, ranks, strict=True):
        assert_same({name: value for name, value in found["state"].items() if name != "lm_head.weight"}, body)
        assert torch.equal(found["head"], fresh)
        assert "lm_head.weight is left out on request: kept as built" in found["report"]


def build(seed):
    model = fsdp2(Tied(seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer), "random": RandomState()}


def go_on(weights, run):
    """A run's first start, a step and a save; its second start; and one after its only checkpoint was damaged."""
    found = {}
    model, state = build(seed=2)
    with Checkpointer(state, run=str(run), timeout_s=30) as checkpointer:
        report = checkpointer.restore(initial=str(weights))
        found["first"] = (report.initial, report.step, checkpointer.step_count)
        found["parts"] = {part.name: part.outcome for part in report.parts}
    found["saved by a run that trained nothing"] = sorted(path.name for path in run.glob("*"))
    with Checkpointer(state, run=str(run), timeout_s=30) as checkpointer:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        checkpointer.step()
    trained = leaves(state["model"].state_dict())

    _, state = build(seed=3)
    with (
        Checkpointer(state, run=str(run), at_end=False, timeout_s=30) as checkpointer,
        reads_of("safetensors") as reads,
    ):
        report = checkpointer.restore(initial=str(weights))
        found["second"] = (report.initial, report.step, checkpointer.step_count)
    assert_same(leaves(state["model"].state_dict()), trained)
    found["looked at the weights"] = reads

    dist.barrier()
    if dist.get_rank() == 0:
        next(run.glob("checkpoint_s*/index.arrow")).write_bytes(b"")
    dist.barrier()
    model, state = build(seed=4)
    before = leaves(state["model"].state_dict())
    with pytest.raises(NoIntactCheckpoint):
        checkpoint.restore(state, initial=str(weights), run=str(run), timeout_s=30)
    assert_same(leaves(state["model"].state_dict()), before)
    return found


def test_a_checkpoint_of_the_run_is_resumed_instead_and_a_damaged_one_is_no_reason_to_begin_anew(tmp_path):
    weights = write_weights(tmp_path / "weights")

    for found in run_ranks(3, go_on, weights, tmp_path / "run"):
        assert not isinstance(found, BaseException), found
        assert found["first"] == (True, 0, 0)
        assert found["parts"] == {"model": "initial", "optimizer": "fresh", "random": "fresh"}
        assert found["saved by a run that trained nothing"] == []
        assert found["second"] == (False, 1, 1)
        assert found["looked at the weights"] == []


def save_another(run):
    model, state = build(seed=1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state["optimizer"].optimizer[0].step()
    return checkpoint.save(state, step=7, samples=70, run=str(run), timeout_s=30).uri, leaves(
        state["model"].state_dict()
    )


def begin_from_another(uri, run):
    _, state = build(seed=2)
    random = torch.random.get_rng_state()
    with reads_of(".distcp") as reads:
        report = checkpoint.restore(state, initial=uri, run=str(run), verify="full", limits=EXACT, timeout_s=30)
    assert torch.equal(torch.random.get_rng_state(), random)
    optimizer = state["optimizer"].optimizer[0]
    # Looked at without `state_dict`, which would make the moments that are not there.
    return leaves(state["model"].state_dict()), len(optimizer.state), report, len(reads)


def test_from_a_checkpoint_of_another_run_the_model_alone_is_taken(tmp_path):
    (uri, saved), _ = run_ranks(2, save_another, tmp_path / "another")

    for outcome in run_ranks(3, begin_from_another, uri, tmp_path / "run"):
        assert not isinstance(outcome, BaseException), outcome
        model, num_moments, report, num_reads = outcome
        assert_same(model, saved)
        assert num_moments == 0
        assert num_reads > 0
        assert (report.step, report.samples, report.initial, report.verified) == (0, 0, True, True)
        assert {part.name: part.outcome for part in report.parts} == {
            "model": "initial",
            "optimizer": "fresh",
            "random": "fresh",
        }
        assert "resharded 2 -> 3" in str(report)


def refusals(weights, wrong, run):
    """What each rank gets, with a model that must stay as it was built."""
    model = fsdp2(Tied(tied=False, seed=2))
    before = leaves(ModelState(model).state_dict())
    rank, found = dist.get_rank(), []
    for initial in (str(wrong), str(weights / "gone"), "nowhere://x", f"{weights}/{rank}"):
        try:
            with reads_of(".safetensors") as reads:
                checkpoint.restore({"model": ModelState(model)}, initial=initial, run=str(run), timeout_s=30)
        except (RestoreFailed, ValueError) as error:
            found.append((type(error), str(error), bytes_of_tensors(reads)))
    assert_same(leaves(ModelState(model).state_dict()), before)
    return found


def test_what_does_not_fit_is_named_on_every_rank_before_anything_is_read(tmp_path):
    weights = write_weights(tmp_path / "weights")
    wrong = tmp_path / "wrong.safetensors"
    state = {name: value.clone() for name, value in Tied(seed=1).state_dict().items() if "up.bias" not in name}
    save_file({**state, "scale": torch.ones(2), "more": torch.ones(1), "blocks.0.seen": torch.tensor(1.0)}, wrong)

    ranks = run_ranks(3, refusals, weights, wrong, tmp_path / "run")

    for found in ranks:
        assert not isinstance(found, BaseException), found
        assert [kind for kind, _, _ in found] == [StateMismatch, NoInitialWeights, NoInitialWeights, ValueError]
        assert [size for _, _, size in found] == [0, 0, 0, 0]
        named, gone, nowhere, different = (text for _, text, _ in found)
        for line in (
            "model.blocks.0.up.bias is not in the checkpoint",
            "model.blocks.1.up.bias is not in the checkpoint",
            "model.more is in the checkpoint, but not in the model",
            "model.scale: shape (1,) here, (2,) in the checkpoint",
            "model.blocks.0.seen: dtype int64 here, float32 in the checkpoint",
        ):
            assert line in named
        assert "neither safetensors nor a checkpoint is there" in gone
        assert "nowhere" in nowhere
        assert "is not the same on ranks [1, 2] as on rank 0" in different

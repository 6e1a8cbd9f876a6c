"""What the saves after the first one build on: the same plan, and an index that differs in checksums and values."""

import shutil
from dataclasses import fields, replace

import pytest
import torch

from ray_stateful import checkpoint
from ray_stateful.checkpoint import Saving
from ray_stateful.errors import SaveFailed
from ray_stateful.format import index
from ray_stateful.format.chunks import Box
from ray_stateful.format.rows import tree_row
from ray_stateful.ranks import Ranks
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage import commit, opening
from ray_stateful.storage.plan_cache import PlanCache, entries_digest, structure_digest
from ray_stateful.storage.planner import BalancedSavePlanner
from ray_stateful.storage.retries import RetryingStorage
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage
from tests.part import Part, opened
from tests.rows import tensor_row


class Counting(Ranks):
    """The phases in which something was gathered, and what."""

    def gather(self, phase, value):
        gathered.append((phase, value))
        return super().gather(phase, value)


gathered = []


@pytest.fixture
def save(tmp_path):
    storage = resolve(str(tmp_path))[0]
    run = DirectoryRun(storage, str(tmp_path), str(tmp_path))
    plans, steps = PlanCache(), iter(range(100))

    def _save(value, plans=plans, rules=(), samples=0):
        gathered.clear()
        inner = FaultyStorage(storage.inner, list(rules)) if rules else storage.inner
        faulty = DirectoryRun(RetryingStorage(inner, storage.policy), run.path, run.uri)
        step = next(steps)
        saving = Saving({"part": Part(value)}, None, step=step, samples=samples, run=faulty, plans=plans)
        saving.collect()
        saving.write(Counting())
        return saving.report(Ranks())

    return _save


def state(number):
    return {
        "weights": torch.full((300,), float(number)),
        "moments": [torch.arange(6.0) * number, torch.tensor(number)],
        "rate": 0.1 * number,
        "epoch": number,
        "schedule": {"last": number, "milestones": {1: number}},
    }


def test_the_second_save_of_a_structure_gathers_neither_plans_nor_rows(save):
    save(state(3))
    assert [phase for phase, _ in gathered] == ["gather plans", "gather results"]
    save(state(4))
    ((phase, sent),) = gathered
    assert phase == "gather results"
    assert isinstance(sent, commit.Repeated)


def test_a_save_that_repeats_the_places_of_the_last_one_commits_what_one_planned_anew_would(save):
    save(state(3))
    repeated, anew = save(state(4)), save(state(4), PlanCache())

    assert opened(repeated).chunks == opened(anew).chunks
    assert opened(repeated).trees == opened(anew).trees
    fresh = Part()
    checkpoint.restore({"part": fresh}, run=repeated.uri.rpartition("/")[0], checkpoint=repeated.uri, verify="full")
    assert torch.equal(fresh.value.pop("weights"), state(4)["weights"])
    moments = fresh.value.pop("moments")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(moments, state(4)["moments"], strict=True))
    assert fresh.value == {name: state(4)[name] for name in ("rate", "epoch", "schedule")}


def test_values_that_came_to_lie_elsewhere_are_committed_anew(save):
    # Equal values are stored once: where two of them differ now, everything behind has moved.
    save({"a": 0.5, "b": 0.5, "t": torch.ones(3)})
    report = save({"a": 0.5, "b": 0.25, "t": torch.ones(3)})
    ((_, sent),) = gathered
    assert not isinstance(sent, commit.Repeated)
    fresh = Part()
    checkpoint.restore({"part": fresh}, run=report.uri.rpartition("/")[0])
    assert (fresh.value["a"], fresh.value["b"]) == (0.5, 0.25)


def test_values_that_an_index_has_no_room_for_are_not_committed_by_a_first_save_nor_by_one_that_builds_on_it(
    save, monkeypatch, tmp_path
):
    with pytest.raises(SaveFailed, match=r"part\.long: .* store it as a tensor"):
        save({"long": dict.fromkeys("abcdefghijklmnopqrstuvwx", "y" * (1 << 20)), "t": torch.ones(3)})
    monkeypatch.setattr(index, "MAX_VALUES_BYTES", 3 << 20)
    save({"text": "x" * (1 << 20), "t": torch.ones(3)})
    # As long in its file, and six times as long in the index.
    with pytest.raises(SaveFailed, match=r"part\.text: .* store it as a tensor"):
        save({"text": "\0" * (1 << 20), "t": torch.ones(3)})
    ((_, sent),) = gathered
    assert isinstance(sent, commit.Repeated)
    assert len(list(tmp_path.glob("*/manifest.json"))) == 1


def test_an_index_that_readers_refuse_is_not_committed_by_a_first_save_nor_by_one_that_builds_on_it(
    save, monkeypatch, tmp_path
):
    for is_first in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(opening, "MAX_INDEX_BYTES", 100)
            with pytest.raises(SaveFailed, match="an index has 100 at most"):
                save(state(3))
        assert isinstance(gathered[-1][1], commit.Repeated) != is_first
        assert list(tmp_path.glob("*/manifest.json")) == []
        report = save(state(3))
        shutil.rmtree(tmp_path / report.name)


def test_a_manifest_that_readers_refuse_is_not_committed_by_a_first_save_nor_by_one_that_builds_on_it(save, tmp_path):
    for _ in range(2):
        with pytest.raises(SaveFailed, match="samples is -1"):
            save(state(3), samples=-1)
        assert list(tmp_path.glob("checkpoint_*/manifest.json")) == []
        # So that the next one builds on it.
        report = save(state(3))
        shutil.rmtree(tmp_path / report.name)


def test_a_save_after_one_that_wrote_elsewhere_and_failed_builds_on_the_last_commit(save):
    save(state(3))
    # The second file is tried again under another name, and the commit fails after that.
    with pytest.raises(SaveFailed):
        save(
            state(4),
            rules=[
                Fail("sink.write", nth=2, error=ConnectionResetError("reset")),
                Fail("write", nth=1, error=PermissionError("denied")),
            ],
        )
    report = save(state(5))
    fresh = Part()
    checkpoint.restore({"part": fresh}, run=report.uri.rpartition("/")[0], verify="full")
    assert torch.equal(fresh.value["weights"], state(5)["weights"])
    assert fresh.value["epoch"] == 5


def test_a_save_to_the_places_of_one_that_was_never_committed_does_not_build_on_it(save):
    save({"a": 0.5, "b": 0.5, "t": torch.ones(3), "u": torch.ones(3000)})
    # All that lies behind "b" comes to lie elsewhere.
    other = {"a": 0.5, "b": 0.25, "t": torch.ones(3), "u": torch.full((3000,), 2.0)}
    with pytest.raises(SaveFailed, match="denied"):
        save(other, rules=[Fail("write", path="index", error=PermissionError("denied"))])
    report = save(other)
    fresh = Part()
    checkpoint.restore({"part": fresh}, run=report.uri.rpartition("/")[0], checkpoint=report.uri, verify="full")
    assert (fresh.value["a"], fresh.value["b"]) == (0.5, 0.25)
    assert torch.equal(fresh.value["u"], other["u"])


def test_a_commit_is_built_on_only_where_every_rank_wrote_to_its_own_places_again():
    plans = PlanCache()
    plans.keep_commit([1, 2], None)
    assert [plans.are_places(places) for places in ([1, 2], [1, 3], [3, 2])] == [True, False, False]


def test_a_plan_is_used_again_only_where_every_rank_has_its_own_structure_again():
    plans = PlanCache()
    plans.keep([1, 2], None, None)
    assert [plans.find(digests) is not None for digests in ([1, 2], [1, 3], [3, 2])] == [True, False, False]
    # Nor do the words of two entries run together.
    assert structure_digest(["ab", "c"], 1) != structure_digest(["a", "bc"], 1)
    assert entries_digest({"a": "b", "c": "d"}) != entries_digest({"a": "bc=d"})


CHANGES = {
    "key": ["u"],
    "path": [("part", 0)],
    "dtype": ["int32", None],
    "shape": [(5, 3)],
    "box": [Box((1, 0), (4, 3)), Box((0, 0), (3, 3))],
    "file": ["__1_0.distcp"],
    "item_offset": [1],
    "item_length": [1],
    "data_offset": [1],
    "block_bytes": [2048],
    "checksums": [b"another!another!"],
    "value": ["1"],
}


def test_a_row_that_differs_in_anything_but_checksums_and_values_is_in_another_place():
    def digest(row):
        return commit.places_digest([commit.tree_result(row)])

    row = replace(tensor_row((4, 3)), checksums=b"checksum")
    assert CHANGES.keys() == {field.name for field in fields(row)}
    for name, others in CHANGES.items():
        assert all(digest(row) != digest(replace(row, **{name: other})) for other in others), name
    assert digest(row) == digest(replace(row, checksums=b"another!"))
    assert digest(replace(row, value="1")) == digest(replace(row, value="2"))


def test_a_container_that_differs_between_ranks_is_committed_by_no_first_save_nor_by_one_that_builds_on_it():
    def on_ranks(*texts):
        return [[commit.tree_result(tree_row(("part", "own"), text))] for text in texts]

    def again(results):
        return committed.again([commit.repeated(of_rank) for of_rank in results])

    same, different = on_ranks("[1]", "[1]"), on_ranks("[1]", "[2]")
    committed = commit.Committed.of(b"", commit.collect(same)[0], same)
    assert again(same)
    for commit_of in (commit.collect, again):
        with pytest.raises(ValueError, match=r"part\.own: different values on different ranks"):
            commit_of(different)


def test_what_is_committed_is_not_discarded(tmp_path):
    storage, path = resolve(str(tmp_path))
    for name in ("__0_0.distcp", "manifest.json"):
        storage.write(f"{path}/save/{name}", b"x")
        commit.discard(storage, f"{path}/save", 30.0)
        assert storage.sizes(f"{path}/save") == ({} if name == "__0_0.distcp" else {name: 1})


@pytest.mark.parametrize(
    "changed",
    [
        {"t": torch.zeros(2, 3), "n": {1: 2}},
        {"t": torch.zeros(3, 2, dtype=torch.float64), "n": {1: 2}},
        {"t": torch.zeros(3, 2), "n": {1: 2}, "u": torch.zeros(1)},
        {"t": torch.zeros(3, 2), "n": {1: torch.tensor(2)}},
        {"t": 4, "n": {1: 2}},
    ],
    ids=["shape", "dtype", "another", "a value became a tensor", "a tensor became a value"],
)
def test_any_change_of_structure_is_described_by_other_words(changed):
    def described(value):
        planner = BalancedSavePlanner()
        planner.set_up_planner({"part": value})
        return list(planner.describe())

    before = {"t": torch.zeros(3, 2), "n": {1: 2}}
    assert described(before) == described({"t": torch.ones(3, 2), "n": {1: 5}})
    assert described(before) != described(changed)


def test_a_key_that_was_an_int_is_told_from_the_position_in_a_list():
    def described(value):
        planner = BalancedSavePlanner()
        planner.set_up_planner({"part": value})
        return list(planner.describe())

    assert described({"n": {0: torch.zeros(1)}}) != described({"n": [torch.zeros(1)]})

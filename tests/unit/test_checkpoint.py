"""One process: what is saved comes back, also through stock tools, also from stock tools."""

import collections
import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.api import CheckpointException

from ray_stateful import candidates, checkpoint, listing
from ray_stateful.candidates import Rejected, agree
from ray_stateful.errors import (
    NoIntactCheckpoint,
    RankFailed,
    SaveFailed,
    StateMismatch,
    StorageError,
    UnsupportedState,
)
from ray_stateful.format import layout, strict_json
from ray_stateful.ranks import Failure
from ray_stateful.runs import DirectoryRun
from ray_stateful.stateful_wrappers import ModelState
from ray_stateful.states.loader import LoaderState, Merge
from ray_stateful.states.part import World
from ray_stateful.storage import commit
from ray_stateful.storage.reader import CheckpointReader
from ray_stateful.storage.retries import RetryPolicy
from ray_stateful.storage.uris import resolve
from ray_stateful.storage.writer import CheckpointWriter
from ray_stateful.testing import Fail, FaultyStorage, Hang
from ray_stateful.verify import verify
from tests.codes import Codes, FlatCodes
from tests.part import Part, opened
from tests.ranks.placed import Whole

# One process without a process group is what these tests are about.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def manifest_of(report):
    with open(f"{report.uri}/{layout.MANIFEST}") as file:
        return json.load(file)


def mixed():
    return {
        "numbers": {1: "an int key", "one": "a string key", 2.5: (1, 2, float("nan"))},
        "milestones": collections.Counter({30: 1, 80: 2}),
        "empty": {},
        "nested": [{"weights": torch.arange(6.0).reshape(2, 3)}, None, {"deep": [torch.tensor(True), 7]}],
        "by_number": {0: {"moment": torch.randn(3)}, 1: {"moment": torch.randn(2)}},
        "array": np.arange(4, dtype=np.float16),
        "scalar": np.float64(1.5),
        "bytes": b"\x00\xff",
        "bfloat16": torch.randn(5).bfloat16(),
        "no_elements": torch.empty(0, 3),
    }


def assert_same(found, expected, where="state"):
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype, where
        assert np.array_equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected) or set(found) == set(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for n, item in enumerate(expected):
            assert_same(found[n], item, f"{where}[{n}]")
    else:
        assert found == expected or (found != found and expected != expected), where


def test_a_part_that_is_still_empty_takes_entries_that_are_named_as_those_of_ranks(tmp_path):
    saved = {"rank_0": torch.ones(2), "rank_1": torch.zeros(2)}
    checkpoint.save({"part": Part(saved)}, step=1, run=str(tmp_path))
    fresh = Part({})
    checkpoint.restore({"part": fresh}, run=str(tmp_path))
    assert {name: value.tolist() for name, value in fresh.value.items()} == {"rank_0": [1, 1], "rank_1": [0, 0]}


def test_a_value_of_more_lists_than_a_reader_makes_is_refused_when_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(strict_json, "_FREE_CONTAINERS", 1_000)
    with pytest.raises(SaveFailed, match="store it as a tensor"):
        checkpoint.save({"part": Part({"lists": [[]] * 10_000})}, step=1, run=str(tmp_path))


def test_a_run_lists_last_what_a_restore_tries_first(tmp_path):
    names = [checkpoint.save({"part": Part({"a": n})}, step=1, run=str(tmp_path)).name for n in range(3)]
    (tmp_path / names[0] / layout.MANIFEST).write_text("{")
    storage, path = resolve(str(tmp_path))

    listed = [entry.name for entry in listing.entries(storage, path, None)]

    assert listed == [names[1], names[2], names[0]]
    assert list(DirectoryRun(storage, path, path).candidates()) == listed[::-1]


def test_any_structure_comes_back_as_it_was(tmp_path):
    value = mixed()
    saved = checkpoint.save({"thing": Part(value)}, step=7, samples=70, run=str(tmp_path))
    fresh = Part()

    report = checkpoint.restore({"thing": fresh}, run=str(tmp_path))

    assert (report.step, report.samples, report.verified) == (7, 70, True)
    assert saved.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*/__0_*.distcp"))
    assert_same(fresh.value, value)


class Ordered(Part):
    "A part that goes by the order of its dict, as a torch optimizer does."

    def load_state_dict(self, value):
        for mine, theirs in zip(self.value.values(), value.values(), strict=True):
            mine.copy_(theirs)


def test_a_dict_above_tensors_comes_back_in_the_order_that_the_part_has(tmp_path):
    saved = {"weight": torch.ones(1), "bias": torch.zeros(1), "a": torch.full((1,), 2.0)}
    layered = {"z": [{"y": torch.ones(1), "x": 1}, 3], "m": {"b": 1, "a": 2}, "c": torch.ones(1), "new": 5}
    checkpoint.save({"ordered": Part(saved), "layered": Part(layered)}, step=1, run=str(tmp_path))
    ordered = Ordered({name: torch.full((1,), 9.0) for name in saved})
    fresh = Part({"c": torch.zeros(1), "z": [{"y": torch.zeros(1), "x": 0}], "m": {"a": 0, "b": 0}, "gone": 1})

    checkpoint.restore({"ordered": ordered, "layered": fresh}, run=str(tmp_path))

    assert ordered.value == saved
    assert_same(fresh.value, layered)
    assert list(fresh.value) == ["c", "z", "m", "new"]
    assert list(fresh.value["z"][0]) == ["y", "x"]
    # Without a tensor in it, it was saved whole, order and all.
    assert list(fresh.value["m"]) == ["b", "a"]


def test_a_tensor_of_one_element_may_have_any_stride_and_one_that_is_negated_is_saved_as_it_shows(tmp_path):
    number = torch.tensor([1 + 2j, 3 - 4j]).conj()
    saved = {"part": number.imag[:1], "whole": number, "cut": torch.arange(6.0).reshape(2, 3)[:1, ::2][:, :1]}
    checkpoint.save({"thing": Part(saved)}, step=1, run=str(tmp_path))
    fresh = Part()
    checkpoint.restore({"thing": fresh}, run=str(tmp_path))

    assert_same(
        fresh.value, {"part": torch.tensor([-2.0]), "whole": torch.tensor([1 - 2j, 3 + 4j]), "cut": saved["cut"]}
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize(
    "value",
    [
        lambda: {"key": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        lambda: {"key": torch.empty(3, device="meta")},
        lambda: {"key": (torch.empty(3, device="meta"),)},
        lambda: {"key\ud800": 1},
        lambda: {"key\ud83d\ude00": torch.ones(2)},
    ],
    ids=["nested", "meta", "meta in a tuple", "half a character", "character in two halves"],
)
def test_what_cannot_be_stored_is_refused_by_its_key(tmp_path, value):
    with pytest.raises(SaveFailed, match=r"thing\.key.*can't be stored"):
        checkpoint.save({"thing": Part(value())}, step=1, run=str(tmp_path))
    assert not list(tmp_path.rglob("*.distcp"))


class Named(torch.Tensor):
    """A tensor with elements of its own, of a class of its own."""


@pytest.mark.parametrize("kind", [Codes, FlatCodes])
def test_a_tensor_whose_elements_are_in_others_is_neither_saved_nor_loaded_into(tmp_path, kind):
    model = torch.nn.Linear(3, 1, bias=False)
    checkpoint.save({"model": ModelState(model)}, step=1, run=str(tmp_path))
    model.weight = torch.nn.Parameter(kind(torch.ones(1, 3, dtype=torch.int8), torch.tensor(0.5)), requires_grad=False)

    refusal = rf"model\.weight: a {kind.__name__}"
    with pytest.raises(SaveFailed, match=refusal):
        checkpoint.save({"model": ModelState(model)}, step=2, run=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RankFailed, match=refusal):
        checkpoint.restore({"model": ModelState(model)}, run=str(tmp_path))
    with pytest.raises(RankFailed, match=refusal):
        checkpoint.restore({"model": Part({"weight": model.weight})}, run=str(tmp_path))
    assert model.weight.scale == 0.5


def named(tensor):
    return tensor.as_subclass(Named)


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, torch.nn.Buffer, AsyncCollectiveTensor, named])
def test_a_tensor_of_another_class_that_has_its_elements_is_saved_and_loaded_into(tmp_path, wrap):
    checkpoint.save({"thing": Part({"t": wrap(torch.arange(3.0))})}, step=1, run=str(tmp_path))
    fresh = Part({"t": wrap(torch.zeros(3))})

    checkpoint.restore({"thing": fresh}, run=str(tmp_path))

    assert fresh.value["t"].tolist() == [0.0, 1.0, 2.0]


def test_two_results_of_collectives_are_not_taken_for_one_tensor(tmp_path):
    saved, fresh = (
        {name: AsyncCollectiveTensor(torch.full((3,), fill)) for name, fill in (("a", a), ("b", b))}
        for a, b in ((1.0, 2.0), (0.0, 0.0))
    )
    checkpoint.save({"part": Whole(saved)}, step=1, run=str(tmp_path))
    checkpoint.restore({"part": Whole(fresh)}, run=str(tmp_path))

    assert [fresh[name].tolist() for name in "ab"] == [[1.0] * 3, [2.0] * 3]


def test_a_part_whose_name_is_no_text_is_refused(tmp_path):
    with pytest.raises(UnsupportedState, match="name"):
        checkpoint.save({"thing\ud800": Part(1)}, step=1, run=str(tmp_path))


def test_a_refused_restore_leaves_the_dicts_that_a_part_lives_by_as_they_were(tmp_path):
    checkpoint.save({"a": Part({"x": 1})}, step=1, run=str(tmp_path))
    live = mixed()
    before = copy.deepcopy(live)

    with pytest.raises(StateMismatch, match="no such part"):
        checkpoint.restore({"a": Part(), "b": Part(live)}, run=str(tmp_path))

    assert_same(live, before)


def test_what_will_become_of_each_part_is_said_before_any_is_touched(tmp_path, caplog):
    checkpoint.save({"thing": Part({"t": torch.zeros(3)})}, step=1, run=str(tmp_path))
    said_before_loading = []

    class Fresh(Part):
        def load_state_dict(self, value):
            said_before_loading.extend(record.getMessage() for record in caplog.records)

    with caplog.at_level("INFO", logger="ray_stateful"):
        checkpoint.restore({"thing": Fresh()}, run=str(tmp_path))

    assert any(text.startswith("restoring checkpoint_s0000000001") and "exact" in text for text in said_before_loading)


def test_a_run_without_checkpoints_restores_nothing(tmp_path):
    part = Part("as it was")

    assert checkpoint.restore({"thing": part}, run=str(tmp_path / "new")) is None
    assert part.value == "as it was"


def test_a_checkpoint_that_is_named_by_its_place_needs_no_run_and_one_called_by_its_name_alone_does(tmp_path):
    saved = checkpoint.save({"thing": Part({"t": torch.ones(3)})}, step=1, run=str(tmp_path))
    for place in (saved.uri, Path(saved.uri), Path(saved.uri).as_uri()):
        fresh = Part()
        report = checkpoint.restore({"thing": fresh}, checkpoint=place)
        assert (report.checkpoint, report.step) == (saved.name, 1)
        assert torch.equal(fresh.value["t"], torch.ones(3))

    for named in (None, saved.name):
        with pytest.raises(ValueError, match="run is None"):
            checkpoint.restore({"thing": Part()}, checkpoint=named)


class Unheard(DirectoryRun):
    """Somebody counts the checkpoints of this run, and was told of none, or can't say of which."""

    __slots__ = ()
    reported: list[str] = []
    denies = False

    def never_reported(self, name):
        if self.denies:
            raise StorageError("read", self.path, "half a list")
        return True

    def report(self, prepared, name):
        self.reported.append(name)


def test_only_the_newest_checkpoint_is_reported_when_it_is_restored_and_only_if_it_is_known_not_to_have_been(
    tmp_path, monkeypatch, caplog
):
    run = Unheard(*resolve(str(tmp_path)), str(tmp_path))
    monkeypatch.setattr(Unheard, "reported", [])
    older, newer = (checkpoint.save({"thing": Part(n)}, step=n, run=str(tmp_path)).name for n in (1, 2))

    checkpoint.restore({"thing": Part()}, run=run, checkpoint=older)
    checkpoint.restore({"thing": Part()}, run=run, checkpoint=newer)
    assert run.reported == []
    checkpoint.restore({"thing": Part()}, run=run)
    assert run.reported == [newer]
    monkeypatch.setattr(Unheard, "denies", True)
    assert checkpoint.restore({"thing": Part()}, run=run).step == 2
    assert run.reported == [newer]
    assert f"{newer} is not reported now" in caplog.text


def test_storage_gives_up_before_ranks_do_also_where_a_checkpoint_is_named_by_its_place(tmp_path):
    run, of_run, _ = candidates.find(str(tmp_path), None, 20.0)
    _, named, _ = candidates.find(None, str(tmp_path / "elsewhere"), 20.0)

    assert run is of_run
    assert named.storage.policy == of_run.storage.policy == RetryPolicy().within(20.0)


@alone
def test_stock_dcp_loads_what_we_saved(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": {"c": torch.randn(2).bfloat16(), "n": 5}}
    report = checkpoint.save({"thing": Part(tensors)}, step=1, run=str(tmp_path))
    found = {"thing": {"a": torch.zeros(3, 4), "b": {"c": torch.zeros(2).bfloat16(), "n": 0}}}

    dcp.load(found, checkpoint_id=report.uri, no_dist=True)

    assert torch.equal(found["thing"]["a"], tensors["a"])
    assert torch.equal(found["thing"]["b"]["c"], tensors["b"]["c"])
    assert found["thing"]["b"]["n"] == 5


@alone
def test_we_load_what_stock_dcp_saved_and_say_that_it_is_unverified(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": {"c": torch.randn(2).bfloat16(), "n": 5, "l": [1, (2, 3)]}}
    dcp.save({"thing": tensors}, checkpoint_id=str(tmp_path / "theirs"), no_dist=True)
    fresh = Part()

    report = checkpoint.restore({"thing": fresh}, checkpoint=str(tmp_path / "theirs"), run=str(tmp_path))

    assert_same(fresh.value, tensors)
    assert not report.verified
    assert str(report).startswith("resumed theirs (not ours; unverified: it has no checksums)")
    # Nobody knows how many workers wrote it, and at which step.
    assert "written by" not in str(report)
    assert "step" not in str(report)


@alone
def test_a_rule_for_other_numbers_of_workers_is_told_how_many_saved_also_of_a_plain_dcp_directory(tmp_path):
    positions = {f"rank_{rank}": {"loader": {"pos": 10 + rank}} for rank in range(3)}
    dcp.save({"loader": positions}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    worlds = []

    def furthest(saved, world):
        worlds.append(world)
        return max(saved.values(), key=lambda position: position["pos"])

    loader = Part({"pos": 0})
    report = checkpoint.restore({"loader": LoaderState(loader, on_resize=Merge(furthest))}, checkpoint=tmp_path / "dcp")

    assert loader.value == {"pos": 12}
    assert worlds == [World(saved_world_size=3, world_size=1, rank=0, step=0)]
    assert "3 positions saved, 1 workers: merged by furthest" in str(report)


@alone
def test_bare_dcp_save_and_load_work_with_our_writer_and_reader(tmp_path):
    tensors = {"a": torch.randn(300, 40), "n": 5}
    dcp.save({"thing": tensors}, storage_writer=CheckpointWriter(str(tmp_path / "bare")), no_dist=True)
    found = {"thing": {"a": torch.zeros(300, 40), "n": 0}}

    reader = CheckpointReader(str(tmp_path / "bare"))
    dcp.load(found, storage_reader=reader, no_dist=True)

    assert torch.equal(found["thing"]["a"], tensors["a"])
    assert found["thing"]["n"] == 5
    assert reader.statistics.bytes_read == 300 * 40 * 4


@alone
@pytest.mark.parametrize("name", [layout.MANIFEST, "__0_0.distcp"])
def test_bare_dcp_save_writes_into_no_directory_that_has_files(tmp_path, name):
    where = tmp_path / "latest"
    dcp.save({"t": torch.ones(3)}, storage_writer=CheckpointWriter(where), no_dist=True)
    for file in where.iterdir():
        if file.name != name and name != layout.MANIFEST:
            file.unlink()
    before = {file.name: file.read_bytes() for file in where.iterdir()}

    with pytest.raises(CheckpointException, match=r"a directory of its own.*latest"):
        dcp.save({"t": torch.zeros(3)}, storage_writer=CheckpointWriter(where), no_dist=True)

    assert {file.name: file.read_bytes() for file in where.iterdir()} == before


def test_equal_values_are_stored_once(tmp_path):
    many = {f"group{n}": {"t": torch.zeros(1), "lr": 0.001} for n in range(50)}
    report = checkpoint.save({"thing": Part(many)}, step=1, run=str(tmp_path))

    from ray_stateful.storage import opening
    from ray_stateful.storage.uris import resolve

    opened = opening.parse(opening.fetch(*resolve(report.uri)))
    places = {(c.file, c.item_offset) for chunks in opened.chunks.values() for c in chunks if c.dtype is None}
    assert len(places) <= 2  # one in each file


def nested(levels, leaf):
    for _ in range(levels):
        leaf = {"down": leaf}
    return leaf


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"fn": lambda: 0}, "function"),
        ({"t": torch.zeros(2).to_sparse()}, "sparse"),
        ({"t": torch.zeros(1), "deep": [object()]}, "object"),
        ({("a", 1): torch.zeros(1)}, r"\('a', 1\)"),
        # Two of each kind that are one to DCP: leaves, containers without a tensor, and one of each.
        ({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, "two entries"),
        ({"a": {"b": {}, "t": torch.zeros(1)}, "a.b": {}}, "two entries"),
        ({"a": {"b": 1}, "a.b": 2, "t": torch.zeros(1)}, "two entries"),
        ({1: torch.zeros(1), "1": torch.zeros(1)}, "two entries"),
        ({"a": {1: 2, "1": 3}}, r"thing\.a\.1: one of two entries"),
        ({"a": {"b.c": 1, "b": {"c": 2}}}, r"thing\.a\.b\.c: one of two entries"),
        (nested(64, 1), "65 levels deep"),
        (nested(64, torch.zeros(1)), "65 levels deep"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name_and_nothing_is_written(tmp_path, value, named):
    with pytest.raises(SaveFailed, match=named):
        checkpoint.save({"thing": Part(value)}, step=1, run=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", [{}, {"a.b": Part(1)}, {"plain": {"a": 1}}, {"x" * 4096: Part(1)}])
def test_what_is_not_a_state_is_refused(tmp_path, state):
    with pytest.raises(UnsupportedState):
        checkpoint.save(state, step=1, run=str(tmp_path))


def flip_bit(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_falls_back_to_the_older_one_and_says_so(tmp_path):
    for step in (1, 2):
        report = checkpoint.save({"thing": Part({"t": torch.full((5000,), float(step))})}, step=step, run=str(tmp_path))
    item = next(tmp_path.glob(f"{report.name}/__0_*.distcp"))
    flip_bit(item, item.stat().st_size // 2)
    fresh = Part()

    restored = checkpoint.restore({"thing": fresh}, run=str(tmp_path))

    assert restored.step == 1
    assert torch.equal(fresh.value["t"], torch.full((5000,), 1.0))
    assert item.name in str(restored)
    assert "that costs 1 step, which" in str(restored)


def test_an_older_checkpoint_that_lacks_what_a_damaged_one_had_begun_to_load_is_not_taken(tmp_path):
    def model(*names):
        return torch.nn.ModuleDict({name: torch.nn.Linear(2000, 9) for name in names})

    checkpoint.save({"m": ModelState(model("a"))}, step=1, run=str(tmp_path))
    newest = checkpoint.save({"m": ModelState(model("a", "b"))}, step=2, run=str(tmp_path))
    (row,) = opened(newest).chunks["m.b.weight"]
    flip_bit(Path(newest.uri, row.file), row.data_offset)

    with pytest.raises(NoIntactCheckpoint, match=r"has no entry 'm\.b\.\w+', which was loaded from a newer, damaged"):
        checkpoint.restore({"m": ModelState(model("a", "b"), strict=False)}, run=str(tmp_path))


def test_damage_on_one_rank_rejects_a_checkpoint_and_beside_a_failure_of_another_ends_the_restore():
    damage, denied = Failure("a block", damage=True), Failure("denied", damage=False)
    with pytest.raises(Rejected, match="rank 1: a block"):
        agree("read", {1: damage})
    # An older checkpoint would be denied as well, and training would go back for nothing.
    with pytest.raises(RankFailed, match="denied"):
        agree("read", {0: damage, 1: denied})


def test_a_part_of_the_checkpoint_that_the_state_lacks_is_named_in_the_report(tmp_path):
    checkpoint.save({name: Part(name) for name in ("ema", "model")}, step=1, run=str(tmp_path))

    report = checkpoint.restore({"model": Part()}, run=str(tmp_path))

    assert report.notes == ("ema: in the checkpoint, not in the state; left alone",)
    assert report.notes[0] in str(report)


def saved_twice(tmp_path, monkeypatch):
    """Two checkpoints of step 10 besides one of step 1: the names of both, of which the later one is the lower."""
    attempts = iter(["000001", "ffffff", "00000a"])
    named = layout.CheckpointName
    monkeypatch.setattr(checkpoint, "CheckpointName", lambda step, attempt: named(step, next(attempts)))
    made = [(1, "first"), (10, "abandoned"), (10, "new")]
    reports = [checkpoint.save({"thing": Part({"is": value})}, step=step, run=str(tmp_path)) for step, value in made]
    return [report.name for report in reports[1:]]


def restored(run):
    fresh = Part()
    report = checkpoint.restore({"thing": fresh}, run=run)
    return fresh.value["is"], list(report.rejected)


def test_of_two_checkpoints_of_one_step_the_newest_is_the_one_that_was_committed_last(tmp_path, monkeypatch):
    abandoned, new = saved_twice(tmp_path, monkeypatch)
    assert new < abandoned

    assert restored(str(tmp_path)) == ("new", [])
    assert [entry.name for entry in listing.entries(*resolve(str(tmp_path)), None)][1:] == [abandoned, new]


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_manifest_that_is_damaged_keeps_no_other_one_of_its_step_from_being_found(tmp_path, monkeypatch, damaged):
    names = saved_twice(tmp_path, monkeypatch)
    (tmp_path / names[damaged] / layout.MANIFEST).write_bytes(b"{")

    # It is said that it was passed over, whichever it was.
    assert restored(str(tmp_path)) == (["new", "abandoned"][damaged], [names[damaged]])


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over_and_it_is_said_which_it_is(tmp_path):
    first, second = (checkpoint.save({"thing": Part({"is": n})}, step=n, run=str(tmp_path)) for n in (1, 2))
    copied = f"checkpoint_s0000000003_{first.name.rpartition('_')[2]}"
    shutil.copytree(first.uri, tmp_path / copied)
    fresh = Part()

    report = checkpoint.restore({"thing": fresh}, run=str(tmp_path))

    assert (report.checkpoint, fresh.value) == (second.name, {"is": 2})
    assert "holds another checkpoint: step 1" in report.rejected[copied]


def test_one_of_ours_without_its_manifest_does_not_pass_for_a_foreign_one_whatever_it_is_called(tmp_path):
    report = checkpoint.save({"thing": Part({"t": torch.ones(3)})}, step=1, run=str(tmp_path / "run"))
    shutil.move(report.uri, tmp_path / "mine")
    (tmp_path / "mine" / layout.MANIFEST).unlink()

    # It has stock DCP's metadata, and could be read without a look at any checksum.
    with pytest.raises(NoIntactCheckpoint, match="was never committed: its manifest is missing"):
        checkpoint.restore({"thing": Part()}, run=str(tmp_path / "run"), checkpoint=str(tmp_path / "mine"))


@pytest.mark.parametrize("fault", [Hang("delete"), Fail("delete", error=PermissionError(13, "denied"))])
def test_a_save_that_failed_says_why_in_time_also_where_what_it_wrote_can_not_be_deleted(
    tmp_path, monkeypatch, caplog, fault
):
    monkeypatch.setattr(commit, "_DISCARD_S", 0.1)
    storage, path = resolve(str(tmp_path))
    full = Fail("publish", error=OSError(28, "No space left"))
    run = DirectoryRun(FaultyStorage(storage.inner, [full, fault]), path, path)

    with pytest.raises(SaveFailed, match="No space left"):
        checkpoint.save({"thing": Part(torch.ones(3))}, step=1, run=run)
    assert "stays until orphans are collected" in caplog.text


def test_a_part_saved_once_for_all_ranks_and_now_one_for_each_is_a_mismatch_and_not_damage_nor_is_the_reverse(tmp_path):
    """An older checkpoint that would fit is not taken for it without a word."""
    loader, run = Part({"pos": 1}), str(tmp_path)
    kinds = {"plain": loader, "of ranks": LoaderState(loader)}
    checkpoint.save({"loader": kinds["plain"]}, step=1, run=run)
    for step, now, before in [(2, "of ranks", "each rank"), (3, "plain", "all ranks")]:
        checkpoint.save({"loader": kinds[now]}, step=step, run=run)
        loader.value = "as it was"
        other = next(part for kind, part in kinds.items() if kind != now)

        with pytest.raises(StateMismatch, match=f"loader: the checkpoint has one value for {before}, .*kind of part"):
            checkpoint.restore({"loader": other}, run=run)

        assert loader.value == "as it was"


def test_a_plain_part_may_name_its_own_entries_as_those_of_ranks_are(tmp_path):
    checkpoint.save({"thing": Part({"rank_0": torch.ones(2)})}, step=1, run=str(tmp_path))
    fresh = Part({"rank_0": torch.zeros(2)})
    checkpoint.restore({"thing": fresh}, run=str(tmp_path))

    assert torch.equal(fresh.value["rank_0"], torch.ones(2))


def test_what_no_reader_would_take_is_not_committed(tmp_path):
    with pytest.raises(SaveFailed, match="absurd"):
        checkpoint.save({"thing": Part({"t": torch.empty(0, 1 << 59)})}, step=1, run=str(tmp_path))
    assert list(tmp_path.glob("*/manifest.json")) == []


def test_values_that_are_larger_in_the_index_than_all_items_are_restored(tmp_path):
    # Each is twice in the index, and a NUL takes six bytes there.
    text = "\0" * 7_000_000
    report = checkpoint.save({"thing": Part({"text": text, "epoch": 3})}, step=1, run=str(tmp_path))
    sizes = {file.name: file.stat().st_size for file in Path(report.uri).iterdir()}
    assert sizes.pop(layout.INDEX) > sum(sizes.values()) + (64 << 20)
    fresh = Part()

    checkpoint.restore({"thing": fresh}, run=str(tmp_path))

    assert fresh.value == {"text": text, "epoch": 3}
    assert verify(*resolve(report.uri), full=True).findings == ()


def test_when_no_checkpoint_is_intact_it_is_an_error_and_never_a_start_from_scratch(tmp_path):
    report = checkpoint.save({"thing": Part({"t": torch.zeros(10)})}, step=1, run=str(tmp_path))
    next(tmp_path.glob(f"{report.name}/__0_*.distcp")).write_bytes(b"")

    with pytest.raises(NoIntactCheckpoint, match="0 bytes"):
        checkpoint.restore({"thing": Part()}, run=str(tmp_path))


def test_stock_tools_need_nothing_of_this_package_to_open_what_we_saved(tmp_path):
    value = {"by_number": {0: {"moment": torch.randn(3)}, 7: {"moment": torch.randn(2)}}, "lr": 0.5}
    report = checkpoint.save({"thing": Part(value)}, step=1, run=str(tmp_path))
    metadata = Path(report.uri, layout.DCP_METADATA).read_bytes()

    assert b"ray_stateful" not in metadata
    # In a process of its own, with the package out of reach.
    script = f"""
import sys
sys.modules["ray_stateful"] = None
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save({report.uri!r}, {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(found["thing"]["by_number"]["7"]["moment"], value["by_number"][7]["moment"])
    assert found["thing"]["lr"] == 0.5

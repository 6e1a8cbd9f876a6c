"""When to save: one decision of all ranks."""

import logging.handlers
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ray_stateful import Checkpointer, checkpoint, ray_train, save_requests
from ray_stateful.background import BackgroundSaver
from ray_stateful.decisions import Decision, Reason, decide
from ray_stateful.errors import SaveFailed, UnevenSteps, UnmatchedCalls, UnsupportedState
from ray_stateful.ranks import Outcome, Ranks
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage import opening
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage, Hang, run_ranks


class Counter:
    def __init__(self):
        self.steps = 0
        self.weight = torch.zeros(4)

    @property
    def samples(self):
        return self.steps * 8

    def on_step(self, *, step):
        self.steps += 1
        self.weight += step

    def state_dict(self):
        return {"steps": self.steps, "weight": self.weight}

    def load_state_dict(self, state_dict):
        self.steps, self.weight = state_dict["steps"], state_dict["weight"]


def steps_saved(run):
    return sorted(
        int(path.name[12:22]) for path in Path(run).glob("checkpoint_*/manifest.json") for path in [path.parent]
    )


def count_to(run, num_steps, every, ask_on_rank_1_at=None):
    counter = Counter()
    saved = []
    with Checkpointer({"counter": counter}, every_n_steps=every, run=run, timeout_s=20) as checkpointer:
        report = checkpointer.restore()
        for _ in range(num_steps):
            if checkpointer.step_count + 1 == ask_on_rank_1_at and dist.get_rank() == 1:
                checkpointer.request_save()
            saved.append(checkpointer.step({"loss": 1.0}) is not None)
    return checkpointer.step_count, saved, None if report is None else report.step, counter.state_dict()


def test_saves_at_intervals_on_one_ranks_request_and_at_the_end_and_goes_on_counting(tmp_path):
    first = run_ranks(2, count_to, str(tmp_path), 7, 3, 5)
    assert [outcome[:3] for outcome in first] == [(7, [False, False, True, False, True, True, False], None)] * 2
    assert steps_saved(tmp_path) == [3, 5, 6, 7]

    second = run_ranks(3, count_to, str(tmp_path), 2, 3)
    assert [outcome[:3] for outcome in second] == [(9, [False, True], 7)] * 3
    assert all(torch.equal(outcome[3]["weight"], torch.full((4,), float(sum(range(10))))) for outcome in second)
    # The end was at step 9, which was saved already.
    assert steps_saved(tmp_path) == [3, 5, 6, 7, 9]


def metrics_that_are_none(run, background):
    saver = Checkpointer({"counter": Counter()}, every_n_steps=2, background=background, run=run, timeout_s=20)
    saver.step({"loss": 1.0})
    try:
        saver.step({"loss": 1.0} if dist.get_rank() == 0 else 1.0)
        saver.wait()
    except SaveFailed as error:
        return error.causes


def first_metrics_that_are_none(run):
    """What steps are told that come after one without metrics, when no save is due."""
    saver = Checkpointer({"counter": Counter()}, every_n_steps=100, run=run, timeout_s=20)
    saver.step()
    told = []
    for wrong in (1.0, {"loss": torch.zeros(2)}):
        try:
            saver.step(wrong if dist.get_rank() == 1 else None)
        except (UnsupportedState, ValueError) as error:
            told.append(str(error))
        saver = Checkpointer({"counter": Counter()}, every_n_steps=100, run=run, timeout_s=20)
    return told


def metrics_that_are_none_in_all_ways(run):
    return [metrics_that_are_none(run, background) for background in (False, True)], first_metrics_that_are_none(run)


def test_metrics_that_are_none_on_one_rank_end_the_step_if_they_are_the_first_and_fail_the_save_on_every_rank(tmp_path):
    first, second = run_ranks(2, metrics_that_are_none_in_all_ways, str(tmp_path))

    why = "metrics are a float; give a dict of numbers and strings by name"
    assert first[0] == second[0] == [{1: f"ValueError: {why}"}] * 2
    assert len(first[1]) == 2
    assert all("what ranks [1] gave" in told for told in first[1])
    assert second[1][0] == why
    assert "metric 'loss' is a torch.Tensor of shape (2,)" in second[1][1]
    assert list(tmp_path.glob("*/manifest.json")) == []


def calls_that_do_not_match(run):
    """What this rank is told when rank 1 makes another call than the others do."""
    told = []
    for call in ("save", "restore", "wait", "a save of its own"):
        saver = Checkpointer({"counter": Counter()}, run=run, timeout_s=20)
        calls = {
            "save": saver.save,
            "restore": saver.restore,
            "wait": lambda: Ranks.of_world(20).failures("end a background save", Outcome()),
            "a save of its own": lambda: checkpoint.save({"counter": Counter()}, step=1, run=run, timeout_s=20),
        }
        try:
            (calls[call] if dist.get_rank() == 1 else saver.step)()
        except UnmatchedCalls as error:
            told.append(error.phases)
    return told


def test_calls_that_do_not_match_are_an_error_on_every_rank_that_names_them_all(tmp_path):
    outcomes = run_ranks(3, calls_that_do_not_match, str(tmp_path))

    step = "decide whether to save"
    others = ["agree on the step", "compare parts", "end a background save", "agree on the step"]
    assert outcomes == [[{0: step, 1: other, 2: step} for other in others]] * 3
    assert steps_saved(tmp_path) == []


def parts_of_other_names(run):
    """What a step is told, and what is saved, when rank 0 has a part more: in the foreground and the background."""
    told = []
    for background in (False, True):
        state = {"a": Counter()} | ({"only on rank 0": Counter()} if dist.get_rank() == 0 else {})
        saver = Checkpointer(state, every_n_steps=1, background=background, run=run, timeout_s=20)
        try:
            saver.step()
            saver.wait()
        except UnsupportedState as error:
            told.append(error.found)
    return told


def test_parts_of_other_names_on_another_rank_are_refused_before_they_are_collected_in_the_background_too(tmp_path):
    outcomes = run_ranks(2, parts_of_other_names, str(tmp_path))

    assert [["rank 0" in found and "ranks [1]" in found for found in told] for told in outcomes] == [[True] * 2] * 2
    assert list(tmp_path.iterdir()) == []


def without_its_group(run):
    """A saver outlives its group, and one that was made without a group finds itself in one."""
    saver = Checkpointer({"counter": Counter()}, run=run, timeout_s=20)
    saver.step()
    dist.barrier()
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="made in a process group, but this process is now without one"):
        saver.__exit__(None, None, None)
    saver = Checkpointer({"counter": Counter()}, run=run, timeout_s=20)
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=2)
    for call in (saver.step, saver.save, saver.restore):
        with pytest.raises(RuntimeError, match="made without a process group, but this process is now in one"):
            call()
    dist.barrier()


def test_a_saver_is_refused_in_another_process_group_than_it_was_made_in(tmp_path):
    assert run_ranks(2, without_its_group, str(tmp_path)) == [None, None]
    assert steps_saved(tmp_path) == []


def uneven(run):
    with Checkpointer({"counter": Counter()}, every_n_steps=100, run=run, timeout_s=20) as checkpointer:
        for _ in range(3 + dist.get_rank()):
            checkpointer.step()


def test_ranks_with_different_numbers_of_batches_are_an_error_with_both_numbers(tmp_path):
    outcomes = run_ranks(2, uneven, str(tmp_path))

    assert [UnevenSteps] * 2 == [type(outcome) for outcome in outcomes]
    assert outcomes[0].steps == {0: 3, 1: 4}
    assert steps_saved(tmp_path) == []


def fail_saves(run, failing, soft_fail):
    """Whether each of three steps was saved, when the saves with these numbers fail; and what was said of it."""
    storage, path = resolve(run)
    # Rank 1 writes one file a save: the value, as the tensor is rank 0's.
    faulty = FaultyStorage(storage.inner, [Fail("open_sink", nth=nth, rank=1) for nth in failing])
    results, said = [], logging.handlers.BufferingHandler(100)
    said.setLevel(logging.ERROR)
    logging.getLogger("ray_stateful").addHandler(said)
    checkpointer = Checkpointer(
        {"counter": Counter()}, every_n_steps=1, run=DirectoryRun(faulty, path, run), soft_fail=soft_fail, timeout_s=20
    )
    for _ in range(3):
        results.append(checkpointer.step() is not None)
    return results, [record.getMessage().partition(": ")[0] for record in said.buffer]


def test_training_goes_on_through_as_many_failed_saves_as_allowed_and_no_more(tmp_path):
    once = "save 1 in a row failed, and training goes on; failure 2 in a row will end it"
    soft = run_ranks(2, fail_saves, str(tmp_path / "soft"), [1, 3], 1)
    # Two in three, and never two in a row: a save that succeeds wipes the slate clean.
    assert soft == [([False, True, False], [once, once])] * 2
    assert steps_saved(tmp_path / "soft") == [2]

    hard = run_ranks(2, fail_saves, str(tmp_path / "hard"), [1, 2], 1)
    assert [SaveFailed] * 2 == [type(outcome) for outcome in hard]
    assert steps_saved(tmp_path / "hard") == []


def held_for_a_resize(run):
    saved = {}
    checkpointer = Checkpointer({"counter": Counter()}, run=run, timeout_s=20)

    def train():
        for _ in range(3):
            checkpointer.step()
        saved["steps"] = checkpointer.step_count

    # As Ray does it: training in a thread, the request from another one; it reaches rank 0 alone here.
    if dist.get_rank() == 0:
        save_requests.ask(1, "resize of 2 to 3 workers", 30.0)
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    held = save_requests.wait_until_held(1, 20.0)
    assert held is not None
    saved["name"] = held.saved
    # Both ranks wait to be taken down now, as nobody does it here.
    thread.join(0.5)
    saved["trains on"] = "steps" in saved
    return saved


def test_a_request_before_a_resize_is_served_at_the_next_step_boundary_by_all_ranks(tmp_path):
    outcomes = run_ranks(2, held_for_a_resize, str(tmp_path))

    assert all("checkpoint_s0000000001" in outcome["name"] for outcome in outcomes)
    assert [outcome["trains on"] for outcome in outcomes] == [False, False]
    assert steps_saved(tmp_path) == [1]


@pytest.mark.parametrize(
    ("wishes", "decision"),
    [
        ([(4, 0, 0, 0), (4, 0, 0, 1)], Decision(Reason(0))),
        ([(4, 0, 0, 1), (4, int(Reason.SECONDS), 0, 1)], Decision(Reason.SECONDS, written=True)),
        ([(4, int(Reason.STEPS), 0, 0), (4, int(Reason.REQUEST), 3, 0)], Decision(Reason.STEPS | Reason.REQUEST, 3)),
    ],
)
def test_what_any_rank_asks_for_all_ranks_do(wishes, decision):
    assert decide(wishes) == decision


def test_a_rank_that_is_done_while_others_go_on_is_an_error():
    with pytest.raises(UnevenSteps, match="rank 0 at step 4, rank 1 at step 5"):
        decide([(4, int(Reason.END), 0, 0), (4, 0, 0, 0)])


def preempted(run, rank_1_hears_at):
    """Rank 0 is told of a preemption at step 2, rank 1 later, as Ray's word reaches one worker before the other."""
    heard_at, coming = (2, rank_1_hears_at)[dist.get_rank()], ray_train.Preemption(time.time() + 3600.0, (0,))
    saver = Checkpointer({"counter": Counter()}, at_end=False, run=run, timeout_s=20)
    ray_train.preemption = lambda *, may_wait: coming if saver.step_count >= heard_at else None
    return [saver.step() is not None for _ in range(5)]


def test_a_rank_that_hears_of_a_preemption_after_the_save_that_was_made_for_it_asks_for_no_other(tmp_path):
    assert run_ranks(2, preempted, str(tmp_path), 4) == [[False, True, False, False, False]] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"every_n_steps": 0},
        {"soft_fail": -1},
        {"soft_fail": None},
        {"every_s": -1.0},
        {"every_s": math.nan},
        {"timeout_s": None},
        {"timeout_s": 0.0},
        {"timeout_s": math.nan},
        {"timeout_s": math.inf},
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Checkpointer({"counter": Counter()}, run=str(tmp_path), **wrong)


def save_in_the_background(run):
    """Steps go on, changing the tensors in place, while a save of the values before is held back in storage."""
    storage, path = resolve(run)
    slow = FaultyStorage(storage.inner, [Hang("sink.write", rank=1)])
    counter = Counter()
    seen = []
    with Checkpointer(
        {"counter": counter},
        every_n_steps=2,
        background=True,
        run=DirectoryRun(slow, path, run),
        timeout_s=30,
    ) as checkpointer:
        for _ in range(7):
            checkpointer.step({"loss": 1.0})
            seen.append(steps_saved(run))
        # Until here rank 1 could not write: nothing is committed, and no rank has waited.
        slow.release()
    return seen, checkpointer.step_count


def test_a_background_save_holds_the_values_of_its_step_and_stops_nobody(tmp_path):
    outcomes = run_ranks(2, save_in_the_background, str(tmp_path))

    assert outcomes == [([[]] * 7, 7)] * 2
    # The save of step 2 was in flight all the time; those due at 4 and 6 were put off, and the end saved step 7.
    assert steps_saved(tmp_path) == [2, 7]
    found = run_ranks(1, restore_named, str(tmp_path))[0]
    assert found == {2: 1 + 2, 7: sum(range(8))}


def restore_named(run):
    weights = {}
    for path in Path(run).glob("checkpoint_*"):
        counter = Counter()
        checkpointer = Checkpointer({"counter": counter}, run=run)
        report = checkpointer.restore(checkpoint=path.name)
        weights[report.step] = int(counter.weight[0])
    return weights


def resize_while_one_is_in_flight(run):
    """A resize is asked for while rank 1 can't write; storage is freed only when the training thread comes to wait."""
    storage, path = resolve(run)
    slow = FaultyStorage(storage.inner, [Hang("sink.write", rank=1)])
    checkpointer = Checkpointer(
        {"counter": Counter()}, every_n_steps=2, background=True, run=DirectoryRun(slow, path, run), timeout_s=30
    )
    checkpointer.step()
    checkpointer.step()
    before = steps_saved(run)
    # The limit is how long the training thread waits to be taken down, once it has saved.
    save_requests.ask(1, "resize of 2 to 3 workers", 0.0)
    background, waited = checkpointer._background, []

    def wait():
        waited.append(steps_saved(run))
        slow.release()
        BackgroundSaver.wait(background)

    background.wait = wait
    report = checkpointer.step()
    return before, waited, report.step, checkpointer.step_count


def test_a_resize_waits_for_the_save_in_flight_and_is_saved_in_the_foreground_after_it(tmp_path):
    assert run_ranks(2, resize_while_one_is_in_flight, str(tmp_path)) == [([], [[]], 3, 3)] * 2
    assert steps_saved(tmp_path) == [2, 3]
    assert run_ranks(1, restore_named, str(tmp_path))[0] == {2: 1 + 2, 3: 1 + 2 + 3}


def fail_in_the_background(run, soft_fail):
    storage, path = resolve(run)
    faulty = FaultyStorage(storage.inner, [Fail("publish", rank=1)])
    with Checkpointer(
        {"counter": Counter()},
        every_n_steps=1,
        background=True,
        soft_fail=soft_fail,
        run=DirectoryRun(faulty, path, run),
        timeout_s=30,
    ) as checkpointer:
        for _ in range(3):
            checkpointer.step()
            checkpointer.wait()
    return checkpointer.step_count


def test_a_failed_background_save_is_raised_on_every_rank_or_forgiven_on_every_rank(tmp_path):
    assert run_ranks(2, fail_in_the_background, str(tmp_path / "soft"), 1) == [3, 3]
    assert steps_saved(tmp_path / "soft") == [2, 3]

    hard = run_ranks(2, fail_in_the_background, str(tmp_path / "hard"), 0)
    assert [SaveFailed] * 2 == [type(outcome) for outcome in hard]


def plan_again(run):
    """Calls of the collectives that carry plans, in a first save, a second, and one of another structure."""
    counts = []
    counter = Counter()
    checkpointer = Checkpointer({"counter": counter}, every_n_steps=1, run=run, timeout_s=20)
    with counted_object_collectives() as phases:
        for step in range(3):
            if step == 2:
                counter.weight = torch.zeros(9)
            phases.clear()
            checkpointer.step()
            counts.append("gather plans" in phases)
    return counts


@contextmanager
def counted_object_collectives():
    """Which phases gather objects. Watched, not replaced."""
    phases, gather = [], Ranks.gather

    def watched(self, phase, value):
        phases.append(phase)
        return gather(self, phase, value)

    Ranks.gather = watched
    try:
        yield phases
    finally:
        Ranks.gather = gather


def test_a_known_structure_is_not_planned_again_and_a_changed_one_is(tmp_path):
    assert run_ranks(2, plan_again, str(tmp_path)) == [[True, False, True]] * 2


def collect(run):
    checkpointer = Checkpointer({"counter": Counter()}, run=run, orphans_after_s=0.0, timeout_s=20)
    checkpointer.step_count = 3
    checkpointer.save()
    for thread in threading.enumerate():
        if thread.name == "orphans":
            thread.join(20)


def test_rank_0_deletes_what_was_never_committed_and_nothing_else(tmp_path):
    for name in ("checkpoint_s0000000001_aaaaaa", "checkpoint_s0000000002_bbbbbb", "checkpoint_by_hand", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "checkpoint_s0000000002_bbbbbb" / "manifest.json").write_text("committed, whatever it says")

    assert run_ranks(2, collect, str(tmp_path)) == [None, None]

    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[:2] == ["checkpoint_by_hand", "checkpoint_s0000000002_bbbbbb"]
    assert left[2].startswith("checkpoint_s0000000003")
    assert left[3] == "notes"


def two_savers(run):
    """Two savers at once: one can't write on rank 0, the other not on rank 1, until both are under way."""
    storage, path = resolve(run)
    slow = [FaultyStorage(storage.inner, [Hang("open_sink", rank=rank)]) for rank in (0, 1)]
    counters = [Counter(), Counter()]
    savers = [
        Checkpointer(
            {"counter": counter},
            every_n_steps=1,
            background=True,
            run=DirectoryRun(faulty, f"{path}/{number}", f"{run}/{number}"),
            timeout_s=30,
        )
        for number, (counter, faulty) in enumerate(zip(counters, slow, strict=True))
    ]
    for saver in savers if dist.get_rank() == 0 else reversed(savers):
        saver._background.begin(saver._saving(None))
    for faulty in slow:
        faulty.release()
    for saver in savers:
        saver.wait()
    return [saver._saved_step for saver in savers]


def test_two_savers_of_one_process_never_meet_in_one_group(tmp_path):
    assert run_ranks(2, two_savers, str(tmp_path)) == [[0, 0]] * 2
    assert [steps_saved(tmp_path / name) for name in ("0", "1")] == [[0], [0]]


def restore_while_one_is_in_flight(run):
    storage, path = resolve(run)
    slow = FaultyStorage(storage.inner, [Hang("sink.write", path="s0000000008", rank=1)])
    with Checkpointer(
        {"counter": Counter()}, background=True, run=DirectoryRun(slow, path, run), timeout_s=30
    ) as saver:
        saver.step()
        saver.save()
        for _ in range(6):
            saver.step()
        saver.request_save()
        saver.step()
        slow.release()
        first = next(path.name for path in Path(run).glob("checkpoint_s0000000001_*"))
        saver.restore(checkpoint=first)
        saver.step()
    return saver.step_count


def test_what_was_trained_after_going_back_is_saved_at_the_end_too(tmp_path):
    assert run_ranks(2, restore_while_one_is_in_flight, str(tmp_path)) == [2, 2]
    assert steps_saved(tmp_path) == [1, 2, 8]


def save_twice(run, kind):
    """Two saves of one `Checkpointer`, and of the second state one that is planned anew; the names of the last two."""
    rank = dist.get_rank()

    def value(number):
        common = {"rate": number / 7, "schedule": {"last": number, "marks": {1: number}}, "t": torch.full((5,), number)}
        if kind == "a whole state on rank 0":
            return common if rank == 0 else {}
        if kind == "stages":
            return {f"stage{rank}": common, "seen": [rank, number]} if rank else {"stage0": common}
        return {**common, "own" if rank else "other": {"n": number}}

    part = Counter()
    names = []
    saver = Checkpointer({"part": part}, run=run, timeout_s=30)
    for number, anew in ((3, False), (4, False), (4, True)):
        part.state_dict = lambda number=number: value(number)
        if anew:
            saver = Checkpointer({"part": part}, run=run, timeout_s=30)
        saver.step_count = len(names) + 1
        names.append(saver.save().name)
    return names[1:]


@pytest.mark.parametrize("kind", ["a whole state on rank 0", "stages", "trees of some ranks"])
def test_a_commit_of_several_ranks_that_builds_on_the_last_is_what_one_planned_anew_is(tmp_path, kind):
    again, anew = run_ranks(2, save_twice, str(tmp_path), kind)[0]

    first, second = (
        opening.parse(opening.fetch(resolve(str(tmp_path))[0], str(tmp_path / name))) for name in (again, anew)
    )
    assert first.chunks == second.chunks
    assert first.trees == second.trees
    assert first.trees


_RAISE = """
import sys, threading
from datetime import timedelta
import torch, torch.distributed as dist
from ray_stateful import Checkpointer, background
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Delay, FaultyStorage
from tests.part import Part

rank, directory, delay_s, leave_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
timeout = timedelta(seconds=30)
dist.init_process_group("gloo", init_method=f"file://{directory}/met", rank=rank, world_size=2, timeout=timeout)
background._LEAVE_S = leave_s
storage, path = resolve(f"{directory}/run")
slow = FaultyStorage(storage.inner, [Delay("open_sink", num_times=None, delay_s=delay_s)])
part = Part({"tensor": torch.ones(1000), "of": [rank]} if rank else {"tensor": torch.ones(1000)})
run = DirectoryRun(slow, path, path)
with Checkpointer({"part": part}, every_n_steps=1, background=True, run=run, timeout_s=30) as saver:
    saver.step()
    raise ValueError("the user's")
"""


@pytest.mark.parametrize(("delay_s", "leave_s", "num_committed"), [(1.0, 20.0, 1), (3.0, 0.1, 0)])
def test_a_process_that_fails_with_a_save_in_flight_ends_by_its_own_error(tmp_path, delay_s, leave_s, num_committed):
    command = [sys.executable, "-c", _RAISE]
    arguments = [str(tmp_path), str(delay_s), str(leave_s)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([*command, str(rank), *arguments], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=80)[1] for process in processes]

    assert [process.returncode for process in processes] == [1, 1], errors
    assert all("ValueError: the user's" in error for error in errors)
    # One that was nearly there is made all the same.
    assert len(list((tmp_path / "run").glob("*/manifest.json"))) == num_committed

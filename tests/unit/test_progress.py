import pytest

from ray_stateful.format.values import decode, encode
from ray_stateful.states.part import World
from ray_stateful.states.progress import Progress


def test_the_counts_go_on_where_they_were_saved():
    progress = Progress()
    progress.count(samples=512, tokens=2**40, epoch=1)
    progress.on_step(step=1)
    fresh = Progress()
    fresh.load_state_dict(decode(encode(progress.state_dict(), "progress"), "progress"))

    assert (fresh.step, fresh.samples, fresh.tokens, fresh.epoch) == (1, 512, 2**40, 1)
    fresh.count(samples=1)
    fresh.on_step(step=2)
    assert (fresh.step, fresh.samples, fresh.epoch) == (2, 513, 1)
    assert fresh.describe() == "step 2, epoch 1, 513 samples, 1,099,511,627,776 tokens, 0 h 00 min"


def test_the_wall_time_of_a_resumed_run_includes_what_was_spent_before():
    progress = Progress()
    progress.load_state_dict(Progress().state_dict() | {"wall_s": 7260.0})
    first = progress.wall_s

    assert 7260.0 <= first < 7320.0
    assert progress.wall_s >= first
    assert "2 h 01 min" in progress.describe()


@pytest.mark.parametrize("backwards", [{"samples": -1}, {"tokens": -1}, {"epoch": 2}])
def test_a_count_that_goes_backwards_is_refused_and_counts_nothing(backwards):
    progress = Progress()
    progress.count(epoch=3, samples=10)

    with pytest.raises(ValueError, match="backwards"):
        progress.count(**{"samples": 5, "tokens": 5} | backwards)

    with pytest.raises(ValueError, match=r"tokens=1\.5 is no whole number"):
        progress.count(samples=5, tokens=1.5)
    assert (progress.samples, progress.tokens, progress.epoch) == (10, 0, 3)


@pytest.mark.parametrize("step", [0, 4, 5])
def test_a_step_that_was_counted_is_not_counted_again(step):
    progress = Progress()
    progress.on_step(step=5)

    with pytest.raises(ValueError, match="from step 5"):
        progress.on_step(step=step)


def test_another_number_of_workers_takes_the_counts_and_the_longest_time():
    saved = Progress().state_dict() | {"step": 5, "samples": 160, "epoch": 1}
    progress = Progress()
    world = World(saved_world_size=2, world_size=3, rank=2, step=5)
    progress.check_resize("progress", world)
    said = progress.resize({0: saved | {"wall_s": 50.0}, 1: saved | {"wall_s": 70.0}}, world)

    assert (progress.step, progress.samples, progress.epoch) == (5, 160, 1)
    assert progress.wall_s >= 70.0
    assert said == "step 5, epoch 1, 160 samples, 0 tokens, 0 h 01 min"

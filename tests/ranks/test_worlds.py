"""Random training states, restored by another number of workers: a short form of `python -m tests.soak.worlds`."""

from tests.soak import worlds


def test_random_states_come_back_bit_for_bit_on_as_many_ranks_and_on_more():
    worlds.run(2, 3, range(6))

"""Damaged checkpoints never load a wrong value: a few hundred mutations of what `python -m tests.soak.damage` does."""

from tests.soak import damage


def test_no_mutation_of_a_checkpoint_loads_a_wrong_value():
    counts = damage.run(num_mutations=320, seed=7, num_checkpoints=2)

    assert sum(counts.values()) == 320
    outcomes = {name.rpartition(": ")[2] for name in counts}
    assert {"detected", "harmless"} <= outcomes


def test_the_comparison_sees_a_single_bit_and_a_type():
    state = damage.state_of(2)
    before = damage.snapshot(state)

    state["model"].tensors["large"].view(-1)[7] += 1e-3
    assert damage.snapshot(state) != before

    state = damage.state_of(2)
    state["rest"].value["groups"][0]["betas"] = [0.9, 0.99]
    assert damage.snapshot(state) != before

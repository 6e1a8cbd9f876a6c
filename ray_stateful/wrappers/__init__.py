"""What is behind `ray_stateful.stateful_wrappers`: keys, adapters, heads, and the state of optimizers."""

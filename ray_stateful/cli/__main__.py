"""`python -m ray_stateful.cli`: the command, where its script is not on the path."""

from ray_stateful.cli.main import main

main(prog_name="ray-stateful")

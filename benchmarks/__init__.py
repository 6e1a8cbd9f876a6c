"""Ours and the peers, measured in alternation in one run; `python -m benchmarks --help` lists the parts."""

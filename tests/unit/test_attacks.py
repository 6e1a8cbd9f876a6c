"""Every hostile checkpoint of the corpus is refused: clearly, in time, in little memory, and without running any of it.

They are opened in a process of their own, which a successful attack may hang or kill; the next one goes on with the
rest.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from attacks.attempt import MAX_MEMORY_BYTES
from attacks.corpus import all_attacks

ATTACKS = all_attacks()
# A mismatch where entries of ranks are named as none is: they are those of another kind of part.
REFUSALS = {"NoIntactCheckpoint", "NoInitialWeights", "StateMismatch"}


@pytest.fixture(scope="module")
def outcomes():
    names = list(ATTACKS)
    # In two processes, as there are two cores: together they would be near the end of what a test may take.
    with ThreadPoolExecutor(max_workers=2) as pool:
        halves = pool.map(attempted, (names[::2], names[1::2]))
        return {name: outcome for found in halves for name, outcome in found.items()}


def attempted(left):
    found = {}
    while left:
        command = [sys.executable, "-m", "attacks.attempt", *left]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        begun = [line["begin"] for line in lines if "begin" in line]
        assert begun, f"{done.stdout}\n{done.stderr}"
        found |= {line["name"]: line for line in lines if "name" in line}
        if begun[-1] not in found:
            found[begun[-1]] = {"error": f"the process ended with {done.returncode}: {done.stderr[-500:]}"}
        left = [name for name in left if name not in found]
    return found


def test_the_corpus_is_not_small():
    assert len(ATTACKS) >= 40
    assert len({attack.tries for attack in ATTACKS.values()}) == len(ATTACKS)


@pytest.mark.parametrize("control", ["intact", "intact, plain", "intact, initial"])
def test_without_an_attack_the_same_checkpoint_is_restored(outcomes, control):
    assert outcomes[control]["error"] is None, outcomes[control]
    assert not outcomes[control]["untouched"]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(outcomes, name):
    outcome = outcomes[name]

    assert outcome["error"] in REFUSALS, f"{ATTACKS[name].tries}\n{outcome}"
    assert outcome["commands"] == []
    assert not outcome["ran"]
    assert not outcome["commands_the_terminal"]
    assert outcome["untouched"] or ATTACKS[name].late
    assert outcome["seconds"] < 20
    assert outcome["memory_bytes"] < MAX_MEMORY_BYTES // 2

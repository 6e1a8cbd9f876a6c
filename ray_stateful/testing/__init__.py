"""What tests of a checkpointed program need: real ranks, faulty storages, and assertions about resuming.

`StorageTests` is in `ray_stateful.testing.storage_tests`: it imports pytest, and the rest does not need it.
"""

from ray_stateful.testing.faulty_storage import Delay, Fail, Fault, FaultyStorage, Flip, Hang, Truncate
from ray_stateful.testing.processes import RanksHung, run_ranks
from ray_stateful.testing.resuming import assert_resumes

__all__ = [
    "Delay",
    "Fail",
    "Fault",
    "FaultyStorage",
    "Flip",
    "Hang",
    "RanksHung",
    "Truncate",
    "assert_resumes",
    "run_ranks",
]

"""`assert_resumes` on several ranks."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from ray_stateful import ModelState, OptimizerState
from ray_stateful.testing import assert_resumes, run_ranks


class OfOneRank:
    """Counts, and forgets it on one rank."""

    def __init__(self, forgetful_rank):
        self.count, self.forgetful = 0, dist.get_rank() == forgetful_rank

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = 0 if self.forgetful else state_dict["count"]


def build(forgetful_rank):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    counter = OfOneRank(forgetful_rank)

    def step():
        loss = model(torch.full((2, 6), float(dist.get_rank() + 1))).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counter.count += 1
        return loss.detach()

    return {"counter": counter, "model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}, step


def resume(forgetful_rank):
    assert_resumes(lambda: build(forgetful_rank))


def test_a_sharded_model_resumes_and_what_one_rank_lost_is_raised_on_every_rank():
    assert run_ranks(2, resume, None) == [None, None]

    outcomes = run_ranks(2, resume, 1)
    assert [AssertionError] * 2 == [type(outcome) for outcome in outcomes]
    expected = "the resumed run differs right after the restore:\n  rank 1: counter.count: expected 3, found 0"
    assert [str(outcome) for outcome in outcomes] == [expected] * 2

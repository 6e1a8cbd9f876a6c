"""Host buffers for background saves."""

import torch

from ray_stateful.storage.staging import Staging


def test_what_was_staged_does_not_change_with_what_it_was_copied_from():
    live = torch.arange(6.0)
    staged = Staging().fill({"t": live, "not a tensor": 3})
    live.zero_()
    assert torch.equal(staged.get("t", None), torch.arange(6.0))
    assert torch.equal(staged.get("t", (0,)), torch.arange(6.0))


def test_buffers_are_used_again_and_let_go_when_their_tensor_is_gone():
    staging = Staging()
    first = staging.fill({"t": torch.zeros(3), "gone": torch.zeros(3)}).get("t", None)
    second = staging.fill({"t": torch.ones(3)}).get("t", None)
    assert second.data_ptr() == first.data_ptr()
    assert list(staging._buffers) == [("t", None)]


def test_a_tensor_of_another_shape_or_dtype_gets_a_buffer_of_its_own():
    staging = Staging()
    staging.fill({"t": torch.zeros(3)})
    assert torch.equal(staging.fill({"t": torch.ones(4)}).get("t", None), torch.ones(4))
    assert staging.fill({"t": torch.ones(4, dtype=torch.int8)}).get("t", None).dtype == torch.int8


def test_values_are_as_they_were_when_the_save_was_begun():
    from ray_stateful.storage.planner import BalancedSavePlanner

    value = {"list": [1, 2], "weights": torch.zeros(2)}
    planner = BalancedSavePlanner()
    planner.set_up_planner({"part": value})
    planner.stage(Staging())
    value["list"].append(3)
    value["weights"].fill_(9)
    plan = planner.create_local_plan()
    tensor = next(item for item in plan.items if item.tensor_data is not None)
    assert planner.encoded["part.list"] == "[1,2]"
    assert torch.equal(planner.resolve_data(tensor), torch.zeros(2))

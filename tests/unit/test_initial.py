"""Initial weights on one worker: what they may be, what is refused, and what the report says."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from ray_stateful import ModelState, OptimizerState, Progress, checkpoint
from ray_stateful.errors import NoInitialWeights, RankFailed, StateMismatch
from tests.ranks import peft_models
from tests.ranks.wrapper_models import assert_same

pytestmark = [
    # transformers' deprecation, met by peft; nothing of ours calls it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Stock DCP says so whenever it saves or loads without a process group.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]


def llama(*, seed, tied=True, head="CausalLM"):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    return getattr(transformers, f"LlamaFor{head}")(config)


def begin(model, initial, run, **of_model):
    report = checkpoint.restore({"model": ModelState(model, **of_model)}, initial=initial, run=str(run))
    assert report.initial
    assert report.step == 0
    return report


def linear(fill, dtype=None):
    model = nn.Linear(3, 2, dtype=dtype)
    for parameter in model.parameters():
        nn.init.constant_(parameter, fill)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saved_is_begun_from_also_where_it_is_a_directory_of_links(tmp_path, tied):
    source = llama(seed=1, tied=tied)
    source.save_pretrained(tmp_path / "blobs", max_shard_size="6KB")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(os.path.relpath(path, tmp_path / "snapshot"))
    fresh = llama(seed=2, tied=tied)

    report = begin(fresh, tmp_path / "snapshot", tmp_path / "run")

    assert_same(dict(fresh.state_dict()), dict(source.state_dict()))
    assert str(report).startswith(f"began from {tmp_path / 'snapshot'} (initial weights; step 0; unverified")
    assert ("lm_head.weight tied to the embedding" in str(report)) == tied


def test_a_head_that_no_base_has_is_left_out_on_request_alone_and_is_saved_like_all_else(tmp_path):
    source = llama(seed=1)
    source.save_pretrained(tmp_path / "weights")
    fresh, untouched = (llama(seed=2, head="SequenceClassification") for _ in range(2))
    with pytest.raises(StateMismatch, match=r"model\.score\.weight is not in the checkpoint") as refused:
        begin(fresh, tmp_path / "weights", tmp_path / "run")
    assert len(refused.value.problems) == 1
    assert_same(dict(fresh.state_dict()), dict(untouched.state_dict()))

    report = begin(fresh, tmp_path / "weights", tmp_path / "run", skip_task_head_prefixes=["score."])

    body = {name: value for name, value in fresh.state_dict().items() if name != "score.weight"}
    assert_same(body, {name: value for name, value in source.state_dict().items() if name != "lm_head.weight"})
    assert torch.equal(fresh.score.weight, untouched.score.weight)
    assert "score.weight is left out on request: kept as built" in str(report)

    # The same state, with the same request, has its head in the run's own checkpoints.
    part = ModelState(fresh, skip_task_head_prefixes=["score."])
    checkpoint.save({"model": part}, step=1, run=str(tmp_path / "run"))
    again = llama(seed=3, head="SequenceClassification")
    part = ModelState(again, skip_task_head_prefixes=["score."])
    report = checkpoint.restore({"model": part}, initial=tmp_path / "weights", run=str(tmp_path / "run"))
    assert (report.initial, report.step) == (False, 1)
    assert_same(dict(again.state_dict()), dict(fresh.state_dict()))


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save"])
def test_an_adapter_begins_from_what_peft_saved_and_never_from_a_base(tmp_path, kind):
    source, fresh = peft_models.build(kind, seed=1), peft_models.build(kind, seed=2)
    peft_models.nudge(source)
    source.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    source.get_base_model().save_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in fresh.state_dict().items()}

    with pytest.raises(StateMismatch, match="none of them is of the adapter that is trained here") as refused:
        begin(fresh, tmp_path / "base", tmp_path / "run", is_peft=True)
    assert len(refused.value.problems) == 1
    assert_same(dict(fresh.state_dict()), before)

    begin(fresh, tmp_path / "adapter", tmp_path / "run", is_peft=True)
    assert_same(ModelState(fresh, is_peft=True).state_dict(), load_file(tmp_path / "adapter/adapter_model.safetensors"))


def test_a_head_that_is_trained_beside_an_adapter_is_left_out_on_request(tmp_path):
    source, fresh, untouched = (peft_models.build("score", seed) for seed in (1, 2, 2))
    peft_models.nudge(source)
    source.save_pretrained(tmp_path / "adapter")

    report = begin(fresh, tmp_path / "adapter", tmp_path / "run", is_peft=True, skip_task_head_prefixes=["score."])

    state, saved, built = (ModelState(model, is_peft=True).state_dict() for model in (fresh, source, untouched))
    head = {key for key in state if "score" in key}
    assert_same(state, {key: (built if key in head else saved)[key] for key in state})
    assert not torch.equal(state[min(head)], saved[min(head)])
    assert f"{min(head)} is left out on request: kept as built" in str(report)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_point_weights_are_cast_to_the_models_dtype_and_the_report_names_both(tmp_path, stored):
    values = {"weight": torch.randn(2, 3, dtype=torch.float64).to(stored), "bias": torch.tensor([0.1, 1e30]).to(stored)}
    save_file(values, tmp_path / "x.safetensors")
    fresh = linear(0.0)

    report = begin(fresh, tmp_path / "x.safetensors", tmp_path / "run")

    assert_same(dict(fresh.state_dict()), {name: value.float() for name, value in values.items()})
    assert f"cast from {str(stored).removeprefix('torch.')} to float32: 2 tensors" in str(report)
    assert report.statistics.bytes_read == sum(value.nbytes for value in values.values())


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_not_cast_as_their_scale_would_be_lost(tmp_path, stored):
    save_file({"weight": torch.ones(2, 3).to(stored), "bias": torch.ones(2)}, tmp_path / "x.safetensors")
    fresh = linear(0.0)

    with pytest.raises(StateMismatch, match=r"model.weight: dtype float32 here, (float8_e4m3fn|int8)"):
        begin(fresh, tmp_path / "x.safetensors", tmp_path / "run")
    assert not fresh.weight.any()
    assert not fresh.bias.any()


def test_a_model_without_memory_is_refused_with_what_to_do(tmp_path):
    save_file(linear(1.0).state_dict(), tmp_path / "x.safetensors")
    with torch.device("meta"):
        fresh = nn.Linear(3, 2)
    with pytest.raises(RankFailed, match=r"model.weight is on the meta device(.|\n)*to_empty"):
        begin(fresh, tmp_path / "x.safetensors", tmp_path / "run")

    fresh.to_empty(device="cpu")
    begin(fresh, tmp_path / "x.safetensors", tmp_path / "run")
    assert_same(dict(fresh.state_dict()), dict(linear(1.0).state_dict()))


@pytest.mark.parametrize("nested", [True, False])
def test_a_directory_that_stock_dcp_wrote_is_begun_from_with_and_without_parts(tmp_path, nested):
    saved = linear(1.5).state_dict()
    dcp.save({"model": saved, "step": 9} if nested else dict(saved), checkpoint_id=tmp_path / "plain")
    fresh = linear(0.0, dtype=torch.bfloat16)

    report = begin(fresh, tmp_path / "plain", tmp_path / "run")

    assert_same(dict(fresh.state_dict()), {name: value.bfloat16() for name, value in saved.items()})
    assert "cast from float32 to bfloat16: 2 tensors" in str(report)


def test_several_models_begin_from_the_parts_of_their_names_and_not_from_one_models_weights(tmp_path):
    saved = {"policy": ModelState(linear(1.0)), "value": ModelState(linear(2.0)), "progress": Progress()}
    uri = checkpoint.save(saved, step=3, run=str(tmp_path / "another")).uri
    save_file(linear(1.0).state_dict(), tmp_path / "x.safetensors")
    models = {"policy": linear(0.0), "value": linear(0.0)}
    state = {name: ModelState(model) for name, model in models.items()}

    with pytest.raises(StateMismatch, match=r"weights of one model, and the state has 2 \(policy, value\)"):
        checkpoint.restore(state, initial=tmp_path / "x.safetensors", run=str(tmp_path / "run"))
    report = checkpoint.restore(state, initial=uri, run=str(tmp_path / "run"))

    assert (report.step, report.verified, report.notes) == (0, True, ())
    assert_same(dict(models["policy"].state_dict()), dict(linear(1.0).state_dict()))
    assert_same(dict(models["value"].state_dict()), dict(linear(2.0).state_dict()))
    with pytest.raises(StateMismatch, match=r"other: the checkpoint has no such part; it has policy, progress, value"):
        checkpoint.restore({"other": ModelState(linear(0.0))}, initial=uri, run=str(tmp_path / "run"))


def test_a_ray_checkpoint_is_begun_from(tmp_path):
    from ray.train import Checkpoint

    save_file(linear(1.0).state_dict(), tmp_path / "model.safetensors")
    fresh = linear(0.0)
    report = begin(fresh, Checkpoint.from_directory(str(tmp_path)), tmp_path / "run")

    assert report.checkpoint == str(tmp_path)
    assert_same(dict(fresh.state_dict()), dict(linear(1.0).state_dict()))


def test_weights_in_an_object_store_are_begun_from_and_its_secrets_are_not_shown(tmp_path, s3_environment):
    from ray_stateful.storage.uris import resolve

    source, fresh = llama(seed=1), llama(seed=2)
    source.save_pretrained(tmp_path / "weights", max_shard_size="6KB")
    uri = s3_environment.uri(f"{s3_environment.make_bucket('initial')}/weights").replace("s3://", "s3://test:test@")
    storage, path = resolve(uri)
    for file in (tmp_path / "weights").iterdir():
        storage.write(f"{path}/{file.name}", file.read_bytes())

    report = begin(fresh, uri, tmp_path / "run")

    assert_same(dict(fresh.state_dict()), dict(source.state_dict()))
    assert report.checkpoint == uri.replace("test:test@", "")


def test_a_damaged_source_is_an_error_and_no_start_from_scratch(tmp_path):
    uri = checkpoint.save({"model": ModelState(linear(1.0))}, step=3, run=str(tmp_path / "another")).uri
    save_file(linear(1.0).state_dict(), tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-4])
    item = next(Path(uri).glob("*.distcp"))
    data = bytearray(item.read_bytes())
    data[data.find(b"\x00\x00\x80\x3f" * 2)] ^= 1
    item.write_bytes(data)

    for initial, why in (
        (tmp_path / "x.safetensors", "its header tells of"),
        (uri, "is not what was written"),
        (tmp_path / "another", f"it is a run's directory: name one of its 1 checkpoints, {Path(uri).name} say"),
        (tmp_path, "x.safetensors"),
    ):
        with pytest.raises(NoInitialWeights, match=why):
            begin(linear(0.0), initial, tmp_path / "run")
    shutil.rmtree(tmp_path / "another")
    with pytest.raises(NoInitialWeights, match="neither safetensors nor a checkpoint"):
        begin(linear(0.0), uri, tmp_path / "run")


def test_the_documentations_example_says_what_the_documentation_says(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs/initial_weights.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (said,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "initial_weights.md", "exec"), names)

    assert f"{names['first']}\n" == said
    assert (names["second"].initial, names["second"].step) == (False, 3)


def test_initial_weights_without_a_model_or_beside_a_named_checkpoint_are_refused(tmp_path):
    model = linear(0.0)
    optimizer = OptimizerState(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"no ModelState .*\(it has optimizer\)"):
        checkpoint.restore({"optimizer": optimizer}, initial=tmp_path, run=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="leave one of them out"):
        checkpoint.restore({"model": ModelState(model)}, initial="x", checkpoint="y", run=str(tmp_path / "run"))

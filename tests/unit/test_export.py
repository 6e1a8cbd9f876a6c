"""Exports load in the libraries they are for; imports restore; both bit for bit, in bounded memory."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from attacks.corpus import Workshop
from ray_stateful import checkpoint
from ray_stateful.cli.main import main
from ray_stateful.errors import HostileCheckpoint
from ray_stateful.format import hf_layout, layout
from ray_stateful.format.checksums import checksum
from ray_stateful.stateful_wrappers import ModelState
from tests.part import Part
from tests.ranks import peft_models

pytestmark = [
    # transformers' deprecation, met by peft; nothing of ours calls it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Stock DCP says so whenever it saves or loads without a process group.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    # PyTorch's own, of stock dcp.load.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


def every_dtype():
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(6, 5, generator=generator)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
    found = {f"layer.{str(dtype).removeprefix('torch.')}": (wide * 9).to(dtype) for dtype in dtypes}
    return {**found, "layer.scalar": torch.tensor(2.5), "layer.empty": torch.empty(0, 3), "a.weight": wide}


def save(path, model, **parts):
    return checkpoint.save({"model": Part(model), **parts}, step=4, run=str(path)).uri


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout) if exit_code == 0 else result.stderr


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        view = torch.uint8 if tensor.numel() else tensor.dtype
        assert torch.equal(found[key].reshape(-1).view(view), tensor.reshape(-1).view(view)), key


def tiny_llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("slab", [7, 1 << 20])
def test_the_safetensors_library_reads_every_dtype_as_it_was_saved(tmp_path, monkeypatch, slab):
    from ray_stateful import slabs

    monkeypatch.setattr(slabs, "MAX_ELEMENTS", slab)
    expected = every_dtype()

    result = run("export", save(tmp_path / "run", expected), tmp_path / "out", "--format", "safetensors")

    assert result["files"] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected)


@pytest.mark.parametrize("left", [None, 100])
def test_an_item_file_that_is_missing_or_cut_ends_an_export_to_dcp_before_it_writes(tmp_path, left):
    uri = save(tmp_path, {"w": torch.ones(200)})
    (item,) = Path(uri).glob("__*")
    data = item.read_bytes()[: left or 0]
    item.unlink()
    if left is not None:
        item.write_bytes(data)
    # The checksum is no help: whoever cut it can compute one.
    Workshop(Path(uri)).manifest(lambda body: body["files"][item.name].update(xxh3=checksum(data)))

    said = run("export", uri, tmp_path / "out", "--format", "dcp", exit_code=2)

    assert item.name in said
    assert ("missing" if left is None else "100 bytes") in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("tied", "options"), [(True, ["--drop-tied"]), (True, []), (False, [])])
def test_transformers_loads_a_sharded_export_and_computes_the_same(tmp_path, tied, options):
    model = tiny_llama(tied)
    # As a plain state dict has it: with the head that is tied.
    uri = save(tmp_path / "run", dict(model.state_dict()), progress=Part({"step": 1}))
    out = tmp_path / "out"

    result = run("export", uri, out, "--format", "safetensors", "--max-file-size", "4kB", *options)
    model.config.save_pretrained(out)
    loaded = type(model).from_pretrained(out)

    assert ("model.lm_head.weight" in result["left_out"]) == bool(options)
    assert len(result["files"]) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result["num_bytes"]
    assert set(index["weight_map"].values()) == {file for file in result["files"] if file.endswith(".safetensors")}
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_a_head_that_equals_the_embedding_is_left_out_on_request_alone_and_equal_zeros_never(tmp_path):
    zeros = {"x.lora_B.weight": torch.zeros(4, 4), "y.lora_B.weight": torch.zeros(4, 4)}
    head = torch.randn(5, 4)
    uri = save(tmp_path / "run", {**zeros, "embed_tokens.weight": head, "lm_head.weight": head.clone()})

    run("export", uri, tmp_path / "once", "--format", "safetensors", "--drop-tied")
    run("export", uri, tmp_path / "twice", "--format", "safetensors")

    assert load_file(tmp_path / "once" / "model.safetensors").keys() == {*zeros, "embed_tokens.weight"}
    assert torch.equal(load_file(tmp_path / "twice" / "model.safetensors")["lm_head.weight"], head)


def test_a_cast_changes_floating_point_tensors_and_no_others(tmp_path):
    expected = {key: value for key, value in every_dtype().items() if "float8" not in key}
    uri = save(tmp_path / "run", expected)

    run("export", uri, tmp_path / "out", "--format", "safetensors", "--dtype", "bfloat16")

    cast = {key: value.bfloat16() if value.is_floating_point() else value for key, value in expected.items()}
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), cast)


def test_what_safetensors_cannot_hold_is_refused_by_name_before_anything_is_written(tmp_path):
    uri = save(tmp_path / "run", {"phase": torch.zeros(2, dtype=torch.complex128)})
    said = run("export", uri, tmp_path / "out", "--format", "safetensors", exit_code=2)

    assert "phase is of dtype complex128" in said
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing(tmp_path):
    uri = save(tmp_path / "run", every_dtype())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")

    for form in ("safetensors", "dcp"):
        assert "choose an empty directory" in run("export", uri, tmp_path / "out", "--format", form, exit_code=2)
    assert "exists" in run("export", uri, tmp_path / "out" / "model.safetensors", "--format", "torch", exit_code=2)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save"])
def test_peft_loads_an_exported_adapter(tmp_path, kind):
    from peft import PeftModel

    model = peft_models.build(kind, 1)
    peft_models.nudge(model)
    uri = checkpoint.save({"model": ModelState(model, is_peft=True)}, step=1, run=str(tmp_path / "run")).uri

    result = run("export", uri, tmp_path / "out", "--format", "safetensors", "--adapter")
    assert result["files"] == ["adapter_model.safetensors"]
    model.peft_config["default"].save_pretrained(tmp_path / "out")
    base = peft_models.build(kind, 1).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fresh = dict(loaded.named_parameters())
    assert trained
    for name, parameter in trained.items():
        assert torch.equal(fresh[name], parameter), name


def test_torch_load_gives_back_the_whole_nested_state_or_one_part(tmp_path):
    progress = {"step": 4, "by_rank": {0: {"seen": 7}}, "losses": [torch.ones(2), 0.5]}
    uri = save(tmp_path / "run", every_dtype(), progress=Part(progress))

    run("export", uri, tmp_path / "all.pt", "--format", "torch")
    run("export", uri, tmp_path / "model.pt", "--format", "torch", "--part", "model", "--dtype", "float32")
    found = torch.load(tmp_path / "all.pt", weights_only=True)

    assert found.keys() == {"model", "progress"}
    assert_same(found["model"], every_dtype())
    assert {k: v for k, v in found["progress"].items() if k != "losses"} == {"step": 4, "by_rank": {0: {"seen": 7}}}
    assert torch.equal(found["progress"]["losses"][0], torch.ones(2))
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    assert model["a.weight"].dtype == model["layer.bfloat16"].dtype == torch.float32
    # A slice of a tensor saved again must not drag the whole file along.
    assert model["a.weight"].untyped_storage().nbytes() == 6 * 5 * 4


def test_torch_load_gives_back_a_part_that_is_a_list(tmp_path):
    uri = save(tmp_path / "run", {"weight": torch.ones(2)}, history=Part([torch.ones(2), {1: "one"}]))

    run("export", uri, tmp_path / "history.pt", "--format", "torch", "--part", "history")

    weight, rest = torch.load(tmp_path / "history.pt", weights_only=True)
    assert torch.equal(weight, torch.ones(2))
    assert rest == {1: "one"}


@pytest.mark.parametrize("part", [None, "model"])
def test_stock_dcp_loads_an_exported_directory(tmp_path, part):
    uri = save(tmp_path / "run", every_dtype(), optimizer=Part({"moment": torch.ones(3)}))
    run("export", uri, tmp_path / "out", "--format", "dcp", *(["--part", part] if part else []))

    into = {"model": {key: torch.zeros_like(value) for key, value in every_dtype().items()}}
    dcp.load(into, checkpoint_id=tmp_path / "out")

    assert_same(into["model"], every_dtype())
    keys = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata
    assert ("optimizer.moment" in keys) == (part is None)
    assert layout.MANIFEST not in {path.name for path in (tmp_path / "out").iterdir()}


def test_damage_ends_an_export(tmp_path):
    uri = save(tmp_path / "run", {"weight": torch.randn(100, 100)})
    item = next(Path(uri).glob("*.distcp"))
    data = bytearray(item.read_bytes())
    data[len(data) // 2] ^= 1
    item.write_bytes(data)

    for form, out in (("safetensors", "a"), ("torch", "b.pt"), ("dcp", "c")):
        assert "ray-stateful verify" in run("export", uri, tmp_path / out, "--format", form, exit_code=2)
    # Nothing is left behind: not a part of one, not its temporary file.
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()} == {"run"}


def test_hugging_face_weights_become_the_first_checkpoint_of_a_run(tmp_path, monkeypatch):
    from ray_stateful import importing

    monkeypatch.setattr(importing, "MAX_PIECE_BYTES", 1000)
    model = tiny_llama(tied=True)
    model.save_pretrained(tmp_path / "hf", max_shard_size="6KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()

    made = run("import", tmp_path / "hf", tmp_path / "run")
    fresh = tiny_llama(tied=True)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    report = checkpoint.restore({"model": ModelState(fresh)}, run=str(tmp_path / "run"))

    assert report.checkpoint == made["name"]
    assert report.verified
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert run("verify", made["path"], "--full")["findings"] == []
    assert "has checkpoints already" in run("import", tmp_path / "hf", tmp_path / "run", exit_code=2)


@pytest.mark.parametrize("nested", [True, False])
def test_a_plain_dcp_directory_becomes_the_first_checkpoint_of_a_run(tmp_path, nested):
    model = every_dtype()
    dcp.save({"model": model, "progress": {"step": 9}} if nested else dict(model), checkpoint_id=tmp_path / "plain")

    run("import", tmp_path / "plain", tmp_path / "run")
    fresh, progress = Part(), Part()
    checkpoint.restore({"model": fresh} | ({"progress": progress} if nested else {}), run=str(tmp_path / "run"))

    assert_same(fresh.value, model)
    assert progress.value == ({"step": 9} if nested else None)


def test_importing_a_checkpoint_keeps_its_parts(tmp_path):
    uri = save(tmp_path / "run", every_dtype(), progress=Part({"step": 9, "names": ("a", 1)}))

    made = run("import", uri, tmp_path / "second")

    assert run("diff", uri, made["path"])["equal"]


def test_an_import_that_failed_leaves_nothing_in_the_way_of_the_next(tmp_path, monkeypatch):
    uri = save(tmp_path / "run", every_dtype())
    item = next(Path(uri).glob("*.distcp"))
    whole = item.read_bytes()
    item.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    (tmp_path / "second" / "checkpoint_s0000000000_aaaaaa").mkdir(parents=True)  # of one that was killed

    assert "is not what was written" in run("import", uri, tmp_path / "second", exit_code=2)
    item.write_bytes(whole)
    made = run("import", uri, tmp_path / "second")

    assert {path.name for path in (tmp_path / "second").iterdir()} == {made["name"], "checkpoint_s0000000000_aaaaaa"}
    assert made["num_bytes"] < sum(path.stat().st_size for path in Path(made["path"]).iterdir())


def test_weights_are_not_imported_under_a_name_that_no_part_can_have(tmp_path):
    uri = save(tmp_path / "run", every_dtype())
    run("export", uri, tmp_path / "out", "--format", "safetensors")
    for name in ("policy.model", ""):
        assert "a part of this name" in run("import", tmp_path / "out", tmp_path / "x", "--part", name, exit_code=2)


@pytest.mark.parametrize("deep", [False, True])
def test_what_has_a_name_that_no_checkpoint_can_have_is_not_imported(tmp_path, deep):
    nested = torch.ones(2)
    for _ in range(63):
        nested = {"x": nested}
    # Of a directory in which something is below no part, all becomes a part.
    state = {"top": torch.ones(2), "deep": nested} if deep else {"model": {"half of a pair \ud800": torch.ones(2)}}
    dcp.save(state, checkpoint_id=tmp_path / "plain")

    said = run("import", tmp_path / "plain", tmp_path / "x", exit_code=2)

    assert ("an entry 65 levels deep" if deep else "has a lone surrogate") in said


def test_importing_an_export_is_the_same_checkpoint(tmp_path):
    uri = save(tmp_path / "run", every_dtype())
    run("export", uri, tmp_path / "out", "--format", "safetensors", "--max-file-size", "200")

    made = run("import", tmp_path / "out", tmp_path / "second", "--step", "7")

    assert made["name"].startswith("checkpoint_s0000000007_")
    assert run("diff", uri, made["path"])["equal"]


def hostile_files():
    good = hf_layout.header([hf_layout.Weight("w", "float32", (2,))]) + bytes(8)
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()

    def with_header(header, body=bytes(8)):
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + body

    def entry(**changes):
        return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}

    yield "empty", b""
    yield "header longer than the file", struct.pack("<Q", 2**63) + text
    yield "cut", good[:-1]
    yield "more than it tells of", good + b"x"
    yield "no JSON", with_header(b"{not json")
    yield "an array", with_header([1])
    yield "unknown dtype", with_header(entry(dtype="F4096"))
    yield "negative", with_header(entry(data_offsets=[-8, 0]))
    yield "overflowing shape", with_header(entry(shape=[2**61, 2**61]))
    yield "too small for its shape", with_header(entry(shape=[1 << 40]))
    yield "key twice", with_header(text[:-1] + b"," + text[1:])
    yield "overlap", with_header({**entry(), "v": entry()["w"]})
    yield "bool for an int", with_header(entry(shape=[True, 2]))
    yield "no end", with_header(entry(data_offsets=[0]))
    yield "two ends", with_header(entry(data_offsets=[0, 8, 8]))


@pytest.mark.parametrize(
    ("name", "content"), list(hostile_files()), ids=lambda value: value if str(value) == value else ""
)
def test_a_hostile_safetensors_file_is_refused(tmp_path, name, content):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors").write_bytes(content)
    said = run("import", tmp_path / "in", tmp_path / "run", exit_code=2)

    assert "model.safetensors" in said
    assert not (tmp_path / "run").exists()


def test_an_index_that_leads_outside_is_refused(tmp_path):
    with pytest.raises(HostileCheckpoint, match="outside"):
        hf_layout.weight_map(b'{"weight_map": {"w": "../../secret.safetensors"}}', "index")
    with pytest.raises(HostileCheckpoint, match="outside"):
        hf_layout.weight_map(b'{"weight_map": {"w": 1}}', "index")
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "in" / "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing" in run("import", tmp_path / "in", tmp_path / "run", exit_code=2)


def test_an_index_of_tensors_that_are_in_no_file_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "in" / "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))

    assert "'v'" in run("import", tmp_path / "in", tmp_path / "run", exit_code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["manifest", "index", "item"])
def test_no_command_follows_a_link_in_a_checkpoint_and_each_follows_one_to_it(tmp_path, kind):
    uri = save(tmp_path, {"w": torch.ones(2)})
    (tmp_path / "run").symlink_to(tmp_path)
    (tmp_path / "checkpoint").symlink_to(uri)
    through = [tmp_path / "checkpoint", tmp_path / "run" / Path(uri).name]
    for place in through:
        run("inspect", place)
        run("diff", place, uri)
    (item,) = Path(uri).glob("__*")
    name = {"manifest": layout.MANIFEST, "index": layout.INDEX, "item": item.name}[kind]
    (Path(uri) / name).rename(tmp_path / "elsewhere")
    (Path(uri) / name).symlink_to("../elsewhere")

    for place in (uri, *through):
        for form in ("safetensors", "dcp", "torch"):
            assert "missing" in run("export", place, tmp_path / form, "--format", form, exit_code=2)
        assert "missing" in run("diff", place, place, exit_code=2)
        if kind != "item":
            assert "missing" in run("inspect", place, exit_code=2)


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_weights_behind_links_as_the_hugging_face_cache_has_them_are_imported(tmp_path, name):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")

    assert run("import", tmp_path / "snapshot" / name, tmp_path / "run")["num_entries"] == 1


def test_a_step_that_no_name_has_room_for_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "in" / "model.safetensors")
    assert "9999999999" in run("import", tmp_path / "in", tmp_path / "run", "--step", 10**10, exit_code=2)


def test_an_export_to_one_file_says_where_it_lacks_room_before_it_maps_it(tmp_path, monkeypatch):
    uri = save(tmp_path, {"w": torch.ones(2)})

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "TMPDIR" in run("export", uri, tmp_path / "out.pt", "--format", "torch", exit_code=2)
    assert not (tmp_path / "out.pt").exists()


def test_an_export_to_one_file_refuses_a_directory_before_it_reads(tmp_path):
    uri = save(tmp_path, {"w": torch.ones(2)})
    (tmp_path / "out").mkdir()
    assert "exists" in run("export", uri, tmp_path / "out", "--format", "torch", exit_code=2)


BOUNDED = """
import resource, sys, torch
from ray_stateful import export, importing, slabs
from ray_stateful.storage import opening
from ray_stateful.storage.uris import resolve
slabs.MAX_ELEMENTS, slabs.BATCH_BYTES, importing.MAX_PIECE_BYTES = 1 << 20, 4 << 20, 4 << 20
torch.set_num_threads(1)
storage, path = resolve(sys.argv[1])
opened = opening.parse(opening.fetch(storage, path))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
export.to_safetensors(storage, opened, storage, sys.argv[2] + "/out", export.select(opened, "model"))
exported = peak() - before
importing.import_checkpoint(importing.find(storage, sys.argv[2] + "/out"), storage, sys.argv[2] + "/second")
print(exported, peak() - before)
"""


def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path):
    mib = 1 << 20
    uri = save(tmp_path / "run", {"weight": torch.zeros(192 * mib // 4).reshape(-1, 1024)})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOUNDED, uri, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    exported, imported = map(int, done.stdout.split())
    # MiB. The tensor alone is 192.
    assert exported < 96
    assert imported < 96

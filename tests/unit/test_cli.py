"""The command line: what it prints, what it exits with, what it asks of storage, and what it never imports."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner

from attacks.corpus import Workshop
from ray_stateful import checkpoint, listing, ray_train, restore_cost, verify
from ray_stateful.cli import tree
from ray_stateful.cli.explain import explain
from ray_stateful.cli.main import main
from ray_stateful.cli.places import open_run
from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint, StorageError
from ray_stateful.format import layout, strict_json
from ray_stateful.storage import opening
from ray_stateful.storage.retries import RetryingStorage
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage, Truncate, run_ranks
from tests.part import Part

pytestmark = pytest.mark.filterwarnings(
    # Stock DCP says so whenever it saves or loads without a process group.
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed_tokens.weight": torch.randn(40, 8, generator=generator),
        "layers.0.weight": torch.randn(8, 8, generator=generator).bfloat16(),
        "steps": torch.tensor(3),
    }


def save(path, step, model=None, **parts):
    state = {"model": Part(weights() if model is None else model), "progress": Part({"step": step}), **parts}
    return checkpoint.save(state, step=step, run=str(path)).uri


def run(*arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run_json(*arguments, exit_code=0):
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def checkpoint_at(path):
    storage, inside = resolve(str(path))
    return opening.parse(opening.fetch(storage, inside))


def flip(path, offset):
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= 1
    Path(path).write_bytes(data)


def test_ls_lists_the_newest_last_and_says_what_is_an_orphan_and_what_ray_knows(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 12)
    orphan = tmp_path / "checkpoint_s0000000007_abcdef"
    orphan.mkdir()
    (orphan / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "something_else").mkdir()
    snapshot = {"checkpoint_results": [{"checkpoint_dir_name": Path(first).name}]}
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))

    found = run_json("ls", tmp_path)["checkpoints"]

    assert [entry["step"] for entry in found] == [1, 7, 12]
    assert [entry["committed"] for entry in found] == [True, False, True]
    assert [entry["known_to_ray"] for entry in found] == [True, False, False]
    assert [entry["orphan"] for entry in found] == [False, True, False]
    assert found[-1]["name"] == Path(second).name
    assert "orphan" in run("ls", tmp_path).stdout


def test_inspect_shows_keys_shapes_and_who_wrote_what(tmp_path):
    uri = save(tmp_path, 3)
    found = run_json("inspect", uri)
    by_key = {entry["key"]: entry for entry in found["entries"]}

    assert found["step"] == 3
    assert by_key["model.layers.0.weight"]["dtype"] == "bfloat16"
    assert by_key["model.layers.0.weight"]["shape"] == [8, 8]
    assert by_key["model.layers.0.weight"]["ranks"] == [0]
    assert by_key["progress.step"]["value"] == "3"
    assert "layers" in run("inspect", uri, "--tree").stdout
    assert "at byte" in run("inspect", uri, "model.layers.0.weight").stdout
    missing = run("inspect", uri, "model.layers.1.weight")
    assert missing.exit_code == 2
    assert "did you mean model.layers.0.weight" in missing.stderr


COUNT_READS = """
import sys, time
from ray_stateful.storage.pyarrow import PyarrowStorage
calls = []
for name in ("read", "sizes", "directories", "write", "delete"):
    def counted(self, path, *rest, name=name, inner=getattr(PyarrowStorage, name)):
        calls.append((name, path.rpartition("/")[2]))
        return inner(self, path, *rest)
    setattr(PyarrowStorage, name, counted)
from ray_stateful.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(calls, [name for name in ("torch", "ray") if name in sys.modules], file=sys.stderr)
"""


def test_a_directory_that_can_not_be_looked_at_is_a_line_among_the_others(tmp_path):
    names = [save(tmp_path, step).rpartition("/")[2] for step in (1, 2)]
    denied = FaultyStorage(
        resolve(str(tmp_path))[0].inner, [Fail("sizes", path=names[0], error=PermissionError(13, "denied"))]
    )

    first, second = listing.entries(RetryingStorage(denied), str(tmp_path), None)

    assert first.problem == "can't be looked at: PermissionError: [Errno 13] denied"
    assert not first.is_orphan
    assert (second.committed, second.problem) == (True, None)


@pytest.mark.parametrize(
    ("command", "calls"),
    [
        ("inspect", [("read", "manifest.json"), ("read", "index.arrow")]),
        ("plan --workers 3", [("read", "manifest.json"), ("read", "index.arrow")]),
        ("verify --full", None),
        ("ls", None),
        ("gc --dry-run", None),
    ],
)
def test_looking_at_a_checkpoint_imports_no_torch_and_inspect_takes_two_reads(tmp_path, command, calls):
    where = save(tmp_path, 3)
    name, *rest = command.split()
    arguments = [name, str(tmp_path) if name in ("ls", "gc") else where, *rest]
    done = subprocess.run(
        [sys.executable, "-c", COUNT_READS, *arguments], capture_output=True, text=True, check=True, timeout=120
    )

    said = done.stderr.strip().splitlines()[-1]
    assert said.endswith("[]")
    if calls is not None:
        assert said == f"{calls} []"


def test_verify_names_file_and_key_of_all_that_is_damaged(tmp_path):
    path = save(tmp_path, 3)
    assert run("verify", path, "--full").exit_code == 0
    _, where = resolve(path)
    opened = opening.parse(opening.fetch(resolve(path)[0], where))
    chunks = {key: opened.chunks[f"model.{key}"][0] for key in ("embed_tokens.weight", "layers.0.weight")}
    for chunk in chunks.values():
        flip(f"{path}/{chunk.file}", chunk.data_offset + 5)
    flip(f"{path}/{layout.DCP_METADATA}", 40)

    assert run("verify", path).exit_code == 0
    found = run_json("verify", path, "--full", exit_code=1)["findings"]

    expected = {(chunk.file, chunk.key) for chunk in chunks.values()} | {(layout.DCP_METADATA, None)}
    assert {(finding["file"], finding["key"]) for finding in found} == expected


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "manifest", "between"])
def test_verify_finds_every_kind_of_damage(tmp_path, damage):
    path = Path(save(tmp_path, 3))
    item = next(path.glob("*.distcp"))
    if damage == "cut":
        item.write_bytes(item.read_bytes()[:-1])
    elif damage == "gone":
        item.unlink()
    elif damage == "between":
        flip(item, item.stat().st_size - 1)
    else:
        flip(path / {"index": layout.INDEX, "manifest": layout.MANIFEST}[damage], 300)
    file = {"index": layout.INDEX, "manifest": layout.MANIFEST}.get(damage, item.name)

    result = run_json("verify", path, "--full", exit_code=1)

    assert file in {finding["file"] for finding in result["findings"]}


@pytest.mark.parametrize(
    ("fault", "num_read"),
    [
        (Truncate("read", path="__0_0", keep_bytes=100), 100),
        (Fail("read", path="__0_0", error=FileNotFoundError("gone by now")), 0),
    ],
)
def test_verify_counts_the_bytes_that_it_read_and_not_those_that_it_could_not(tmp_path, fault, num_read):
    storage, path = resolve(save(tmp_path, 3))
    sizes = storage.sizes(path)

    found = verify.verify(FaultyStorage(storage.inner, [fault]), path, full=True)

    (finding,) = found.findings
    assert found.num_bytes == sum(sizes.values()) - sizes[layout.MANIFEST] - sizes[finding.file] + num_read


def test_verify_says_of_the_manifest_that_a_directory_holds_another_checkpoint(tmp_path):
    path = Path(save(tmp_path, 3))
    (finding,) = run_json(
        "verify", path.rename(path.with_name("checkpoint_s0000000009_aaaaaa")), "--full", exit_code=1
    )["findings"]

    assert (finding["file"], finding["problem"].partition(":")[0]) == (layout.MANIFEST, "holds another checkpoint")


def test_verify_says_that_an_uncommitted_checkpoint_is_one_and_that_a_foreign_one_has_no_checksums(tmp_path):
    path = Path(save(tmp_path, 3))
    (path / layout.MANIFEST).unlink()
    assert "never committed" in run("verify", path).stdout
    dcp.save({"model": {"weight": torch.ones(3)}}, checkpoint_id=tmp_path / "plain")

    result = run("verify", tmp_path / "plain", "--full")

    assert result.exit_code == 0
    assert "no checksums" in result.stdout
    assert not {"intact", "every byte"} & set(re.findall("intact|every byte", result.stdout))
    assert run_json("verify", tmp_path / "plain", "--full")["intact"] is None

    (item,) = (tmp_path / "plain").glob("*.distcp")
    for found, do in (("is cut short", lambda: os.truncate(item, 100)), ("is missing", item.unlink)):
        do()
        with pytest.raises(DamagedCheckpoint, match=found) as error:
            checkpoint_at(tmp_path / "plain")
        assert not isinstance(error.value, HostileCheckpoint)
        assert found in run("verify", tmp_path / "plain").stdout


@pytest.mark.parametrize(
    "text",
    [
        '{"checkpoint_res',  # Ray rewrites it at this moment
        '{"checkpoint_results": []}' + " " * 3_000_000,
        '{"checkpoint_results": [' + "[]," * 500_000 + "[]]}",
    ],
    ids=["half of it", "too long", "of empty lists"],
)
def test_a_run_is_listed_whatever_is_in_rays_list(tmp_path, monkeypatch, text):
    monkeypatch.setattr(ray_train, "MAX_SNAPSHOT_BYTES", 2_000_000)
    monkeypatch.setattr(strict_json, "_FREE_CONTAINERS", 1000)
    save(tmp_path, 1)
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(text)

    result = run("ls", tmp_path)

    assert result.exit_code == 0
    assert "checkpoint_s0000000001_" in result.stdout
    assert "is not known" in result.stderr


def test_a_name_that_commands_the_terminal_is_not_taken_from_rays_list(tmp_path):
    names = ["checkpoint_1", "\x1b[2J", "a\nresumed, verified", "\ud800", "../elsewhere"]
    snapshot = {"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]}
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))

    assert open_run(str(tmp_path)).tracked() == {"checkpoint_1"}


def test_a_command_runs_where_standard_error_is_closed(tmp_path):
    path = save(tmp_path, 1)
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m ray_stateful.cli verify --full "$1" 2>&-', sys.executable, path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, "intact" in done.stdout) == (0, True)


def test_diff_finds_the_largest_difference_and_nothing_between_a_checkpoint_and_itself(tmp_path):
    changed = weights()
    changed["embed_tokens.weight"][3, 4] += 2.0
    changed["layers.0.weight"][0, 0] = float("nan")
    first = save(tmp_path, 1)
    second = save(tmp_path, 2, {**changed, "extra": torch.zeros(2)})

    assert run("diff", first, first).exit_code == 0
    result = run_json("diff", first, second, exit_code=1)

    by_key = {tensor["key"]: tensor for tensor in result["tensors"]}
    assert result["only_in_second"] == ["model.extra"]
    assert result["values"] == ["progress.step"]
    assert by_key.keys() == {"model.embed_tokens.weight", "model.layers.0.weight"}
    assert by_key["model.embed_tokens.weight"]["num_different"] == 1
    assert by_key["model.embed_tokens.weight"]["max_absolute"] == pytest.approx(2.0, abs=1e-6)
    # A NaN is infinitely far from a number; JSON has no infinity.
    assert by_key["model.layers.0.weight"]["max_absolute"] is None


def test_diff_names_a_container_that_differs_where_no_entry_in_it_does_and_no_container_twice(tmp_path):
    common = {"t": torch.ones(2), "same": {1: ["a"]}}
    first = save(tmp_path, 1, {**common, "by": {1: "a", 2: {3: 4}}, "empty": {}, "at": {"x": 1}, "gone": {"y": 2}})
    second = save(tmp_path, 1, {**common, "by": {"1": "a", 2: {3: 4}}, "at": {"x": 2}})

    result = run_json("diff", first, second, exit_code=1)

    assert result["values"] == ["model.at.x", "model.by"]
    assert result["only_in_first"] == ["model.empty", "model.gone.y"]
    assert (result["only_in_second"], result["changed"], result["equal"]) == ([], [], False)
    assert run_json("diff", second, first, exit_code=1)["only_in_second"] == result["only_in_first"]
    assert "model.by: " in run("diff", first, second).stdout

    # A plain DCP directory has no containers to compare.
    assert run("export", first, tmp_path / "dcp", "--format", "dcp").exit_code == 0
    assert run_json("diff", first, tmp_path / "dcp")["equal"]


def test_diff_in_small_slabs_is_the_same_across_shardings(tmp_path, monkeypatch):
    from ray_stateful import slabs

    sharded = run_ranks(2, save_sharded, str(tmp_path / "two"))[0]
    whole = save(tmp_path / "one", 1, {"weight": torch.arange(77.0).reshape(7, 11)})
    monkeypatch.setattr(slabs, "MAX_ELEMENTS", 4)
    monkeypatch.setattr(slabs, "BATCH_BYTES", 40)

    result = run_json("diff", sharded, whole)

    assert result["equal"]
    assert run_json("inspect", sharded)["entries"][0]["sharded_dims"] == [1]


def save_sharded(path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    value = distribute_tensor(torch.arange(77.0).reshape(7, 11), mesh, [Shard(1)])
    state = {"model": Part({"weight": value}), "progress": Part({"step": 1})}
    return checkpoint.save(state, step=1, run=path).uri


@pytest.mark.parametrize("num_workers", [1, 3, 7, 50])
def test_the_plan_is_what_such_a_restore_reads(tmp_path, num_workers):
    uri = save(tmp_path, 1)
    storage, path = resolve(uri)
    opened = opening.parse(opening.fetch(storage, path))

    costs = restore_cost.costs(opened, num_workers)

    sizes = [len(part) for part in torch.arange(40).chunk(num_workers)]
    small = [len(part) for part in torch.arange(8).chunk(num_workers)]
    for rank, cost in enumerate(costs):
        rows = sizes[rank] if rank < len(sizes) else 0
        few = small[rank] if rank < len(small) else 0
        # float32 rows of 8, bfloat16 rows of 8, and an int64 that everyone has.
        assert cost.bytes_wanted == rows * 32 + few * 16 + 8
    # Of a state as small as this, what several workers want pieces of is read once, by any one of them.
    stored = sum(path.stat().st_size for path in Path(uri).glob("*.distcp"))
    assert 40 * 32 + 8 * 16 + 8 <= sum(cost.bytes_read for cost in costs) <= stored
    assert sum(cost.num_requests for cost in costs) >= 1
    assert run_json("plan", uri, "--workers", num_workers)["bytes_read"] == sum(cost.bytes_read for cost in costs)


def test_the_plan_for_one_worker_counts_the_very_requests_that_a_restore_makes(tmp_path):
    uri = save(tmp_path, 1)
    (cost,) = run_json("plan", uri, "--workers", 1)["ranks"]
    report = checkpoint.restore({"model": Part(), "progress": Part()}, checkpoint=uri, run=str(tmp_path))

    assert cost["bytes_read"] == report.statistics.bytes_read
    assert cost["num_requests"] == report.statistics.num_requests


def test_errors_are_one_line_that_says_what_to_do(tmp_path):
    newer = Path(save(tmp_path / "run", 1))
    manifest = json.loads((newer / layout.MANIFEST).read_text())
    (newer / layout.MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    cases = [
        (["ls", tmp_path / "nowhere"], "no such directory"),
        (["ls", newer], "is a checkpoint, not a run"),
        (["inspect", tmp_path / "nowhere"], "ray-stateful ls RUN"),
        (["inspect", newer], "install a newer ray-stateful"),
        (["verify", newer], "install a newer ray-stateful"),
        (["inspect", "ftp://server/run"], "s3://, gs://, abfss://"),
        (["export", newer, tmp_path / "x", "--format", "pickle"], "safetensors"),
        (["gc", tmp_path / "run", "--older-than", "soon"], "24h"),
        (["gc", tmp_path / "nowhere"], "no such directory"),
    ]
    for arguments, words in cases:
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        errors = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
        assert len(errors) == 1


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path):
    path = Path(save(tmp_path, 1))
    (path / layout.MANIFEST).unlink()
    os.mkfifo(path / layout.MANIFEST)

    assert "not a file" in run("inspect", path).stderr


def test_what_a_key_tells_the_terminal_is_shown_and_not_obeyed(tmp_path):
    uri = save(tmp_path, 1, {"\x1b]0;owned\x07\u202ekey\nnext": torch.ones(2), "text": "\x9b31m"})

    for command in (["inspect", uri], ["inspect", uri, "--tree"], ["export", uri, tmp_path / "x", "--format", "dcp"]):
        said = run(*command).stdout
        assert not set("\x1b\x07\x9b\u202e") & set(said)
    assert "\\x1b]0;owned\\x07\\u202ekey\\nnext" in run("inspect", uri).stdout
    missing = run("inspect", uri, "\x1b[2J")
    assert missing.exit_code == 2
    assert "\x1b" not in missing.stderr


def test_a_key_of_a_megabyte_does_not_make_every_line_as_long(tmp_path):
    uri = save(tmp_path, 1, {"k" * 1_000_000: 1, "tensor": torch.ones(2), **{f"key_{n}": n for n in range(300)}})

    # Padded to the longest, these lines would be 300 MB.
    assert len(run("inspect", uri).stdout) < 1_000_000


def test_a_tree_takes_no_more_memory_where_names_have_many_dots():
    def entry(name):
        of_value = {"dtype": None, "shape": (), "sharded_dims": (), "ranks": (0,), "value": "1"}
        return tree.Summary(key=name, path=(name,), num_bytes=1, num_chunks=1, **of_value)

    entries = [entry(f"{n}{'.' * 127}") for n in range(1000)]
    tracemalloc.start()
    num_lines = sum(1 for _ in tree.lines(entries))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert num_lines == 128 * 1000
    assert most < 8 << 20


def test_a_name_of_a_hundred_thousand_dots_is_no_tree_as_deep(tmp_path):
    uri = save(tmp_path, 1, {"a." * 100_000 + "a": torch.ones(2)})

    said = run("inspect", uri, "--tree")
    # All beginnings of it together would take 40 GB, and the indentation 10 GB.
    assert said.exit_code == 0
    assert len(said.stdout) < 1_000_000


def test_plan_knows_no_worker_beyond_those_that_there_are(tmp_path):
    uri = save(tmp_path, 1, {"rank_7": {"tensor": torch.ones(2)}})

    (cost,) = run_json("plan", uri, "--workers", "1")["ranks"]
    assert cost["bytes_wanted"] >= 8


def test_diff_of_plain_directories_sees_all_of_a_tensor_in_a_tuple(tmp_path):
    for name, changed in (("a", 0.0), ("b", 1.0)):
        tensor = torch.zeros(5000)
        tensor[2500] = changed
        # What is printed of it are its ends.
        dcp.save({"value": (tensor,)}, checkpoint_id=tmp_path / name)

    assert run_json("diff", tmp_path / "a", tmp_path / "b", exit_code=1)["values"] == ["value"]
    assert run_json("diff", tmp_path / "a", tmp_path / "a")["values"] == []


def test_a_tensor_whose_name_is_none_in_safetensors_is_not_exported(tmp_path):
    uri = save(tmp_path / "run", 1, {"__metadata__": torch.ones(2), "weight": torch.ones(2)})
    refused = run("export", uri, tmp_path / "out", "--format", "safetensors")

    assert refused.exit_code == 2
    assert "'__metadata__'" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_verify_finds_a_value_that_no_restore_would_take(tmp_path):
    path = Path(save(tmp_path, 3))
    Workshop(path).row("progress.step", value='{"$unknown": 1}')

    (finding,) = run_json("verify", path, exit_code=1)["findings"]

    assert (finding["file"], finding["key"]) == (layout.INDEX, "progress.step")


def test_verify_finds_a_foreign_tensor_that_is_not_the_one_the_metadata_says(tmp_path):
    torch.manual_seed(0)
    dcp.save({"a": torch.ones(4), "b": torch.ones(4).bfloat16()}, checkpoint_id=tmp_path / "plain")
    metadata = dcp.FileSystemReader(tmp_path / "plain").read_metadata()
    metadata.state_dict_metadata["a"].properties.dtype = torch.int32
    (tmp_path / "plain" / layout.DCP_METADATA).write_bytes(pickle.dumps(metadata))

    (finding,) = run_json("verify", tmp_path / "plain", "--full", exit_code=1)["findings"]

    assert finding["key"] == "a"


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_a_manifest_of_gigabytes_is_not_read(tmp_path, command):
    path = Path(save(tmp_path, 3))
    with open(path / layout.MANIFEST, "r+b") as file:
        file.truncate(1 << 40)

    result = run(command, tmp_path if command == "ls" else path)

    assert "a manifest of more than" in result.stdout


@pytest.mark.parametrize("command", ["inspect", "plan --workers 2", "verify --full"])
def test_of_an_index_no_more_is_read_than_the_manifest_says(tmp_path, command):
    path = Path(save(tmp_path, 3))
    with open(path / layout.INDEX, "r+b") as file:
        file.truncate(1 << 42)
    name, *rest = command.split()

    # Whoever asks for it, what follows is not the index's; verify, which looks at sizes, says that it is there.
    assert run(name, path, *rest).exit_code == (1 if name == "verify" else 0)


def test_an_index_that_is_too_large_is_a_finding_and_is_not_read(tmp_path):
    path = Path(save(tmp_path, 3))
    with open(path / layout.INDEX, "r+b") as file:
        file.truncate(1 << 42)
    Workshop(path).manifest(lambda body: body["files"][layout.INDEX].update(size=1 << 42))

    (finding,) = run_json("verify", path, "--full", exit_code=1)["findings"]

    assert finding["file"] == layout.INDEX


INTERRUPTED = """
import os, signal, sys, threading
from ray_stateful import verify
from ray_stateful.cli.main import main
from ray_stateful.storage.local import LocalStorage
verify.PART_BYTES, verify.NUM_THREADS = 1 << 16, 1
# What a shell starts in the background ignores the signal, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
parts = []
def read(self, path, offset=0, length=None, inner=LocalStorage.read):
    if path.endswith(".distcp"):
        parts.append(path)
        if len(parts) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.wait(60)
    return inner(self, path, offset, length)
interrupted, LocalStorage.read = threading.Event(), read
# The main thread is interrupted before the file goes on to be read.
inner_set = threading.Event.set
def set(self):
    inner_set(self)
    if type(self) is threading.Event and sys.exc_info()[0] is KeyboardInterrupt:
        inner_set(interrupted)
threading.Event.set = set
try:
    main(sys.argv[1:])
finally:
    print(len(parts))
"""


def test_an_interrupted_verification_reads_no_further_and_is_not_taken_for_a_finding(tmp_path):
    uri = save(tmp_path, 1, {"weight": torch.ones(1 << 20)})
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "verify", uri, "--full"], capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 130, done.stderr
    assert done.stderr == "interrupted\n"
    assert done.stdout == "3\n"


def test_a_reader_that_has_had_enough_is_no_error(tmp_path):
    uri = save(tmp_path, 1, {f"layer_{n}": torch.ones(1) for n in range(3000)})
    command = f'"{sys.executable}" -m ray_stateful.cli inspect "$1" | head -1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command, "bash", uri], capture_output=True, text=True, timeout=120)

    assert done.returncode == 141
    assert done.stdout == f"{uri}\n"
    assert done.stderr == ""


def test_denied_and_unreachable_stores_are_told_apart():
    denied = StorageError("list", "b/run", "OSError: AWS Error ACCESS_DENIED during ListObjectsV2 operation")
    away = StorageError("list", "b/run", "OSError: AWS Error NETWORK_CONNECTION: curlCode: 7, Couldn't connect")
    nowhere = StorageError("list", "b/run", "OSError: AWS Error NO_SUCH_BUCKET: The specified bucket does not exist")

    assert "credentials" in explain(denied)
    assert "network" in explain(away)
    assert "name of the bucket" in explain(nowhere)


def test_no_advice_is_read_out_of_a_path():
    full = StorageError(
        "read", "/runs/model-00404-of-00500", "OSError: [Errno 28] No space left: '/runs/model-00404-of'"
    )
    hostile = HostileCheckpoint("/data/safetensors/checkpoint", "runs code")

    assert explain(full) == str(full)
    assert "do not use this checkpoint" in explain(hostile)


def test_the_commands_work_on_an_object_store(tmp_path, s3_server, s3_environment):
    bucket = s3_server.make_bucket("cli")
    run_uri = s3_server.uri(f"{bucket}/run")
    name = Path(save_to(run_uri)).name.partition("?")[0]
    where = s3_server.uri(f"{bucket}/run/{name}")
    out = s3_server.uri(f"{bucket}/weights")

    assert [entry["name"] for entry in run_json("ls", run_uri)["checkpoints"]] == [name]
    assert run_json("verify", where, "--full")["intact"]
    assert run_json("inspect", where)["step"] == 5
    assert run_json("export", where, out, "--format", "safetensors")["files"] == ["model.safetensors"]
    assert run_json("import", out, s3_server.uri(f"{bucket}/second"))["num_entries"] == 3
    assert run_json("diff", where, where)["equal"]


def test_no_command_prints_the_secret_of_a_uri(s3_server, s3_environment):
    bucket = s3_server.make_bucket("secret")
    save(s3_server.uri(f"{bucket}/run"), 1)
    with_secret = s3_server.uri(f"{bucket}/run").replace("s3://", "s3://test:hushhush@")
    listed = run("ls", with_secret, "--json")
    name = json.loads(listed.stdout)["checkpoints"][0]["name"]
    one = with_secret.replace("/run", f"/run/{name}", 1)
    out, empty = with_secret.replace("/run", "/weights", 1), with_secret.replace("/run", "/empty", 1)
    printed = [
        listed,
        run("inspect", one),
        run("inspect", one, "--json"),
        run("plan", one, "--workers", "2", "--json"),
        run("diff", one, one),
        run("verify", one),
        run("export", one, out, "--format", "safetensors"),
        run("gc", with_secret, "--dry-run", "--json"),
        run("ls", empty),
        run("ls", one),
        run("inspect", empty),
    ]
    assert [result.exit_code for result in printed] == [0] * 8 + [2] * 3
    assert not any("hushhush" in result.stdout + result.stderr for result in printed)


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "gc"])
def test_a_bucket_that_does_not_exist_is_told_from_an_empty_directory(s3_server, s3_environment, command):
    bucket = s3_server.make_bucket("there")
    missing = run(command, s3_server.uri("nowhere/run"))

    assert missing.exit_code == 2
    assert "check the name of the bucket" in missing.stderr
    assert "bucket" not in run(command, s3_server.uri(f"{bucket}/run")).stderr


def save_to(uri):
    storage, path = resolve(uri)
    from ray_stateful.runs import DirectoryRun

    state = {"model": Part(weights())}
    return checkpoint.save(state, step=5, run=DirectoryRun(storage, path, path)).name


def test_the_terminal_is_not_written_to_when_there_is_none(tmp_path):
    uri = save(tmp_path, 1)
    done = subprocess.run(
        [sys.executable, "-m", "ray_stateful.cli", "verify", uri, "--full"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "intact" in done.stdout

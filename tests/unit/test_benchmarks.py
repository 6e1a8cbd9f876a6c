"""The parts of the benchmarks that others rely on: the S3 server, and the arithmetic of a ratio."""

import io
import json
import os

import pyarrow.fs
import pytest

from benchmarks import __main__ as main
from benchmarks import committing, limits, page, planning, s3_server
from benchmarks.measuring import Ratio, ratio
from benchmarks.peers import Place
from benchmarks.settings import QUICK
from ray_stateful.storage.uris import resolve

boto3 = pytest.importorskip("boto3")


@pytest.fixture(scope="module")
def server():
    before = dict(os.environ)
    os.environ.update(s3_server.ENVIRONMENT)
    with s3_server.s3_server() as running:
        running.make_bucket("bucket")
        yield running
    os.environ.clear()
    os.environ.update(before)


def test_the_server_keeps_what_pyarrow_writes_in_parts_and_counts_it(server):
    filesystem, path = pyarrow.fs.FileSystem.from_uri(server.uri("bucket/large"))
    content = os.urandom((23 << 20) + 7)
    server.take_stats()

    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(content)
    written = server.take_stats()
    file = filesystem.open_input_file(path)
    # Across the seams of parts of 10 MiB.
    pieces = [file.read_at(9 << 20, at) for at in range(0, len(content), 9 << 20)]
    read = server.take_stats()

    assert b"".join(pieces) == content
    assert written["PUT"] == 3
    assert read["GET"] == 3
    assert read["bytes_out"] == len(content)


def test_the_server_lists_and_deletes_as_our_storage_needs_it(server):
    storage, path = resolve(server.uri("bucket/run"))
    for name in ("one/a", "one/b", "two/c"):
        storage.write(f"{path}/{name}", name.encode())

    assert storage.directories(path) == ["one", "two"]
    assert storage.sizes(f"{path}/one") == {"a": 5, "b": 5}
    storage.delete(f"{path}/one")
    assert storage.directories(path) == ["two"]
    with pytest.raises(FileNotFoundError):
        storage.read(f"{path}/one/a")


def test_the_server_lists_in_pages_to_boto3(server):
    client = boto3.client("s3", endpoint_url=server.endpoint)
    for number in range(5):
        client.upload_fileobj(io.BytesIO(b"x" * number), "bucket", f"pages/{number}")

    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket="bucket", Prefix="pages/", PaginationConfig={"PageSize": 2}
    )
    found = {entry["Key"]: entry["Size"] for page in pages for entry in page["Contents"]}

    assert found == {f"pages/{number}": number for number in range(5)}


def test_the_limits_can_be_measured(server, tmp_path):
    rows, ratios = limits.run(QUICK, Place(str(tmp_path / "run")), server)

    assert {row["part"] for row in rows} == {"limits"}
    assert all(row["seconds"] > 0 for row in rows)
    assert ratios == []


def test_a_plan_that_is_known_is_found_without_sending_more_for_more_parameters():
    row = planning._plan(2)

    assert row["items_a_rank"] > 10_000
    # Of a parameter's fifteen entries three are shards, eleven are dealt out, and the last rank has all counters.
    assert row["items_sent_a_rank"] == pytest.approx(row["items_a_rank"] * (3 + 11 / 2 + 1) / 15, abs=2)
    assert row["warm_bytes"] == 2 * 64


def test_the_checkpoint_of_many_ranks_can_be_committed_and_opened():
    row = committing.run(2)

    assert row["index_bytes"] > 100e6  # most of it checksums, which do not depend on the number of ranks
    assert row["open_peak_bytes"] > row["index_bytes"]


def test_a_ratio_is_the_middle_of_the_pairs():
    found = ratio("r", [4.0, 9.0, 30.0], [2.0, 3.0, 3.0], target=3)

    assert (found.value, found.low, found.high) == (3.0, 2.0, 10.0)
    assert found.met
    assert ratio("r", [8.0], [2.0, 4.0]).high == 4.0


def test_results_of_parts_that_were_not_run_are_kept(tmp_path):
    main.write(tmp_path, [Ratio("save.x", 1, 1, 1, 2)], [{"part": "limits", "seconds": 1}], {}, quick=False)
    main.write(tmp_path, [Ratio("plan.x", 3, 2, 4, 2)], [{"part": "checksums", "seconds": 2}], {}, quick=False)

    found = json.loads((tmp_path / "latest.json").read_text())

    assert found["ratios"] == {"save.x": 1, "plan.x": 3}
    assert [row["part"] for row in found["rows"]] == ["limits", "checksums"]
    assert (tmp_path / "ratios.png").stat().st_size > 1000


def test_the_page_says_what_was_measured_and_every_ratio_has_words():
    content = json.loads(page.RESULTS.read_text())
    assert page.filled(page.PAGE.read_text(), content) == page.PAGE.read_text()
    assert content["ratios"].keys() <= page.WORDS.keys()
    assert not content["quick"]

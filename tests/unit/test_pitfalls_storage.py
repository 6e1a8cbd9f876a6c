"""Hazards of storage that show in a whole save or restore; others are where one storage is tested."""

import errno
import json
import logging
import threading
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch

from ray_stateful import checkpoint
from ray_stateful.errors import NoIntactCheckpoint, RankFailed, SaveFailed, StorageError
from ray_stateful.format import layout
from ray_stateful.orphans import newest_change
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage.credentials import without_credentials
from ray_stateful.storage.local import LocalStorage
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy
from ray_stateful.storage.uris import below, resolve
from ray_stateful.testing import Fail, FaultyStorage
from tests import pages


class Part:
    def __init__(self, fill):
        self.tensor = torch.full((300, 3), float(fill))

    def state_dict(self):
        return {"tensor": self.tensor}

    def load_state_dict(self, state_dict):
        self.tensor = state_dict["tensor"]


def save(run, step):
    return checkpoint.save({"part": Part(step)}, step=step, run=run)


def restored_step(run):
    """The step that was restored, which is also what its tensor holds; bit for bit."""
    part = Part(0)
    report = checkpoint.restore({"part": part}, run=run)
    assert torch.equal(part.tensor, torch.full((300, 3), float(report.step)))
    return report.step


class PublishingSink:
    """As object stores close a stream: what was written becomes the object, also when the writer failed."""

    def __init__(self, inner):
        self.inner = inner

    def write(self, data):
        self.inner.write(data)

    def __enter__(self):
        self.inner.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        self.inner.__exit__(None, None, None)


class PublishingStorage(LocalStorage):
    def open_sink(self, path):
        return PublishingSink(super().open_sink(path))


def test_an_object_that_a_failed_write_published_cut_short_is_never_read(tmp_path):
    run = DirectoryRun(LocalStorage(), str(tmp_path), str(tmp_path))
    save(run, 1)
    cut = Fail("sink.write", nth=2, error=OSError(5, "Input/output error"))
    # Nor is it deleted, as when the process dies with its save.
    faulty = FaultyStorage(PublishingStorage(), [cut, Fail("delete", error=PermissionError(13, "denied"))])
    with pytest.raises(SaveFailed):
        save(DirectoryRun(faulty, str(tmp_path), str(tmp_path)), 2)

    (published,) = tmp_path.glob("checkpoint_s0000000002_*/*")
    assert published.stat().st_size > 0
    assert restored_step(run) == 1


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "step"'], ids=["empty", "half"])
def test_a_manifest_that_was_only_begun_is_no_commit(tmp_path, content):
    """Some stores show an empty object from its opening on, and a part of it as soon as that is flushed."""
    save(str(tmp_path), 1)
    begun = Path(tmp_path, save(str(tmp_path), 2).name, "manifest.json")
    begun.write_bytes(content)

    assert restored_step(str(tmp_path)) == 1


class WatchfulRun(DirectoryRun):
    """Looks, when it is told of a checkpoint, what an old one could be deleted for."""

    def report(self, prepared, name):
        assert restored_step(self) == 2


def test_who_deletes_old_checkpoints_hears_of_a_new_one_when_it_can_be_restored_and_not_before(tmp_path):
    run = WatchfulRun(LocalStorage(), str(tmp_path), str(tmp_path))

    assert save(run, 2).step == 2


def test_a_deletion_that_breaks_off_leaves_no_checkpoint_that_looks_whole(tmp_path, monkeypatch):
    save(str(tmp_path), 1)
    gone = save(str(tmp_path), 2).name

    def broken_off(path):
        raise OSError(5, "Input/output error", path)

    with monkeypatch.context() as patched:
        patched.setattr("ray_stateful.storage.local.shutil.rmtree", broken_off)
        with pytest.raises(OSError, match="Input/output"):
            LocalStorage().delete(str(tmp_path / gone))

    assert len(list((tmp_path / gone).iterdir())) > 1
    assert restored_step(str(tmp_path)) == 1


def test_a_secret_key_is_neither_in_a_checkpoint_nor_in_reports_logs_and_errors(s3_server, caplog, capsys):
    s3_server.make_bucket("secretive")
    uri = s3_server.uri("secretive/run").replace("s3://", "s3://an-access-key:the-secret-key@")
    with caplog.at_level(logging.DEBUG):
        saved = save(uri, 3)
        assert restored_step(uri) == 3
        with pytest.raises(NoIntactCheckpoint) as error:
            checkpoint.restore({"part": Part(0)}, checkpoint="checkpoint_s0000000009_abcdef", run=uri)

    storage, path = resolve(uri)
    directory = f"{path}/{saved.name}"
    stored = [storage.read(f"{directory}/{name}") for name in storage.sizes(directory)]
    assert len(stored) >= 4
    assert not any(b"the-secret-key" in content for content in stored)
    said = [str(saved), repr(saved), str(error.value), caplog.text, *capsys.readouterr()]
    assert [text for text in said if "the-secret-key" in text] == []


def test_a_sas_token_is_not_in_the_errors_of_a_storage_that_can_not_be_reached(caplog):
    nowhere = "&".join(f"{kind}_storage_authority=127.0.0.1%3A9" for kind in ("blob", "dfs"))
    storage, path = resolve(f"abfs://container@account/run?enable_tls=false&{nowhere}&sv=1&sig=the-token")
    storage = storage.within(1.0)
    calls = (storage.sizes, storage.read, storage.delete, partial(newest_change, storage))

    for call in calls:
        with pytest.raises(StorageError) as error:
            call(f"{path}/file")
        assert "the-token" not in "".join(traceback.format_exception(error.value))
    assert "the-token" not in caplog.text


def test_a_long_text_without_a_secret_is_shown_in_time_that_grows_with_its_length():
    for text in ("a." * 300_000, "s3://a:b/" * 100_000, "://a:" * 100_000):
        assert without_credentials(text) == text


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://key:secret@bucket/runs?region=x", "s3://bucket/runs?region=x"),
        ("s3://key:se%2Fcret@bucket", "s3://bucket"),
        ("s3://key:se/cret@bucket/runs", "s3://bucket/runs"),
        ("s3://bucket/runs?access_key=abc&secret_key=def#", "s3://bucket/runs?access_key=***&secret_key=***#"),
        ("http://host:9000/a@b", "http://host:9000/a@b"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("/data/key:secret@x", "/data/key:secret@x"),
        ("abfs://c@a.x/d?client_secret=abc&tenant_id=t", "abfs://c@a.x/d?client_secret=***&tenant_id=t"),
        ("abfss://container@account.dfs.core.windows.net/runs", "abfss://container@account.dfs.core.windows.net/runs"),
    ],
)
def test_credentials_are_left_out_of_a_uri_and_nothing_else_is(uri, shown):
    assert without_credentials(uri) == shown


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:the/SECRET@bucket/runs",
        "s3://AKIAKEY:the#SECRET@bucket/runs",
        "s3://AKIAKEY:12?SECRET@bucket/runs",
        "s3://AKIAKEY:SECRET@bucket/runs?region=x&regoin=y",
        "s3://AKIAKEY:SECRET@bucket/a b",
        "s3://AKIAKEY:SECRET@bucket/\u00fc",
        "s3://AKIAKEY:SECRET\n@bucket/",
        "abfss://:SECRET@account.dfs.core.windows.net/c/p q",
        "abfss://c@account.dfs.core.windows.net/a b?sig=SECRET",
        "ftp://user:SECRET@host/x",
    ],
)
def test_a_secret_in_a_uri_that_can_not_be_read_is_not_in_its_error(tmp_path, uri):
    state = {"part": Part(0)}
    for use in (
        lambda: checkpoint.save(state, step=1, run=uri),
        lambda: checkpoint.restore(state, run=uri),
        lambda: checkpoint.restore(state, run=tmp_path, checkpoint=uri),
    ):
        with pytest.raises(ValueError, match=r"a secret in it|%23") as error:
            use()
        assert "SECRET" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        ("file://{}/exp#1", "%23"),
        ("gs://anonymous@bucket/exp#1", "%23"),
        ("s3://bucket/exp#1?region=us-east-1", "%23"),
        ("file://{}/exp?1", "%3F"),
        ("file:{}/exp", "file:///"),
        ("s3:/bucket/exp", "s3://"),
        ("~/exp", "expanduser"),
        ("", "name a directory"),
    ],
)
def test_a_place_that_would_be_another_one_is_refused_and_the_right_way_to_write_it_said(
    tmp_path, monkeypatch, uri, instead
):
    monkeypatch.chdir(tmp_path)
    for use in (lambda run: save(run, 1), restored_step):
        with pytest.raises(ValueError, match=instead):
            use(uri.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_run_that_is_a_file_is_an_error_and_never_a_start_from_scratch(tmp_path, below):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RankFailed, match="Not a directory"):
        restored_step(f"{tmp_path}/file{below}")


def test_the_rule_that_removes_unfinished_uploads_is_on_the_page_about_storage_as_aws_takes_it():
    (block,) = [block for block in pages.blocks_of(pages.ROOT / "docs/storage.md") if block.language == "json"]
    (rule,) = json.loads(block.code)["Rules"]

    assert (rule["Status"], rule["Filter"]) == ("Enabled", {"Prefix": ""})
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] > 0


class LateStorage(LocalStorage):
    """Writes a manifest when it is told to, and not before."""

    now = threading.Event()
    written = threading.Event()

    def write(self, path, data):
        if path.endswith(layout.MANIFEST):
            self.now.wait(60.0)
        super().write(path, data)
        if path.endswith(layout.MANIFEST):
            self.written.set()


def test_a_save_whose_manifest_was_given_up_says_that_it_may_be_committed_later(tmp_path):
    late = RetryingStorage(LateStorage(""), RetryPolicy(attempt_s=1.0, budget_s=0.1, first_pause_s=0.01))
    with pytest.raises(SaveFailed, match=r"if it comes to be there .* a restore finds it"):
        save(DirectoryRun(late, str(tmp_path), str(tmp_path)), 2)
    assert checkpoint.restore({"part": Part(0)}, run=str(tmp_path)) is None

    late.inner.now.set()
    assert late.inner.written.wait(60.0)
    assert restored_step(str(tmp_path)) == 2


def test_a_save_whose_manifest_was_denied_promises_nothing(tmp_path):
    inner = resolve(str(tmp_path))[0].inner
    denied = FaultyStorage(inner, [Fail("write", path=layout.MANIFEST, error=PermissionError(errno.EACCES, "denied"))])
    with pytest.raises(SaveFailed, match="denied") as error:
        save(DirectoryRun(RetryingStorage(denied), str(tmp_path), str(tmp_path)), 2)
    assert "a restore finds it" not in str(error.value)


def test_a_name_with_any_character_is_written_in_percent_signs_in_a_uri_and_as_it_is_in_a_path(tmp_path):
    save(f"file://{tmp_path}/exp%231%3F%25", 7)
    assert restored_step(f"{tmp_path}/exp#1?%") == 7


def test_the_uri_of_a_checkpoint_can_be_restored_from(s3_environment):
    s3_environment.make_bucket("by-uri")
    run = s3_environment.uri("by-uri/run")
    saved = save(run, 4)

    part = Part(0)
    assert checkpoint.restore({"part": part}, checkpoint=saved.uri, run=run).step == 4
    assert torch.equal(part.tensor, Part(4).tensor)
    assert below("/data/run?", "name") == "/data/run?/name"

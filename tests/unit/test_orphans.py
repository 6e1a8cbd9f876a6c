"""Orphans: which directories are, and that nothing else is ever deleted."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.fs
import pytest
from click.testing import CliRunner

from ray_stateful import orphans
from ray_stateful.cli.main import main
from ray_stateful.cli.places import ListedRun, open_run
from ray_stateful.errors import StorageError
from ray_stateful.format import layout
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.storage.retries import RetryingStorage
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage

HOUR = 3600.0


def make(run, step, *, attempt="abcdef", age_h=48.0, committed=False, aside=False):
    name = str(layout.CheckpointName(step, attempt))
    directory = run / name
    directory.mkdir(parents=True)
    files = ["__0_0.distcp"] + ([layout.MANIFEST] if committed else []) + ([".tmp-1-x"] if aside else [])
    for file in files:
        (directory / file).write_bytes(b"12345")
    then = time.time() - age_h * HOUR
    for path in (*directory.iterdir(), directory):
        # What is being written aside is young, whatever else is old.
        when = time.time() if path.name.startswith(".tmp-") else then
        os.utime(path, (when, when))
    return name


def names(run):
    return sorted(path.name for path in run.iterdir() if path.is_dir())


def gc(run, *arguments):
    result = CliRunner().invoke(main, ["gc", str(run), "--json", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_only_old_uncommitted_directories_that_nobody_counts_are_deleted(tmp_path):
    make(tmp_path, 1)
    kept = {
        make(tmp_path, 2, committed=True),
        make(tmp_path, 3, age_h=1.0),
        make(tmp_path, 4),  # Ray counts it
        make(tmp_path, 5, aside=True),  # a file of it is being written
        make(tmp_path, 6),  # the newest of all
    }
    others = ["checkpoint_2026-01-01_00-00-00.000000", "checkpoint_s1_abcdef", "logs", "checkpoint_s0000000001_ABCDEF"]
    for other in others:
        (tmp_path / other).mkdir()
        os.utime(tmp_path / other, (0, 0))
    counted = str(layout.CheckpointName(4, "abcdef"))
    snapshot = {"checkpoint_results": [{"checkpoint_dir_name": counted}]}
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))

    before = names(tmp_path)
    dry = gc(tmp_path, "--dry-run")
    assert names(tmp_path) == before
    done = gc(tmp_path)

    assert dry.exit_code == done.exit_code == 0
    for result in (dry, done):
        assert [one["name"] for one in json.loads(result.stdout)["orphans"]] == ["checkpoint_s0000000001_abcdef"]
    assert names(tmp_path) == sorted([*kept, *others])


@pytest.mark.parametrize(
    "what", ["a file of the user's", "a directory", "a link", "a pipe", "a manifest that is a link"]
)
@pytest.mark.parametrize("when", ["before the search", "before the deletion"])
def test_a_directory_with_what_no_save_writes_stays(tmp_path, what, when):
    name = make(tmp_path, 1)
    make(tmp_path, 2, committed=True)
    run, directory = open_run(str(tmp_path)), tmp_path / name
    found = orphans.find(run)
    assert [one.name for one in found] == [name]

    if what == "a directory":
        (directory / "exported").mkdir()
    elif what == "a link":
        (directory / "latest").symlink_to("__0_0.distcp")
    elif what == "a pipe":
        os.mkfifo(directory / "notes")
    elif what == "a manifest that is a link":
        (tmp_path / "elsewhere").write_text("{}")
        (directory / layout.MANIFEST).symlink_to("../elsewhere")
    else:
        (directory / "notes.txt").write_text("keep me")
    then = time.time() - 48 * HOUR
    os.utime(directory, (then, then))
    if when == "before the search":
        found = orphans.find(run, older_than_s=0.0)
        assert found == []
    _, kept = orphans.delete(run, found, changed=lambda storage, path: found[0].changed_s)

    assert list(kept) == [one.name for one in found]
    assert name in names(tmp_path)


def test_a_manifest_that_is_a_link_is_seen_also_where_the_storage_is_a_directory_of_this_machine(tmp_path):
    directory = tmp_path / "run" / make(tmp_path / "run", 1)
    make(tmp_path / "run", 2, committed=True)
    (tmp_path / "elsewhere").write_text("{}")
    filesystem = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    run = ListedRun(RetryingStorage(PyarrowStorage(filesystem)), "run", "run", filesystem)
    assert [one.name for one in orphans.find(run, older_than_s=0.0)] == [directory.name]

    (directory / layout.MANIFEST).symlink_to("../../elsewhere")

    assert orphans.find(run, older_than_s=0.0) == []


class Lagging:
    """As an object store whose listings do not have yet what was written just now."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def sizes(self, path):
        return {name: size for name, size in self.inner.sizes(path).items() if name != layout.MANIFEST}


def test_a_checkpoint_whose_manifest_no_listing_shows_yet_stays(tmp_path):
    make(tmp_path, 1, committed=True)
    orphan = make(tmp_path, 2)
    make(tmp_path, 3)
    run = open_run(str(tmp_path))

    assert [one.name for one in orphans.find(replace(run, storage=Lagging(run.storage.inner)))] == [orphan]


def test_a_directory_in_which_something_was_made_or_deleted_a_while_ago_stays(tmp_path):
    name = make(tmp_path, 1)
    make(tmp_path, 2, committed=True)
    # Only the directory itself tells of a file that is there no more.
    os.utime(tmp_path / name)

    assert orphans.find(open_run(str(tmp_path))) == []


def test_the_age_is_the_users_to_choose(tmp_path):
    young = make(tmp_path, 1, age_h=1.0)
    make(tmp_path, 2, committed=True)

    assert young not in {one.name for one in orphans.find(open_run(str(tmp_path)))}
    gc(tmp_path, "--older-than", "30min")
    assert young not in names(tmp_path)


def test_a_directory_of_unknown_age_is_left_alone(tmp_path):
    make(tmp_path, 1)
    make(tmp_path, 2, committed=True)
    assert orphans.find(open_run(str(tmp_path)), changed=lambda storage, path: None) == []


@pytest.mark.parametrize("what", ["committed", "written", "counted"])
def test_what_changes_between_the_search_and_the_deletion_stays(tmp_path, what):
    name = make(tmp_path, 1)
    make(tmp_path, 2, committed=True)
    run = open_run(str(tmp_path))
    found = orphans.find(run)
    assert [one.name for one in found] == [name]

    if what == "counted":
        snapshot = {"checkpoint_results": [{"checkpoint_dir_name": name}]}
        (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    else:
        file = layout.MANIFEST if what == "committed" else "__1_0.distcp"
        (tmp_path / name / file).write_bytes(b"x")
    deleted, kept = orphans.delete(run, found)

    assert deleted == []
    assert list(kept) == [name]
    assert name in names(tmp_path)


def long_ago(storage, path):
    return 0.0


def test_an_orphan_that_can_not_be_deleted_is_kept_with_the_reason_and_the_others_go(tmp_path):
    first, second, newest = (make(tmp_path, step) for step in (1, 2, 3))
    (tmp_path / "logs").mkdir()
    storage, path = resolve(str(tmp_path))
    denied = Fail("delete", path=first, error=PermissionError(13, "not yours"))
    run = DirectoryRun(RetryingStorage(FaultyStorage(storage.inner, [denied])), path, path)
    found = orphans.find(run, changed=long_ago)

    # A name that no save gives is of something else, whoever says that it is an orphan.
    deleted, kept = orphans.delete(run, [*found, replace(found[0], name="logs")], changed=long_ago)

    assert [orphan.name for orphan in deleted] == [second]
    assert kept.keys() == {first, "logs"}
    assert "not yours" in kept[first]
    assert names(tmp_path) == sorted([first, newest, "logs"])


def test_a_storage_that_fails_costs_no_more_than_a_warning(tmp_path, caplog):
    storage, path = resolve(str(tmp_path))
    down = Fail("directories", error=OSError(5, "the disk is gone"))
    orphans.collect(DirectoryRun(FaultyStorage(storage.inner, [down]), path, path))
    assert "were not deleted: [Errno 5] the disk is gone" in caplog.text


def test_nothing_is_deleted_when_rays_list_cannot_be_read(tmp_path):
    make(tmp_path, 1)
    make(tmp_path, 2, committed=True)
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')

    with pytest.raises(StorageError):
        orphans.find(open_run(str(tmp_path)))
    result = gc(tmp_path)

    assert result.exit_code == 2
    assert len(names(tmp_path)) == 2


def test_orphans_of_an_object_store_are_found_and_deleted(s3_server, s3_environment):
    bucket = s3_server.make_bucket("orphans")
    run = open_run_after_writing(s3_server.uri(f"{bucket}/run"))

    found = orphans.find(run, older_than_s=0.0, now_s=time.time() + 60)
    assert [one.name for one in found] == ["checkpoint_s0000000001_abcdef"]
    assert orphans.find(run) == []
    deleted, kept = orphans.delete(run, found)

    assert (len(deleted), kept) == (1, {})
    assert run.storage.directories(run.path) == ["checkpoint_s0000000002_abcdef"]


def open_run_after_writing(uri):
    storage, path = resolve(uri)
    storage.write(f"{path}/checkpoint_s0000000001_abcdef/__0_0.distcp", b"half")
    storage.write(f"{path}/checkpoint_s0000000002_abcdef/{layout.MANIFEST}", b"{}")
    return open_run(uri)


def test_a_run_without_orphans_is_no_error(tmp_path):
    make(tmp_path, 1, committed=True)
    result = CliRunner().invoke(main, ["gc", str(tmp_path)])
    assert result.exit_code == 0
    assert "0 orphan(s)" in result.stdout
    assert Path(tmp_path / "checkpoint_s0000000001_abcdef").is_dir()

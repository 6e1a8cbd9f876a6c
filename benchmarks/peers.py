"""Who is compared: every contender saves and restores the same model and optimizer, under a directory of its own.

The peers are what people have: stock DCP to a local directory, over pyarrow, over s3fs; Ray's documented recipe; AWS's
own DCP classes. Those that need packages of their own take them from `PEERS`, a folder made by `pip install --target`,
as their botocore is not the one that is installed here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import posixpath
import shutil
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow.fs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks import states
from benchmarks.s3_server import REGION, S3Server

PEERS = os.environ.get("BENCHMARK_PEERS", "build/peers")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contender saves: a directory of this machine, or of the server's bucket."""

    directory: str
    server: S3Server | None = None

    @property
    def uri(self) -> str:
        return self.directory if self.server is None else self.server.uri(self.directory)

    def filesystem(self) -> pyarrow.fs.FileSystem:
        return pyarrow.fs.LocalFileSystem() if self.server is None else pyarrow.fs.FileSystem.from_uri(self.uri)[0]

    def below(self, name: str) -> Place:
        return Place(posixpath.join(self.directory, name), self.server)

    def clear(self) -> None:
        """Delete everything in it; on one rank."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem().delete_dir(self.directory)


class Contender(ABC):
    """One way to save and restore; both calls are collective."""

    name: ClassVar[str]
    # Of the packages in PEERS.
    needs: ClassVar[str | None] = None

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    @abstractmethod
    def save(self, place: Place) -> None: ...

    @abstractmethod
    def restore(self, place: Place) -> None: ...

    @classmethod
    def is_there(cls) -> bool:
        """Whether its packages are; they are found from now on."""
        if cls.needs is None:
            return True
        if os.path.isdir(PEERS) and os.path.abspath(PEERS) not in sys.path:
            # In front: an old s3fs may be installed, and its botocore is another one.
            sys.path.insert(0, os.path.abspath(PEERS))
        return importlib.util.find_spec(cls.needs) is not None


class Ours(Contender):
    """What a training does: one `Checkpointer` for all saves, which plans at the first."""

    name = "ours"
    plans_once: ClassVar[bool] = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from ray_stateful import ModelState, OptimizerState

        super().__init__(model, optimizer)
        self.state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
        self.report: Any = None
        self._checkpointers: dict[str, Any] = {}

    def save(self, place: Place) -> None:
        from ray_stateful import Checkpointer

        if place.uri not in self._checkpointers or not self.plans_once:
            self._checkpointers[place.uri] = Checkpointer(self.state, at_end=False, run=place.uri)
        self._checkpointers[place.uri].save()

    def restore(self, place: Place) -> None:
        from ray_stateful.checkpoint import restore
        from ray_stateful.runs import DirectoryRun
        from ray_stateful.storage.uris import resolve

        storage, path = resolve(place.uri)
        with contextlib.redirect_stdout(io.StringIO()):
            self.report = restore(self.state, run=DirectoryRun(storage, path, place.uri))
        assert self.report is not None


class OursAtFirst(Ours):
    """A save of which nothing is known: planned anew."""

    name = "ours, first save"
    plans_once = False


class StockLocal(Contender):
    """`dcp.save` and `dcp.load` with a directory, as the tutorial has it."""

    name = "stock DCP"

    def writer(self, place: Place) -> Any:
        return FileSystemWriter(place.directory)

    def reader(self, place: Place) -> Any:
        return FileSystemReader(place.directory)

    def save(self, place: Place) -> None:
        dcp.save(self._collect(), storage_writer=self.writer(place))

    def restore(self, place: Place) -> None:
        state = self._collect()
        dcp.load(state, storage_reader=self.reader(place))
        self._load(state)

    def _collect(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def _load(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


class StockPyarrow(StockLocal):
    """Stock DCP whose streams are files of a pyarrow filesystem: what Ray's storage context gives a worker."""

    name = "stock DCP over pyarrow"

    def writer(self, place: Place) -> Any:
        # Stock syncs a file by its descriptor, and a stream has none.
        writer = FileSystemWriter(place.directory, sync_files=False)
        writer.fs, writer.path = _PyarrowFiles(place.filesystem()), place.directory
        return writer

    def reader(self, place: Place) -> Any:
        reader = FileSystemReader(place.directory)
        reader.fs, reader.path = _PyarrowFiles(place.filesystem()), place.directory
        return reader


class StockS3fs(StockLocal):
    """Stock DCP with its own fsspec classes."""

    name = "stock DCP over s3fs"
    needs = "s3fs"

    def writer(self, place: Place) -> Any:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        return FsspecWriter(f"s3://{place.directory}", **self._options(place))

    def reader(self, place: Place) -> Any:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        return FsspecReader(f"s3://{place.directory}", **self._options(place))

    def _options(self, place: Place) -> dict[str, Any]:
        assert place.server is not None
        where = {"endpoint_url": place.server.endpoint, "region_name": REGION}
        # A new one each time: a listing that was kept would save a request that a new process has to make.
        return {"key": "test", "secret": "test", "client_kwargs": where, "skip_instance_cache": True}


class S3TorchConnector(StockLocal):
    """AWS's own writer and reader for DCP."""

    name = "s3torchconnector"
    needs = "s3torchconnector"

    def writer(self, place: Place) -> Any:
        from s3torchconnector.dcp import S3StorageWriter

        return S3StorageWriter(REGION, f"s3://{place.directory}", s3client_config=self._config(place))

    def reader(self, place: Place) -> Any:
        from s3torchconnector.dcp import S3StorageReader

        return S3StorageReader(REGION, f"s3://{place.directory}", s3client_config=self._config(place))

    def _config(self, place: Place) -> Any:
        from s3torchconnector import S3ClientConfig

        assert place.server is not None
        os.environ["AWS_ENDPOINT_URL"] = place.server.endpoint
        return S3ClientConfig(force_path_style=True)


class RayRecipe(StockLocal):
    """Ray's guide: `dcp.save` to a temporary directory and report it; `as_directory` and `dcp.load`.

    There is no cluster: the ranks call the functions that `ray.train.report` and `Checkpoint` call, and what Ray does
    around them costs nothing here. All ranks are on one node, which downloads the checkpoint once for all of them.
    """

    name = "Ray's recipe"
    shares_node: ClassVar[bool] = True

    def save(self, place: Place) -> None:
        from ray.train.v2._internal.execution.storage import _upload_to_fs_path

        with tempfile.TemporaryDirectory() as directory:
            dcp.save(self._collect(), storage_writer=FileSystemWriter(directory))
            _upload_to_fs_path(directory, place.filesystem(), place.directory)
        # The report's barrier.
        dist.barrier()

    def restore(self, place: Place) -> None:
        from ray.train import Checkpoint

        checkpoint = Checkpoint(place.directory, filesystem=place.filesystem())
        if self.shares_node:
            # Ray gives all workers the same object, and with it the name of the directory that they share.
            box = [checkpoint._uuid]
            dist.broadcast_object_list(box)
            checkpoint._uuid = box[0]
        with checkpoint.as_directory() as directory:
            state = self._collect()
            dcp.load(state, storage_reader=FileSystemReader(directory))
            # A rank that left early would delete what the others read.
            dist.barrier()
        self._load(state)


class RayRecipeApart(RayRecipe):
    """With every rank on a node of its own, as far as the download goes: each makes one."""

    name = "Ray's recipe, a node each"
    shares_node = False


class TorchSnapshot(Contender):
    """torchsnapshot, which knows no DTensor: every rank's shards are its own, and only as many ranks read them."""

    name = "torchsnapshot"
    needs = "torchsnapshot"

    def save(self, place: Place) -> None:
        from torchsnapshot import Snapshot

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Snapshot.take(place.directory, self._state())

    def restore(self, place: Place) -> None:
        from torchsnapshot import Snapshot

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Snapshot(place.directory).restore(self._state())

    def _state(self) -> dict[str, Any]:
        from torchsnapshot import StateDict

        found = states.tensors(self.model, self.optimizer)
        return {"state": StateDict(**{f"t{number}": tensor.to_local() for number, tensor in enumerate(found)})}


class _PyarrowFiles(FileSystemBase):
    """What stock DCP asks of a filesystem, over pyarrow."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem) -> None:
        self._filesystem = filesystem

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        opened = (
            self._filesystem.open_input_file(str(path))
            if "r" in mode
            else self._filesystem.open_output_stream(str(path), compression=None)
        )
        with opened as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> str:
        return posixpath.join(str(path), suffix)

    def init_path(self, path: Any, **kwargs: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        self._filesystem.move(str(path), str(new_path))

    def mkdir(self, path: Any) -> None:
        self._filesystem.create_dir(str(path), recursive=True)

    def exists(self, path: Any) -> bool:
        return bool(self._filesystem.get_file_info(str(path)).type != pyarrow.fs.FileType.NotFound)

    def rm_file(self, path: Any) -> None:
        self._filesystem.delete_file(str(path))

    def ls(self, path: Any) -> list[str]:
        return [info.path for info in self._filesystem.get_file_info(pyarrow.fs.FileSelector(str(path)))]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def fresh_directory(place: Place) -> None:
    """Empty, on rank 0, before anybody writes there."""
    if dist.get_rank() == 0:
        place.clear()
        if place.server is None:
            shutil.rmtree(place.directory, ignore_errors=True)
            os.makedirs(place.directory)
    dist.barrier()

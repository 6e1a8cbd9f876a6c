"""Run a function on N real gloo processes, with a deadline, and get every rank's outcome back."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_PRELOAD = ["torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "pyarrow.fs"]


class RanksHung(Exception):
    """Some ranks did not finish before the deadline; their stacks are in the message."""


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 90.0,
    collective_timeout_s: float = 30.0,
) -> list[Any]:
    """Call `function(*args)` on each of `num_ranks` processes of one gloo group.

    Each process has `torch.distributed` set up; the function asks it for its rank.

    Args:
        function: Importable by name: it is pickled.
        timeout_s: For all of it, in seconds. Ranks still running then are killed.
        collective_timeout_s: Of the default process group, in seconds.

    Returns:
        One entry per rank: what the function returned, or the exception it raised, of whatever kind. For a process
        that died without either it is a `ChildProcessError` that names the exit code.

    Raises:
        RanksHung: at the deadline, with every stack of every rank that had not finished.
    """
    context = multiprocessing.get_context("forkserver")
    # Forked from a server that has imported torch and done nothing else: a rank starts in a tenth of the time, and
    # no thread or device of the test process is copied along.
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="run_ranks_") as directory:
        ranks = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(
                    rank,
                    num_ranks,
                    directory,
                    collective_timeout_s,
                    timeout_s,
                    theirs,
                    _task(function, args),
                ),
                daemon=True,
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            return _collect(ranks, directory, timeout_s)
        finally:
            for process, connection in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
                connection.close()


def _collect(ranks: list[Any], directory: str, timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    outcomes: dict[int, Any] = {}
    while len(outcomes) < len(ranks):
        waiting = {connection: rank for rank, (_, connection) in enumerate(ranks) if rank not in outcomes}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RanksHung(_stacks(list(waiting.values()), directory, timeout_s))
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            try:
                outcomes[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                process = ranks[rank][0]
                process.join()
                outcomes[rank] = ChildProcessError(f"rank {rank} died with exit code {process.exitcode}")
    return [outcomes[rank] for rank in range(len(ranks))]


def _task(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    return pickle.dumps((function, args, dict(os.environ)))


def _rank_main(
    rank: int,
    num_ranks: int,
    directory: str,
    collective_timeout_s: float,
    timeout_s: float,
    connection: Connection,
    pickled: bytes,
) -> None:
    import torch
    import torch.distributed as dist

    stacks = open(_stack_file(directory, rank), "w")  # noqa: SIM115 - open as long as the process lives
    # A little before the deadline, so that the stacks are there when the parent gives up.
    faulthandler.dump_traceback_later(max(0.5, timeout_s - 2.0), file=stacks)
    torch.set_num_threads(1)
    try:
        function, args, environment = pickle.loads(pickled)
        # The caller's present environment: the server that ranks are forked from keeps that of the first call.
        os.environ.clear()
        os.environ.update(environment)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/rendezvous",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=collective_timeout_s),
        )
        # Or a rank could be done, and gone, before the others have connected to all of their peers.
        dist.barrier()
        outcome = function(*args)
    except BaseException as error:  # noqa: BLE001 - an outcome like any other: the test looks at it
        if sys.version_info >= (3, 11):
            error.add_note("".join(traceback.format_exception(error)))
        outcome = error
    connection.send_bytes(_pickled(outcome))
    # Without running the group's destructor: a rank whose peers are gone would wait for them in it.
    connection.close()
    stacks.close()
    os._exit(0)


def _pickled(outcome: Any) -> bytes:
    try:
        data = pickle.dumps(outcome)
        # Pickle makes an exception anew from what it handed to Exception; many classes take different arguments.
        pickle.loads(data)
    except Exception as error:  # noqa: BLE001 - whatever pickling raised is what the test must see
        told = TypeError(f"outcome {outcome!r} can't be pickled, and read back: {error}")
        if sys.version_info >= (3, 11):
            for note in getattr(outcome, "__notes__", []):
                told.add_note(note)
        return pickle.dumps(told)
    return data


def _stack_file(directory: str, rank: int) -> str:
    return os.path.join(directory, f"stacks_{rank}.txt")


def _stacks(hung: list[int], directory: str, timeout_s: float) -> str:
    parts = [f"ranks {hung} had not finished after {timeout_s} s"]
    for rank in hung:
        with open(_stack_file(directory, rank)) as file:
            parts.append(f"rank {rank}:\n{file.read()}")
    return "\n".join(parts)

"""How a trainer's datasets reach its workers if some of them are to resume in mid-epoch: the driver's side.

Ray configures datasets in an actor that knows nothing of checkpoints. So they are not split there: rank 0 of the
workers splits them, once it has restored its state. `ray_data.py` is the workers' side.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from ray_stateful.states.row_sets import RowSet, as_ids

# Operators that choose rows, or assign ids to them, by position.
_POSITIONAL = {"Limit", "Zip"}
_SHUFFLES = {"RandomShuffle", "RandomizeBlocks"}


class ResumableDataConfig(DataConfig):
    """A `ray.train.DataConfig` for a trainer some of whose datasets are to resume in mid-epoch.

    Args:
        row_id: The column of integers that identifies a row, the same each time the dataset is read. A 64-bit hash
            will do, like that of `ray.data.read_parquet(..., include_row_hash=True)`.
        resumable: Names of the datasets that workers read with `RayDataBatches`. `DataConfig` handles the others.
        execution_options: Of all datasets; by default, resumable ones take those of the driver's `DataContext`.
        options: As for `ray.train.DataConfig`.
    """

    def __init__(
        self,
        row_id: str,
        *,
        resumable: Collection[str] = ("train",),
        execution_options: ExecutionOptions | None = None,
        **options: Any,
    ) -> None:
        if isinstance(resumable, str):
            raise ValueError(f"resumable={resumable!r} is one string: give the names of the datasets, [{resumable!r}]")
        super().__init__(execution_options=execution_options, **options)
        self._row_id, self._resumable, self._options = row_id, frozenset(resumable), execution_options
        self._with_locality = bool(options.get("enable_shard_locality", True))

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Called by Ray when rank 0 asks for its shard, in an actor that knows nothing of checkpoints.

        So nothing is split here: rank 0 gets the dataset, and splits it once it has restored its state.
        """
        others = {name: dataset for name, dataset in datasets.items() if name not in self._resumable}
        output: list[dict[str, Any]] = super().configure(others, world_size, worker_handles, worker_node_ids, **kwargs)
        for name in sorted(self._resumable & set(datasets)):
            # A copy: the dataset and its context belong to the user.
            dataset = datasets[name].copy(datasets[name])
            dataset.context.execution_options = copy.deepcopy(self._options or self.default_ingest_options())
            if dataset.name is None:
                dataset.set_name(name)
            refuse_positional(name, dataset)
            hints = worker_node_ids if self._with_locality else None
            for rank in range(world_size):
                output[rank][name] = ResumableShard(self._row_id, dataset if rank == 0 else None, hints)
        return output


def refuse_positional(name: str, dataset: Dataset) -> None:
    """Refuse a dataset that chooses its rows by position, if their order may differ each time it is read.

    Raises:
        ValueError: it has a `limit` or a `zip`, and no fixed order; names what the order lacks.
    """
    operators: list[Any] = list(dataset._logical_plan.dag.post_order_iter())
    positional = sorted(_POSITIONAL & {type(operator).__name__ for operator in operators})
    if not positional:
        return
    lacks = []
    if not dataset.context.execution_options.preserve_order:
        lacks.append("blocks come as tasks finish: give ExecutionOptions(preserve_order=True)")
    for operator in operators:
        if type(operator).__name__ not in _SHUFFLES:
            continue
        # Ray may mix the number of the execution into a seed, and a resumed run counts executions from the start.
        seeds = getattr(operator, "seed_config", None)
        if seeds is None or seeds.seed is None or seeds.reseed_after_execution:
            lacks.append(
                f"{type(operator).__name__} gives a different order at each execution: give it an integer seed, or "
                "shuffle afterwards"
            )
    if lacks:
        raise ValueError(
            f"dataset {name!r} has {' and '.join(positional)}, so which rows it consists of depends on their order; "
            f"but {'; '.join(lacks)}."
        )


@dataclass(frozen=True, slots=True)
class ResumableShard:
    """What `ray.train.get_dataset_shard` gives to a worker; `RayDataBatches` makes batches of it.

    `dataset` is the whole dataset on rank 0, and `None` elsewhere. `locality_hints` are the node ids of the workers.
    """

    row_id: str
    dataset: Dataset | None
    locality_hints: list[str] | None

    def split(self, trained: RowSet, world_size: int) -> list[DataIterator]:
        """One iterator per worker, together over all rows whose ids are not in `trained`. Called on rank 0 alone."""
        assert self.dataset is not None
        dataset = self.dataset
        if len(trained):
            left_over = functools.partial(without, row_id=self.row_id, trained=trained)
            dataset = dataset.map_batches(left_over, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
        # equal=True, which Ray Train uses, drops up to world_size - 1 rows at the end of each epoch.
        return list(dataset.streaming_split(world_size, equal=False, locality_hints=self.locality_hints))


def without(rows: Any, *, row_id: str, trained: RowSet) -> Any:
    """The rows of a `pyarrow.Table` whose id is not in `trained`."""
    if not rows.num_rows:  # an empty block may have no columns either
        return rows
    return rows.filter(pa.array(~trained.contains(ids_of(rows.column(row_id).to_numpy(), row_id))))


def ids_of(values: NDArray[Any], row_id: str) -> NDArray[np.int64]:
    """The row ids of column `row_id`.

    Raises:
        ValueError: the column holds something other than ids; names it.
    """
    try:
        return as_ids(values)
    except ValueError as error:
        raise ValueError(f"column {row_id!r}: {error}") from None

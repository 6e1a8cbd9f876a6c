"""What a restore reads, and which rank reads it for whom.

Replicas want the same bytes, and one of them reads these for all (`storage/sharing.py`). After a change in the number
of workers, ranks want small pieces that lie interleaved in the files, and one rank reads the pieces of several
(`storage/passing.py`). Everything else each rank reads for itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ray_stateful.candidates import agree
from ray_stateful.filling import Filled
from ray_stateful.ranks import Outcome, Ranks
from ray_stateful.runs import Run
from ray_stateful.states.part import RankPart
from ray_stateful.storage import dealing, passing, sharing
from ray_stateful.storage.dealing import Deal
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.storage.reader import read_requests, requests_of
from ray_stateful.storage.reading import ReadStatistics, Request
from ray_stateful.storage.structure import is_whole


def fill(
    run: Run, opened: OpenCheckpoint, filled: Mapping[str, Filled], limits: ReadLimits | None, ranks: Ranks
) -> dict[str, ReadStatistics]:
    """Fill all tensors of `filled`, and return what this rank asked of storage, by part. Collective.

    Raises:
        Rejected: on every rank; bytes are missing, or not those that were written. Tensors may be filled in part.
        RankFailed: on every rank; some rank could not read, or copy what replicas send, for a reason other than damage.
    """
    limits = limits or ReadLimits()
    requests: dict[str, list[Request]] = {}
    whole: list[Request] = []
    shards: list[Request] = []
    outcome = Outcome()
    # no_grad, as when writing: getting a DTensor's shard through autograd takes several times as long.
    with outcome.catch(), torch.no_grad():
        for part, contents in filled.items():
            requests[part] = []
            for key, tensor in contents.tensors.items():
                wanted = requests_of(opened.chunks[contents.sources[key]], tensor)
                requests[part] += wanted
                # The tensors of a rank part are wanted by this rank alone, or whole by every rank that can use them:
                # they are shared with nobody, as telling these cases apart is not worth it.
                if not isinstance(contents.part, RankPart):
                    (whole if is_whole(tensor) else shards).extend(wanted)
    classes = sharing.classes_of(whole, shards)
    facts = [*sharing.digests(classes), *dealing.weigh((r.chunk, r.box) for r in (*whole, *shards))]
    failures, everyone = ranks.share("plan to read", outcome, facts)
    agree("plan to read", failures)
    shared = sharing.share(classes, [digests for *digests, _, _ in everyone], ranks.rank)
    mine = shared.read_by(ranks.rank)
    own = {part: [request for request in of_part if mine(request)] for part, of_part in requests.items()}
    passes = dealing.pays(opened.manifest, [weight for _, _, *weight in everyone])
    alone: dict[str, list[Request]] = {part: [] for part in own}
    together: dict[str, list[Request]] = {part: [] for part in own}
    for part, group in own.items():
        for request in group:
            is_passed_on = passes and dealing.is_small(request.chunk, request.box)
            (together if is_passed_on else alone)[part].append(request)
    statistics = dict.fromkeys(requests, ReadStatistics())
    memory = torch.empty(0, device="cpu")
    with outcome.catch():
        memory = sharing.memory_for(shared)
        statistics = read_requests(run.storage, opened.path, alone, limits)
    if opened.manifest is not None and passes:
        # All rows of the parts, not just of tensors that this rank has: the deal has to be the same on all ranks.
        restored = (row for rows in opened.chunks.values() for row in rows if row.path[0] in filled and row.dtype)
        deal = Deal.of(opened.manifest.sizes, restored, ranks.world_size)
        more, failures = passing.read(run.storage, opened.path, deal, together, limits, ranks, outcome)
        statistics = {part: statistics[part] + more[part] for part in requests}
    else:
        failures = ranks.failures("read", outcome)
    agree("read", failures)
    # Only now, when all ranks have read all of theirs: what is sent is whole, and everybody is there to receive it.
    sharing.exchange(shared, memory, ranks)
    return statistics

"""What is wrong with a checkpoint: every finding, with the file and the key. No torch for checkpoints of ours.

`restore` stops at the first damage and takes an older checkpoint; the purpose here is to find all of it.
"""

from __future__ import annotations

import posixpath
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint, UnknownFormat
from ray_stateful.format import layout, values
from ray_stateful.format.checksums import RunningChecksum, first_bad_block
from ray_stateful.format.manifest import Manifest, StoredFile
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage import opening
from ray_stateful.storage.base import Storage
from ray_stateful.storage.opening import OpenCheckpoint

# Bytes of one request; a multiple of every block size, so that a part holds whole blocks.
PART_BYTES = 8 << 20
NUM_THREADS = 4

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it was written. `key` is the entry it belongs to, where that is known."""

    file: str
    problem: str
    key: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}" + (f" (in {self.key})" if self.key else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was looked at, and what was found. `num_bytes` were read and compared with their checksums.

    `unverifiable` says why no stronger check is possible: a plain DCP directory has no checksums, so that all there is
    to find out is whether its items can be opened.
    """

    path: str
    full: bool
    findings: tuple[Finding, ...]
    num_files: int
    num_bytes: int
    unverifiable: str | None = None


def verify(storage: Storage, path: str, *, full: bool = False, progress: Progress | None = None) -> Verification:
    """Compare a checkpoint with its manifest: sizes and index; and, if `full`, every byte of every file.

    Args:
        progress: Called with the number of bytes that were checked, from several threads.

    Raises:
        DamagedCheckpoint: there is no checkpoint in the directory at all.
        UnknownFormat: a newer version wrote it; nothing can be said about it.
    """
    sizes = storage.sizes(path)
    if layout.MANIFEST not in sizes:
        return _verify_without_manifest(storage, path, full, sizes)
    try:
        manifest = Manifest.from_json(opening.read_manifest(storage, path), layout.MANIFEST)
    except UnknownFormat as error:
        raise UnknownFormat(path, error.found) from error
    except DamagedCheckpoint as error:
        finding = Finding(file=layout.MANIFEST, problem=error.found)
        return Verification(path=path, full=full, findings=(finding,), num_files=1, num_bytes=0)
    findings = [*_name_findings(path, manifest), *_size_findings(manifest, sizes)]
    absent = {finding.file for finding in findings}
    rows: list[StoredChunk] = []
    if not absent & {layout.MANIFEST, layout.INDEX}:
        try:
            opened = opening.parse(opening.fetch_description(storage, path))
            rows = rows_of(opened)
            findings += _value_findings([*rows, *opened.trees.values()])
        except DamagedCheckpoint as error:
            findings.append(Finding(file=layout.INDEX, problem=error.found))
            # Not read again below: what is wrong with it may be that it is a terabyte of nothing.
            absent.add(layout.INDEX)
    known = {finding.file for finding in findings}
    to_read = {name: file for name, file in manifest.files.items() if full and name not in absent}
    found, num_bytes = _verify_contents(storage, path, to_read, rows, progress)
    return Verification(
        path=path,
        full=full,
        findings=tuple(findings + [one for one in found if one.file not in known]),
        num_files=len(manifest.files) + 1,
        num_bytes=num_bytes,
    )


def rows_of(opened: OpenCheckpoint) -> list[StoredChunk]:
    """Every stored chunk that has bytes in a file."""
    return [chunk for chunks in opened.chunks.values() for chunk in chunks]


def _name_findings(path: str, manifest: Manifest) -> list[Finding]:
    try:
        opening.check_name(path, manifest)
    except DamagedCheckpoint as error:
        return [Finding(file=layout.MANIFEST, problem=error.found)]
    return []


def _size_findings(manifest: Manifest, sizes: Mapping[str, int]) -> list[Finding]:
    findings = []
    for name, file in manifest.files.items():
        if name not in sizes:
            findings.append(Finding(file=name, problem=f"is missing; {file.size:,} bytes were written"))
        elif sizes[name] != file.size:
            findings.append(Finding(file=name, problem=f"has {sizes[name]:,} bytes; {file.size:,} were written"))
    return findings


def _value_findings(rows: list[StoredChunk]) -> list[Finding]:
    """The values that no restore would take, whatever their checksum says."""
    findings = []
    for row in rows:
        if row.value is not None:
            try:
                values.decode(row.value, layout.INDEX)
            except HostileCheckpoint as error:
                findings.append(Finding(file=layout.INDEX, key=row.key, problem=error.found))
            except ModuleNotFoundError:
                # A dtype or a tensor, which can't be made without torch.
                continue
    return findings


def _verify_contents(
    storage: Storage,
    path: str,
    files: Mapping[str, StoredFile],
    rows: list[StoredChunk],
    progress: Progress | None,
) -> tuple[list[Finding], int]:
    by_file: dict[str, list[StoredChunk]] = defaultdict(list)
    for row in rows:
        by_file[row.file].append(row)
    stopped = threading.Event()
    with ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="checkpoint-verify") as pool:
        readers = {
            name: _Reader(storage, posixpath.join(path, name), file.size, progress, stopped)
            for name, file in files.items()
        }
        jobs = {
            name: pool.submit(_verify_file, readers[name], name, file, by_file[name]) for name, file in files.items()
        }
        try:
            findings = [finding for _, job in sorted(jobs.items()) for finding in job.result()]
        except BaseException:
            # Somebody pressed Ctrl-C, or storage is out of reach: the pool would read all that is left before it ends.
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return findings, sum(reader.num_bytes for reader in readers.values())


def _verify_file(reader: _Reader, name: str, file: StoredFile, rows: list[StoredChunk]) -> list[Finding]:
    """One pass over the file: its own checksum, and those of the blocks in it, which tell whose bytes are bad."""
    # Equal values of several keys are stored once: they are checked once, under the first key.
    regions = {(row.data_offset, row.num_bytes): row for row in sorted(rows, key=lambda row: row.key, reverse=True)}
    findings: list[Finding] = []
    try:
        for (start, _), row in sorted(regions.items()):
            if start < reader.offset:
                findings.append(Finding(file=name, key=row.key, problem="its bytes overlap those of another entry"))
                continue
            reader.skip_to(start)
            findings += _bad_blocks(reader, name, row)
        reader.skip_to(file.size)
    except FileNotFoundError:
        return [Finding(file=name, problem="is missing")]
    except EOFError as error:
        return [*findings, Finding(file=name, problem=str(error))]
    if reader.checksum.hexdigest() != file.xxh3 and not findings:
        findings.append(Finding(file=name, problem="its checksum is not the one in the manifest"))
    return findings


def _bad_blocks(reader: _Reader, name: str, row: StoredChunk) -> list[Finding]:
    """The first bad block of the chunk; one finding for each chunk is enough to know what is lost."""
    found: list[Finding] = []
    done = 0
    while done < row.num_bytes:
        data = reader.take(min(PART_BYTES, row.num_bytes - done))
        first = done // row.block_bytes * 8
        expected = row.checksums[first : first + -(-len(data) // row.block_bytes) * 8]
        bad = None if found else first_bad_block(data, row.block_bytes, expected)
        if bad is not None:
            at = row.data_offset + done + bad * row.block_bytes
            found.append(Finding(file=name, key=row.key, problem=f"block at byte {at:,} is not what was written"))
        done += len(data)
    return found


class _Reader:
    """Reads a file from front to back in large requests, however small the pieces that are taken.

    `num_bytes` were read; `offset` is the end of those that were taken. Makes no request once `stopped` is set.
    """

    def __init__(
        self, storage: Storage, where: str, size: int, progress: Progress | None, stopped: threading.Event
    ) -> None:
        self.checksum = RunningChecksum()
        self.offset = self.num_bytes = 0
        self._storage, self._where, self._size, self._progress = storage, where, size, progress
        self._stopped = stopped
        self._data = memoryview(b"")

    def take(self, length: int) -> memoryview:
        """The next `length` bytes, at most `PART_BYTES`."""
        if len(self._data) < length:
            if self._stopped.is_set():
                raise EOFError("was not read to its end")
            begin = self.offset + len(self._data)
            more = self._storage.read(self._where, begin, min(PART_BYTES, self._size - begin))
            self.checksum.update(more)
            self.num_bytes += len(more)
            if self._progress is not None:
                self._progress(len(more))
            self._data = memoryview(bytes(self._data) + more)
            if len(self._data) < length:
                raise EOFError(f"ends after {begin + len(more):,} bytes; {self._size:,} were written")
        taken, self._data = self._data[:length], self._data[length:]
        self.offset += length
        return taken

    def skip_to(self, offset: int) -> None:
        while self.offset < offset:
            self.take(min(PART_BYTES, offset - self.offset))


def _verify_without_manifest(storage: Storage, path: str, full: bool, sizes: Mapping[str, int]) -> Verification:
    if layout.parse_name(posixpath.basename(path.rstrip("/"))) is not None and sizes:
        finding = Finding(file=layout.MANIFEST, problem="is missing: this checkpoint was never committed")
        return Verification(path=path, full=full, findings=(finding,), num_files=len(sizes), num_bytes=0)
    raw = opening.fetch(storage, path)
    try:
        opened = opening.parse(raw)
    except DamagedCheckpoint as error:
        finding = Finding(file=layout.DCP_METADATA, problem=error.found)
        return Verification(path=path, full=full, findings=(finding,), num_files=1, num_bytes=0)
    return Verification(
        path=path,
        full=full,
        findings=tuple(_foreign_findings(storage, path, opened)) if full else (),
        num_files=len(sizes),
        num_bytes=0,
        unverifiable="a plain DCP directory has no checksums: its bytes may differ from those that were written",
    )


def _foreign_findings(storage: Storage, path: str, opened: OpenCheckpoint) -> list[Finding]:
    from ray_stateful.storage import foreign

    findings, lock = [], threading.Lock()

    def check(row: StoredChunk) -> None:
        try:
            foreign.load_item(storage, path, row)
        except DamagedCheckpoint as error:
            with lock:
                findings.append(Finding(file=row.file, key=row.key, problem=error.found))

    with ThreadPoolExecutor(max_workers=NUM_THREADS) as pool:
        list(pool.map(check, rows_of(opened)))
    return sorted(findings, key=lambda finding: (finding.file, finding.key or ""))

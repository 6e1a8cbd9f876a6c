"""`python -m benchmarks [PART ...] [--quick]`: measure, print the ratios, draw them, keep them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import background, checksums, drawing, gpu, limits, planning, restoring, saving
from benchmarks.measuring import Ratio, machine
from benchmarks.peers import Place
from benchmarks.s3_server import ENVIRONMENT, s3_server
from benchmarks.settings import QUICK, Settings

RESULTS = Path(__file__).parent / "results"
PARTS = ("limits", "checksums", "planning", "save", "restore", "background", "gpu")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="small states, some minutes; the ratios are not to be quoted"
    )
    parser.add_argument("--directory", help="where local files are written; a temporary directory by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where latest.json and the pictures go")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    settings = QUICK if arguments.quick else Settings()
    # Before the first rank: ranks are forked from a server that has the environment of its start.
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONWARNINGS"] = "ignore"

    about = machine()
    ratios: list[Ratio] = []
    directory = tempfile.mkdtemp(prefix="benchmarks_", dir=arguments.directory)
    try:
        with s3_server() as server:
            server.make_bucket("bucket")
            local, remote = Place(os.path.join(directory, "run")), Place("bucket/run", server)
            runs = {
                "limits": lambda: limits.run(settings, local, server),
                "checksums": lambda: checksums.run(settings, local),
                "planning": lambda: planning.run(settings),
                "save": lambda: saving.run(settings, local, remote),
                "restore": lambda: restoring.run(settings, local, remote),
                "background": lambda: background.run(settings, local),
                "gpu": lambda: gpu.run(settings, local),
            }
            for part in PARTS:
                if arguments.parts and part not in arguments.parts:
                    continue
                began = time.monotonic()
                print(f"{part}:", flush=True)
                part_rows, part_ratios = runs[part]()
                ratios += part_ratios
                # Part by part: an hour's work is not lost with the last minute of it.
                about["load_after"] = os.getloadavg()[0]
                write(arguments.results, part_ratios, part_rows, about, quick=arguments.quick)
                print(f"  {part} took {time.monotonic() - began:.0f} s", flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)

    print("\nratio: the middle of the repetitions (least .. largest)")
    for ratio in ratios:
        print(ratio)
    print(f"\n{arguments.results / 'latest.json'} has them, and the pictures are beside it")


def write(
    results: Path, ratios: list[Ratio], rows: list[dict[str, Any]], about: dict[str, Any], *, quick: bool
) -> None:
    """Parts that were not run keep what an earlier run of the same kind found."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / "latest.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if old.get("quick") != quick:
        old = {}
    parts = {row["part"] for row in rows}
    kept = [row for row in old.get("rows", []) if row["part"] not in parts]
    values = {**old.get("ratios", {}), **{ratio.name: round(ratio.value, 4) for ratio in ratios}}
    spreads = {**old.get("spread", {}), **{r.name: [round(r.low, 4), round(r.high, 4)] for r in ratios}}
    targets = {**old.get("targets", {}), **{r.name: [r.target, r.at_most] for r in ratios if r.target is not None}}
    content = {
        "quick": quick,
        "ratios": values,
        "spread": spreads,
        "targets": targets,
        "machine": about,
        "rows": [*kept, *rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    drawing.draw(content, results)


if __name__ == "__main__":
    main()

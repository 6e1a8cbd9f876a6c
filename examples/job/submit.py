"""Submit the training of `train_fsdp.py` to a Ray cluster as a job, with this checkout of `ray_stateful`.

    python examples/job/submit.py -- --name bytes --num-workers 2 --storage-path s3://bucket/runs
    python examples/job/submit.py --address http://head:8265 --no-wait -- --name bytes --num-workers 2:8

What stands after `--` is for the training script; `--script` names another one of `examples/`. The machines need no
`ray_stateful` of their own, and one that they have is not used: the package travels with the job, so that the workers
and Ray Train's controller import this one.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

EXAMPLES = Path(__file__).resolve().parents[1]
PACKAGE = EXAMPLES.parent / "ray_stateful"


def runtime_env() -> dict[str, Any]:
    """What the job brings along, to every process that Ray starts for it.

    `working_dir` is the script with the modules beside it. `py_modules` is the package: `ResizeGuard` is unpickled on
    the controller, an actor of its own on some machine, before any line of the script has run there.
    """
    return {"working_dir": str(EXAMPLES), "py_modules": [str(PACKAGE)]}


def submit(client: JobSubmissionClient, script: str, arguments: Sequence[str]) -> str:
    """Submit `script` with `arguments`; the id of the job, under which it can be followed and stopped."""
    return client.submit_job(entrypoint=shlex.join(["python", script, *arguments]), runtime_env=runtime_env())


async def follow(client: JobSubmissionClient, job: str) -> JobStatus:
    """Print the job's log until the job has ended, and how it did."""
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
    return client.get_job_status(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--address",
        default="http://127.0.0.1:8265",
        help="of the job server, which is that of Ray's dashboard (default: %(default)s)",
    )
    parser.add_argument("--script", default="train_fsdp.py", help="one of examples/ (default: %(default)s)")
    parser.add_argument("--no-wait", action="store_true", help="print the job's id, and do not follow its log")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="for the script")
    options = parser.parse_args()
    if not (EXAMPLES / options.script).is_file():
        parser.error(f"--script {options.script} is not in {EXAMPLES}, which is what the job brings along")

    client = JobSubmissionClient(options.address)
    job = submit(client, options.script, options.arguments)
    print(job, flush=True)
    if options.no_wait:
        return
    try:
        status = asyncio.run(follow(client, job))
    except KeyboardInterrupt:
        sys.exit(f"no longer followed, and still running; to stop it: ray job stop --address {options.address} {job}")
    if status != JobStatus.SUCCEEDED:
        sys.exit(f"{job} {status.value.lower()}: {client.get_job_info(job).message}")


if __name__ == "__main__":
    main()

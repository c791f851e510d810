"""Jobs on a Ray cluster: each is a task, which Ray starts again elsewhere when its machine is lost.

The machines share the file system that holds the program, the data, checkpoints and logs. The job therefore goes on
from the last checkpoint, whichever machine wrote it.
"""

import importlib
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cbam_pl.commands.compare.jobs import Job, run_job, threads_per_job
from cbam_pl.errors import UserError


def start_on_ray(jobs: Sequence[Job], address: str) -> dict[Job, Future]:
    """Start all jobs on a cluster; each takes one GPU if the cluster has any, else a core.

    Args:
        jobs: the jobs.
        address: of the cluster; auto finds the one that this machine belongs to.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    try:
        ray: Any = importlib.import_module("ray")  # optional, and slow to import
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install 'cbam_pl[cluster]'") from error
    threads = str(threads_per_job())
    try:
        host, colon, port = address.rpartition(":")
        if colon and "/" not in address:  # where nothing listens, Ray would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        variables = {"PYTHONPATH": str(Path(__file__).parents[3])}
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": variables})
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address}: {error}; start one (ray start --head --port 6379)") from error
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # Endless retries: Ray repeats a task only where its machine or process was lost. A job that fails says so.
    task = ray.remote(num_cpus=int(threads), num_gpus=gpus, max_retries=-1)(run_job)
    return {job: task.remote(job, {"OMP_NUM_THREADS": threads}).future() for job in jobs}

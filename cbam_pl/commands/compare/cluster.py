"""Jobs on a Ray cluster: each is a task, which Ray begins again elsewhere when its machine is lost.

The machines share the file system that holds the program, the data, checkpoints and logs. What a lost machine had
begun is therefore found by whoever takes the job over, and goes on from its last checkpoint.
"""

import socket
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cbam_pl.commands.compare.jobs import Job, run_job, threads_per_job
from cbam_pl.errors import UserError


def start_on_ray(jobs: Sequence[Job], address: str) -> tuple[dict[Job, Future], int]:
    """Hand all jobs to a cluster; each takes one GPU where the cluster has any, else a core.

    Args:
        jobs: the jobs.
        address: of the cluster; auto finds the one that this machine belongs to.

    Returns:
        Each job's future, and how many run at once.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--ray needs Ray: pip install 'cbam_pl[cluster]'; without --ray no cluster is needed"
        ) from error
    _check_address(address)
    package = str(Path(__file__).parents[3])
    try:
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": package}})
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    resources = ray.cluster_resources()
    threads = threads_per_job()
    gpus = int(resources.get("GPU", 0))
    # Endless retries: Ray repeats a task only where its machine or process was lost. A job that fails says so.
    task: Any = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0, max_retries=-1)(run_job)
    environment = {"OMP_NUM_THREADS": str(threads)}
    futures = {job: task.remote(job, environment).future() for job in jobs}
    return futures, max(1, gpus or int(resources.get("CPU", 1)) // threads)


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(f"no Ray cluster at {address}: {error}; start one (ray start --head --port 6379)")


def _check_address(address: str) -> None:
    """Refuse an address where nobody listens; Ray would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address:
        return  # auto, or a scheme of Ray's own
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from error

import csv
import json
import subprocess
import sys
import time

import pytest

from tests.helpers import REPOSITORY

EPOCHS = 60

# In a process of its own, since Ray warns of this and that, which tests take for errors.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
other = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(other, allow_graceful=False)
print("killed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


def test_without_a_cluster_it_says_so(command, recipes, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
    words = ["--configs", recipes["none"], recipes["cbam"], "--output", tmp_path / "report", "--ray", "127.0.0.1:1"]
    outcome = command("compare", *words, "--trainer.default_root_dir", tmp_path)
    assert outcome.status == 2
    assert outcome.err.startswith("error: no Ray cluster at 127.0.0.1:1: ")
    assert outcome.err.count("\n") == 1


def test_without_ray_it_says_how_to_install_it(command, recipes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["--configs", recipes["none"], recipes["cbam"], "--output", tmp_path / "report", "--ray", "auto"]
    outcome = command("compare", *words, "--trainer.default_root_dir", tmp_path)
    assert outcome.status == 2
    assert "--ray needs Ray: pip install ray" in outcome.err


@pytest.mark.slow
def test_the_jobs_of_a_lost_machine_go_on_elsewhere_from_their_last_checkpoint(recipes, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
    words = ["--configs", recipes["none"], recipes["cbam"], "--seeds", "0", "--output", tmp_path / "report"]
    words += ["--trainer.max_epochs", EPOCHS, "--trainer.default_root_dir", tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], stderr=subprocess.DEVNULL, **pipes) as cluster:
        try:
            address = cluster.stdout.readline().strip()
            script = [sys.executable, "train.py", "compare", *map(str, words), "--ray", address]
            with subprocess.Popen(script, cwd=REPOSITORY, stderr=subprocess.PIPE, **pipes) as process:
                begun = [tmp_path / f"checkpoints/{kind}/version_0/last.ckpt" for kind in ("none", "cbam")]
                limit = time.monotonic() + 600
                while not all(path.exists() for path in begun):  # one on each node
                    assert process.poll() is None, process.stderr.read()
                    assert time.monotonic() < limit
                    time.sleep(0.1)
                cluster.stdin.write("kill\n")
                cluster.stdin.flush()
                assert cluster.stdout.readline() == "killed\n"
                _, errors = process.communicate(timeout=800)
                assert process.returncode == 0, errors
        finally:
            cluster.stdin.close()
    resumed = 0
    for kind in ("none", "cbam"):
        (logs,) = (tmp_path / f"logs/{kind}").glob("version_*")  # one run, whoever trained it
        with (logs / "metrics.csv").open() as stream:
            assert [int(row["epoch"]) for row in csv.DictReader(stream)] == list(range(1, EPOCHS + 1))
        (log,) = (tmp_path / f"logs/{kind}").glob("job-*.log")
        resumed += log.read_text().count("checkpoints  ") - 1  # each start of `fit` names them
    assert resumed == 1
    assert len(json.loads((tmp_path / "report/report.json").read_text())["runs"]) == 2

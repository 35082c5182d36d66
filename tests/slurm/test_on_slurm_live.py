"""`emotion-slurm doctor --live` on a real SLURM."""

import json
import signal
import subprocess
import sys

import pytest

from tests.slurm.conftest import ROOT, User
from tests.slurm.private_slurm import wait_for

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


def test_the_doctor_reports_the_real_grace_and_that_requeue_works(user: User) -> None:
    # KillWait is 3 s, so there are more than 2 to save, and fewer than any other time of this site.
    user.cluster_file["save_seconds"] = 2
    found = user("doctor", "--cluster", user.written("cluster.yaml", user.cluster_file), "--live", "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    live = {finding["name"]: finding for finding in json.loads(found.stdout)["live"]}
    assert {name for name, finding in live.items() if finding["state"] != "ok"} == set()
    assert "the same job ran again on node" in live["requeue"]["text"]
    grace = float(live["stop"]["text"].partition("SIGTERM ")[2].split()[0])
    assert 2 <= grace < 5
    assert "SIGUSR2" in live["time limit"]["text"]
    assert "atomic: the node replaced a file" in live["rename"]["text"]
    assert "torch" in live["python"]["text"]
    assert user.cluster.run("squeue", "-h") == ""


def test_a_job_that_the_queue_does_not_start_is_cancelled_also_by_control_c(user: User) -> None:
    user.cluster_file["sbatch"] = ["--begin=now+1hour"]
    cluster_file = user.written("cluster.yaml", user.cluster_file)
    found = user("doctor", "--cluster", cluster_file, "--live", "--wait", "0.02")
    assert found.returncode == 69
    assert "did not start within 0.02 minutes (pending, BeginTime) and is cancelled. Wait longer with --wait" in found.stderr
    assert user.cluster.run("squeue", "-h") == ""

    with subprocess.Popen(
        [sys.executable, "-m", "slurm", "doctor", "--cluster", str(cluster_file), "--live"],
        cwd=ROOT,
        env=user.cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as doctor:
        wait_for("submitted", lambda: user.cluster.run("squeue", "-h"))
        doctor.send_signal(signal.SIGINT)
        output = doctor.communicate()[0]
    assert doctor.returncode == 75
    assert output.endswith("emotion-slurm: stopped\n")
    wait_for("cancelled", lambda: not user.cluster.run("squeue", "-h"))

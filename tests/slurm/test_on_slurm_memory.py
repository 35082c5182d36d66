"""A task that the kernel kills for memory, on a real SLURM whose nodes limit it by control groups."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm.sweep_folder import SweepFolder
from tests.slurm.conftest import User, require_slurm
from tests.slurm.private_slurm import MEMORY_GROUPS, PrivateSlurm, started, wait_for

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

# In place of the job: it needs 500 MiB.
HUNGRY = f"""#!{sys.executable}
import sys
if sys.argv[-1] == "features" or "collect" in sys.argv:
    sys.exit(0)
kept = [b"x" * 2**20 for _ in range(500)]
"""


@pytest.fixture(scope="module")
def limited() -> Iterator[PrivateSlurm]:
    require_slurm()
    if not os.access(MEMORY_GROUPS, os.W_OK):
        pytest.skip(f"{MEMORY_GROUPS}: no memory control groups of version 1 that this process may make")
    with started(nodes=1, limits_memory=True, extra="PartitionName=small Nodes=node1 MaxMemPerNode=300") as cluster:
        yield cluster


def user_of(cluster: PrivateSlurm, home: Path, **values: Any) -> User:
    program = home / "hungry"
    program.write_text(HUNGRY, encoding="utf-8")
    program.chmod(0o755)
    bounded = {"memory_gib": 0.25, "retries": {"memory_gib_at_most": 0.75}}
    return User(cluster, home, {"python": str(program), **bounded, **values})


def memory_of(user: User, folder: SweepFolder) -> list[float | None]:
    """What each attempt that ended asked for its successor."""
    return [event.get("memory_gib") for event in user.events(folder) if event["event"] == "end"]


def test_a_task_killed_for_memory_gets_more_until_it_fits(limited: PrivateSlurm, tmp_path: Path) -> None:
    user = user_of(limited, tmp_path)
    folder = user.submit(user.sweep("hungry"))
    user.wait_for_end(folder, "done")
    user.wait_until_empty()
    # Half as much again each time: 256 and 384 MiB are too few for 500, 576 hold them.
    assert memory_of(user, folder) == [0.375, 0.5625, None]
    assert limited.job_fields(user.job(folder))["MinMemoryNode"] == "576M"
    assert "out of memory with 0.375 GiB: this task is started again with 0.5625 GiB (of 0.75 at most)" in user.log(folder)
    (row,) = [row for row in json.loads(user("status", folder.path, "--json").stdout) if row["kind"] == "task"]
    assert (row["attempts"], row["ended"]) == (3, {"out of memory": 2, "done": 1})


def test_a_task_killed_for_memory_at_the_bound_fails(limited: PrivateSlurm, tmp_path: Path) -> None:
    user = user_of(limited, tmp_path, retries={"memory_gib_at_most": 0.375})
    folder = user.submit(user.sweep("bound"))
    wait_for("it waits with more memory", lambda: "0.375 GiB, as it was out of memory" in user("status", folder.path).stdout)
    assert user.wait_for_end(folder, "failed")["exit_code"] == 70
    assert memory_of(user, folder) == [0.375, None]
    assert "out of memory with 0.375 GiB, and retries.memory_gib_at_most allows no more" in user.log(folder)
    user.wait_until_empty()


def test_a_task_whose_partition_allows_no_more_memory_fails_and_leaves_the_queue(limited: PrivateSlurm, tmp_path: Path) -> None:
    user = user_of(limited, tmp_path, partition="small")
    folder = user.submit(user.sweep("small"))
    end = user.wait_for_end(folder, "failed")
    assert end["exit_code"] == 70
    assert "out of memory with 0.25 GiB, and SLURM refuses 0.375 GiB" in end["text"]
    user.wait_until_empty()
    assert limited.job_fields(user.job(folder))["JobState"] == "CANCELLED"


def test_a_bound_above_every_node_is_refused_as_such_a_task_would_wait_for_ever(limited: PrivateSlurm, tmp_path: Path) -> None:
    user = User(limited, tmp_path, {"retries": {"memory_gib_at_most": 8}})
    found = user("submit", user.sweep("large"), "--cluster", user.written("cluster.yaml", user.cluster_file))
    assert found.returncode == 64
    assert "retries.memory_gib_at_most: 8, but the largest node of partition low has 7.812 (RealMemory)" in found.stderr

"""What the files of control groups say of memory, as kernels and SLURM's nodes wrote them, and what becomes of a killed task."""

from pathlib import Path

import pytest

from emotion.files import read_json_lines
from job.spec.load import load_spec
from slurm.cluster import RetriesConfig
from slurm.memory import GIBIBYTE, kills_for_memory, limit_bytes, may_be_memory, memory_groups, more_gib
from slurm.requeue import retries_used
from slurm.sweep_folder import append_event
from slurm.task import Attempt, NodeJob
from tests.slurm.conftest import LoginNode

# /proc/self/cgroup of a step of SLURM 22.05 with cgroup/v1, on a machine where version 2 is mounted, too, without controllers.
VERSION_1 = """\
9:name=systemd:/
8:pids:/
7:blkio:/
6:freezer:/
4:memory:/slurm_node1/uid_0/job_1/step_0/task_0
3:cpuset:/
0::/
"""
VERSION_2 = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n"
OOM_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"
EVENTS = "low 0\nhigh 0\nmax 2410\noom 3\noom_kill 2\noom_group_kill 0\n"
NO_LIMIT = "9223372036854771712\n"  # version 1


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_kills_and_limit_are_read_from_control_groups_of_version_1(tmp_path: Path) -> None:
    own = written(tmp_path / "cgroup", VERSION_1)
    step = tmp_path / "memory/slurm_node1/uid_0/job_1/step_0"
    written(step / "task_0/memory.oom_control", OOM_CONTROL)
    for folder, limit in ((step / "task_0", NO_LIMIT), (step, "209715200\n"), (step.parent, "209715200\n"), (tmp_path, "1\n")):
        written(folder / "memory.limit_in_bytes", limit)
    groups = memory_groups(own, tmp_path)
    assert groups[0] == step / "task_0"
    assert groups[-1] == tmp_path / "memory"
    assert kills_for_memory(groups) == 1
    assert limit_bytes(groups) == 209715200


def test_kills_and_limit_are_read_from_control_groups_of_version_2(tmp_path: Path) -> None:
    own = written(tmp_path / "cgroup", VERSION_2)
    task = tmp_path / "system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
    written(task / "memory.events", EVENTS)
    written(task / "memory.max", "max\n")
    written(task.parent.parent / "memory.max", "17179869184\n")
    groups = memory_groups(own, tmp_path)
    assert kills_for_memory(groups) == 2
    assert limit_bytes(groups) == 16 * GIBIBYTE


@pytest.mark.parametrize("text", ["", "8:pids:/\n", VERSION_1, VERSION_2])
def test_where_nobody_counts_there_is_no_kill_and_no_limit(tmp_path: Path, text: str) -> None:
    groups = memory_groups(written(tmp_path / "own" / "cgroup", text), tmp_path / "nowhere")
    assert (kills_for_memory(groups), limit_bytes(groups)) == (0, None)


@pytest.mark.parametrize(
    ("now", "at_most", "expected"),
    [
        (16, 64, 24),
        (24, 64, 36),
        (54, 64, 64),
        (64, 64, None),
        (0.25, 0.75, 0.375),
        (1.5, 1.5004, None),
        (1.5, 1.501, 1.5009765625),
    ],
)
def test_memory_grows_by_half_in_whole_mebibytes_up_to_the_bound(now: float, at_most: float, expected: float | None) -> None:
    assert more_gib(now, at_most) == expected


def test_a_job_that_ended_for_another_documented_reason_gets_no_more_memory() -> None:
    assert [code for code in (0, 1, 64, 65, 69, 70, 73, 75, 76, 77, 137) if may_be_memory(code)] == [1, 70, 137]


GIB_16 = """echo "$@" >> {asked}
[ "$1" = requeue ] || [ "$1" = update ] || echo "JobId=7 JobState=RUNNING Restarts=0 EndTime=Unknown MinMemoryNode=16G"
"""
AGAIN, MORE = "requeue incomplete 7", "update JobId=7 MinMemoryNode=24576"


@pytest.mark.parametrize(
    ("retries", "kills", "signals", "asked_before", "outcome", "code", "requests"),
    [
        ({"memory_gib_at_most": 64}, 1, [], [], "out of memory", 137, [AGAIN, MORE]),
        ({"memory_gib_at_most": 16}, 1, [], [], "failed", 70, []),
        # 24 GiB were asked for and did not come: without the errors being counted this would not end.
        ({"memory_gib_at_most": 64}, 1, [], [24], "error", 137, [AGAIN]),
        ({"memory_gib_at_most": 64}, 0, [], [], "error", 137, [AGAIN]),
        ({"memory_gib_at_most": 64}, 1, [15], [], "preempted", 137, [AGAIN]),
        ({}, 1, [], [], "error", 137, [AGAIN]),
    ],
)
def test_what_becomes_of_a_task_that_was_killed(
    login: LoginNode,
    retries: dict[str, float],
    kills: int,
    signals: list[int],
    asked_before: list[float],
    outcome: str,
    code: int,
    requests: list[str],
) -> None:
    asked = login.state / "asked"
    login.program("scontrol", GIB_16.format(asked=asked))
    login.patch.setenv("SLURM_JOB_ID", "7")
    folder = login.folder(login.sweep(0))
    attempt = Attempt(NodeJob(str(folder.path), 1, "task", 0), signals)
    attempt.cluster = folder.cluster.model_copy(update={"retries": RetriesConfig.model_validate(retries)})
    attempt.memory_kills = kills
    for gib in asked_before:
        append_event(attempt.events_path, {"event": "end", "job": "7", "outcome": "out of memory", "memory_gib": gib})
    spec = load_spec(folder.spec_path(0))
    assert attempt.finish(137, spec, retries_used([], 1)) == code
    assert read_json_lines(attempt.events_path)[-1]["outcome"] == outcome
    assert [line for line in asked.read_text(encoding="utf-8").splitlines() if not line.startswith("-o show")] == requests

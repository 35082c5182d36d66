"""Which variables reach SLURM's commands. The commands are scripts that write down their environment."""

import os
from datetime import UTC, datetime

import pytest

from slurm import environment
from slurm.slurm_cli import cancel, read_queue, show_job
from slurm.submit import submit_tasks
from tests.slurm.conftest import SBATCH, SITE, LoginNode

OPTIONS = ("SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_EXPORT", "SBATCH_ACCOUNT", "SALLOC_PARTITION", "SRUN_CPUS_PER_TASK")
OF_A_JOB = ("SLURM_MEM_PER_CPU", "SLURM_NTASKS", "SLURM_GRES", "SLURM_CPU_BIND", "SLURM_ARRAY_JOB_ID", "_SLURM_SPANK_OPTION_x_y")
FORMATS = ("SQUEUE_FORMAT", "SQUEUE_STATES", "SACCT_FORMAT", "SCONTROL_ALL", "SCANCEL_STATE", "SLURM_TIME_FORMAT", "SINFO_FORMAT")
SHELL = ("BASH_ENV", "SHELLOPTS")
KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURMFOO", "MY_SLURM_NOTE", "CUDA_VISIBLE_DEVICES")


def seen_by(login: LoginNode, program: str) -> dict[str, str]:
    """The environment of the last call."""
    lines = (login.state / program).read_text(encoding="utf-8").split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def recording(login: LoginNode, *programs: str, then: str = "") -> None:
    for program in programs:
        login.program(program, f'cat /proc/$$/environ > "$STATE/{program}"\n{then}')


def test_sbatch_and_the_jobs_get_no_options_from_the_environment(login: LoginNode) -> None:
    for name in (*OPTIONS, *OF_A_JOB, *FORMATS, *SHELL, *KEPT):
        login.patch.setenv(name, "7")
    recording(login, "sbatch", then=SBATCH)
    sweep = login.sweep(0, 1)
    submit_tasks(login.folder(sweep), sweep.specs, SITE)
    seen = seen_by(login, "sbatch")
    assert not {*OPTIONS, *OF_A_JOB, *FORMATS, *SHELL} & set(seen)
    assert {name: seen.get(name) for name in KEPT} == dict.fromkeys(KEPT, "7")
    assert "TZ" not in seen
    assert os.environ["SBATCH_TIMELIMIT"] == os.environ["BASH_ENV"] == "7"


def test_the_gpus_of_an_enclosing_job_are_not_those_of_the_jobs_that_it_submits(login: LoginNode) -> None:
    login.patch.setenv("SLURM_JOB_ID", "9")
    login.patch.setenv("CUDA_VISIBLE_DEVICES", "3")
    recording(login, "sbatch", then=SBATCH)
    sweep = login.sweep(0)
    submit_tasks(login.folder(sweep), sweep.specs, SITE)
    assert not {"SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"} & set(seen_by(login, "sbatch"))


def test_no_format_or_filter_of_the_environment_reaches_a_query(login: LoginNode) -> None:
    for name in (*OPTIONS, *OF_A_JOB, *FORMATS, *SHELL, *KEPT):
        login.patch.setenv(name, "7")
    login.patch.setenv("TZ", "Asia/Kathmandu")
    recording(login, "squeue", "scontrol", "scancel")
    read_queue(["11"])
    show_job("11")
    cancel(["11"])
    for program in ("squeue", "scontrol", "scancel"):
        seen = seen_by(login, program)
        assert not {*OPTIONS, *OF_A_JOB, *FORMATS, *SHELL} & set(seen)
        assert (seen["SLURM_CONF"], seen["SLURM_JWT"], seen["TZ"], seen["LC_ALL"]) == ("7", "7", "UTC0", "C")


@pytest.mark.parametrize("second", [0, 3600])
def test_a_time_that_comes_twice_when_winter_time_begins_is_exact(login: LoginNode, second: int) -> None:
    # 02:30 in Berlin, twice an hour apart on 2026-10-25.
    end = datetime(2026, 10, 25, 0, 30, tzinfo=UTC).timestamp() + second
    login.patch.setenv("TZ", "Europe/Berlin")
    login.program("scontrol", f'echo "JobId=11 JobState=RUNNING Restarts=0 EndTime=$(date -d @{end:.0f} +%FT%T)"')
    job = show_job("11")
    assert job is not None
    assert job.end == end


def test_bytes_that_are_no_text_in_an_answer_are_no_fault(login: LoginNode) -> None:
    login.program("squeue", r"printf '11|PENDING|Caf\351|\n'")
    assert read_queue(["11"])["11"].reason == r"Caf\xe9"


def test_the_report_names_what_is_set_and_counts_what_an_enclosing_job_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.removed():
        monkeypatch.delenv(name)
    assert environment.described() == "nothing that would change jobs or answers of SLURM"
    assert environment.unused_options() == []
    monkeypatch.setenv("SLURM_ACCOUNT", "x")
    assert environment.unused_options() == ["SLURM_ACCOUNT"]
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_ACCOUNT", "SQUEUE_FORMAT"):
        monkeypatch.setenv(name, "9")
    found = "not passed on to SLURM: SBATCH_ACCOUNT, SQUEUE_FORMAT, 3 variables of job 9, inside of which this runs"
    assert environment.described() == found
    assert environment.unused_options() == ["SBATCH_ACCOUNT"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SLURM_CLUSTERS", "far", "SLURM_CLUSTERS=far"),
        ("SBATCH_CLUSTERS", "all", "SBATCH_CLUSTERS=all"),
        ("SLURM_CLUSTERS", "lab", None),
        # SLURM sets this inside every job.
        ("SLURM_WORKING_CLUSTER", "lab:127.0.0.1:6817:9728:109", None),
        ("SLURM_WORKING_CLUSTER", "far:127.0.0.1:6817:9728:109", "SLURM_WORKING_CLUSTER=far"),
    ],
)
def test_a_variable_that_names_another_cluster_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str | None
) -> None:
    for other in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS", "SLURM_WORKING_CLUSTER"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert environment.other_cluster("lab") == expected

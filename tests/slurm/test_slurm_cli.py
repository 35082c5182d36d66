"""How answers of SLURM's commands are parsed."""

import pytest

from emotion.errors import StorageError
from slurm.slurm_cli import accounting_states, expand_job_name, largest_node_gib, parse_duration, read_site, show_job
from tests.slurm.conftest import LoginNode


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("5:00", 300),
        ("1:00:00", 3600),
        ("2-00:00:00", 172800),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("UNLIMITED", None),
        ("NONE", None),
    ],
)
def test_durations_of_slurm_are_parsed_to_seconds(text: str, expected: float | None) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("7", ["7"]),
        ("7_2", ["7_2"]),
        ("3_[0-1]", ["3_0", "3_1"]),
        ("3_[4]", ["3_4"]),
        ("3_[0-2,5%4]", ["3_0", "3_1", "3_2", "3_5"]),
    ],
)
def test_job_names_of_sacct_are_expanded_to_job_ids(name: str, jobs: list[str]) -> None:
    assert expand_job_name(name) == jobs


def test_sacct_is_asked_for_whole_arrays_and_not_for_every_task(login: LoginNode) -> None:
    login.program("sacct", 'echo "$@" > "$STATE/asked"; echo "12_0|COMPLETED"; echo "12_[1-9999]|CANCELLED by 0"')
    found = accounting_states([f"12_{index}" for index in range(9000)])
    assert (found["12_0"], found["12_8999"], len(found)) == ("COMPLETED", "CANCELLED", 9000)
    assert "-j 12 -o" in (login.state / "asked").read_text(encoding="utf-8")


# Of SLURM 22.05, shortened.
JOB = "JobId=1 JobName=hungry.sh UserId=root(0) JobState=COMPLETING Reason=None Requeue=1 Restarts=1 TRES=cpu=1,mem=200M,node=1"
NODE = (
    "NodeName=node{} NodeHostName=vm RealMemory={} AllocMem=0 FreeMem=19922 State=IDLE Partitions={} BootTime=2026-11-27T19:01:08"
)


@pytest.mark.parametrize(
    ("field", "gib"),
    [("MinMemoryNode=700M", 700 / 1024), ("MinMemoryNode=24G", 24), ("MinMemoryNode=0", None), ("MinMemoryCPU=1G", None)],
)
def test_the_memory_of_a_job_is_read_in_gib(login: LoginNode, field: str, gib: float | None) -> None:
    login.program("scontrol", f'echo "{JOB} {field}"')
    job = show_job("1")
    assert job is not None
    assert (job.state, job.restarts, job.memory_gib) == ("COMPLETING", 1, gib)


def test_the_largest_node_of_a_partition_counts(login: LoginNode) -> None:
    nodes = [NODE.format(1, 8192, "low,high"), NODE.format(2, 16384, "low"), NODE.format(3, 32768, "high")]
    login.program("scontrol", "\n".join(f'echo "{node}"' for node in nodes))
    assert [largest_node_gib(partition) for partition in ("low", "high", "nix")] == [16, 32, None]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)",
            r"\(Unable to contact slurm controller \(connect failure\)\)",
        ),
        (
            "scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
            "scontrol: error: fetch_config: DNS SRV lookup failed\n"
            "scontrol: error: _establish_config_source: failed to fetch config\n"
            "scontrol: fatal: Could not establish a configuration source",
            r"\(Could not establish a configuration source\)",
        ),
    ],
)
def test_a_controller_that_does_not_answer_is_named_in_one_line(login: LoginNode, said: str, reason: str) -> None:
    login.program("scontrol", f'echo "{said}" >&2; exit 1')
    with pytest.raises(
        StorageError, match=rf"^scontrol: no controller of SLURM answers here {reason}\. Try again later"
    ) as raised:
        read_site()
    assert "\n" not in str(raised.value)

"""The sentences of `doctor --live`, from what a real SLURM showed, and from the same with one thing changed."""

import copy
from typing import Any

import pytest

from slurm.live import Seen
from slurm.live_report import Finding, findings
from slurm.slurm_cli import Site
from tests.slurm.samples import cluster_of

# Recorded on SLURM 22.05 with KillWait=5; the answers of the login node are shortened.
FIRST: dict[str, Any] = {
    "answer": "44",
    "inside": {"exit_code": 0, "gpus": [], "said": "", "seconds": 5.0, "torch": "2.13.0+cpu"},
    "job": "1",
    "memory": {"limit": 1073741824, "total": 25276502016},
    "node": "node1",
    "replacements": {"count": 96, "longest": 0.01278, "median": 0.001065},
    "requeue": {"refusal": None, "seconds": 5.04},
    "seconds": 9.65,
    "signals": [["SIGTERM", 5.06]],
}
SECOND: dict[str, Any] = {
    **FIRST,
    "inside": None,
    "replacements": {"count": 730, "longest": 0.15406, "median": 0.00149},
    "requeue": None,
    "seconds": 73.44,
    "signals": [["SIGUSR2", 39.79], ["SIGTERM", 68.84], ["SIGTERM", 68.91]],
}
SITE = Site({"KillWait": "5 sec"}, {"gpu": {"Default": "YES", "GraceTime": "10"}})


def seen_of(**values: Any) -> Seen:
    """What was recorded, with values of the first attempt (first=…) or of the whole replaced."""
    first = {**copy.deepcopy(FIRST), **values.pop("first", {})}
    whole = {"attempts": [first, SECOND], "answers": [0.2, 0.15], "reads": 1759, "requeued_after": 10.8, "ended": "TIMEOUT"}
    return Seen("1", waited=2.02, **{**whole, **values})


def reported(seen: Seen, **cluster: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings(seen, cluster_of(memory_gib=1, save_seconds=4, **cluster), SITE)}


def test_a_site_on_which_all_works_is_reported_with_what_was_seen() -> None:
    found = reported(seen_of())
    assert {finding.state for finding in found.values()} == {"ok"}
    assert [*found] == [
        *("start", "requeue", "stop", "time limit", "preemption", "rename", "fsync", "visibility", "memory", "docker")
    ]
    assert "the same job ran again on node1, 11 s after the node asked for it" in found["requeue"].text
    assert "SIGTERM 4.6 s before it was killed" in found["stop"].text
    assert "killed 73 s after its start; it got SIGUSR2 33.6 s before, SIGTERM 4.6 s before" in found["time limit"].text
    assert "GraceTime 10 s comes on top" in found["preemption"].text
    assert "replaced a file 826 times, and each of 1759 reads" in found["rename"].text
    assert "within 0.2 s, the slowest of 2 answers" in found["visibility"].text
    assert "limited to 1 GiB by a control group, on a node with 23.54 GiB" in found["memory"].text
    assert "GPUs: none" in found["docker"].text


@pytest.mark.parametrize(
    ("name", "state", "text", "values", "cluster"),
    [
        ("requeue", "wrong", "JobRequeue=1", {"first": {"requeue": {"refusal": "disabled", "seconds": 5.04}}}, {}),
        ("requeue", "warn", "wait longer with --wait", {"attempts": [FIRST], "ended": ""}, {}),
        ("stop", "wrong", "no signal reached the job", {"first": {"signals": []}}, {}),
        # One that came before the requeue is another one's.
        ("stop", "wrong", "no signal reached the job", {"first": {"signals": [["SIGUSR2", 3.0]]}}, {}),
        ("stop", "warn", "Lower save_seconds", {"first": {"seconds": 8.0}}, {}),
        ("time limit", "warn", "the job ended as CANCELLED", {"ended": "CANCELLED"}, {}),
        ("rename", "wrong", "1 of 1759 reads", {"broken": ["JSONDecodeError: Expecting value"]}, {}),
        ("fsync", "warn", "every_seconds", {"first": {"replacements": {"count": 9, "longest": 3.0, "median": 1.5}}}, {}),
        ("rename", "warn", "3 of 1759 reads", {"stale": ["Stale file handle"] * 3}, {}),
        ("visibility", "warn", "a long attribute cache", {"answers": []}, {}),
        ("visibility", "warn", "STOP files are that late", {"answers": [0.2, 30.0]}, {}),
        ("memory", "ok", "limits no job", {"first": {"memory": {"limit": None, "total": 2**36}}}, {}),
        ("memory", "warn", "may have no effect", {"first": {"memory": {"limit": None, "total": 2**36}}},
         {"retries": {"memory_gib_at_most": 8}}),
        ("memory", "wrong", "though memory_gib asks for 1", {"first": {"memory": {"limit": 2**29, "total": 2**36}}}, {}),
        ("docker", "wrong", "though gpus asks for 1", {}, {"gpus": 1}),
        ("docker", "wrong", "has no torch", {"first": {"inside": {"exit_code": 0, "said": "", "seconds": 1, "error": "no"}}}, {}),
        ("docker", "wrong", "said: docker: not found",
         {"first": {"inside": {"exit_code": 127, "said": "docker: not found", "seconds": 1}}}, {}),
        ("docker", "warn", "did not start", {"first": {"inside": {"exit_code": None, "said": "", "seconds": 25}}}, {}),
    ],
)  # fmt: skip
def test_what_does_not_work_is_reported_with_a_remedy(
    name: str, state: str, text: str, values: dict[str, Any], cluster: dict[str, Any]
) -> None:
    found = reported(seen_of(**values), **cluster)
    assert found[name].state == state, found[name]
    assert text in found[name].text


def test_a_job_that_wrote_nothing_is_reported_with_the_end_of_its_log() -> None:
    seen = Seen("1", ended="FAILED", log="srun: starting\npython: No such file or directory\n\n")
    (found,) = findings(seen, cluster_of(), SITE)
    assert (found.state, found.name) == ("wrong", "start")
    assert "its log ends with: python: No such file or directory" in found.text

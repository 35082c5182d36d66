"""Submissions, with a fake sbatch."""

import os
import signal
from pathlib import Path

import pytest

from emotion.errors import Interrupted, StorageError
from emotion.files import read_json
from slurm.submit import Part, dependency_of, make_sweep_folder, parts_of, scripts, submit_tasks
from tests.slurm.conftest import SBATCH, SITE, LoginNode


def test_a_sweep_above_the_array_limit_becomes_arrays_that_run_one_after_another() -> None:
    parts = parts_of([0], range(5), 2)
    assert parts == [
        Part("prepare", (0,)),
        Part("task", (0, 1), after_ok=(0,)),
        Part("task", (2, 3), after_ok=(0,), after_any=(1,)),
        Part("task", (4,), after_ok=(0,), after_any=(2,)),
        Part("collect", (0,), after_any=(1, 2, 3)),
    ]
    ids = ["11", "12", "13", "14"]
    assert [dependency_of(part, ids) for part in parts] == [
        None,
        "afterok:11",
        "afterok:11,afterany:12",
        "afterok:11,afterany:13",
        "afterany:12:13:14",
    ]


def test_jobs_submitted_before_a_failure_are_cancelled_or_named(login: LoginNode) -> None:
    sweep = login.sweep(0, 1)
    folder = login.folder(sweep)
    login.patch.setenv("FAILS_AT", "2")
    with pytest.raises(StorageError, match=r"no such thing.*Nothing of this submission is left"):
        submit_tasks(folder, sweep.specs, SITE)
    assert login.cancelled() == "--quiet 11 12\n"
    assert folder.submissions() == []

    # sbatch accepted a job that could not be recorded.
    (login.state / "count").unlink()
    (folder.path / "submissions").rmdir()
    (folder.path / "submissions").touch()
    with pytest.raises(StorageError, match="submissions"):
        submit_tasks(folder, sweep.specs, SITE)
    assert login.cancelled().splitlines()[1:] == ["--quiet 11"]
    (folder.path / "submissions").unlink()
    (folder.path / "submissions").mkdir()

    login.patch.setenv("CANCEL_CODE", "1")
    (login.state / "count").unlink()
    with pytest.raises(StorageError, match=r"no such thing.*Jobs 11, 12 are left in the queue"):
        submit_tasks(folder, sweep.specs, SITE)
    assert {job.job for job in folder.submissions()[0].jobs} == {"11", "12_0", "12_1"}


def test_jobs_import_no_packages_of_the_current_folder(login: LoginNode) -> None:
    folder = login.folder(login.sweep(0))
    assert " -P -u -m submitit" in scripts(login.sweep(0), folder.cluster, SITE)


def test_a_sweep_file_in_a_folder_whose_name_is_no_text_is_submitted(login: LoginNode) -> None:
    sweep = login.sweep(0)
    cluster = login.folder(sweep).cluster.model_copy(update={"work": str(login.home / "other")})
    odd = Path(os.fsdecode(os.fsencode(login.home) + b"/caf\xe9/sweep.yaml"))
    folder = make_sweep_folder(sweep, odd, cluster)
    assert read_json(folder.path / "sweep.json")["sweep_file"] == f"{login.home}/caf\\xe9/sweep.yaml"
    assert submit_tasks(folder, sweep.specs, SITE).number == 1


def test_after_control_c_the_jobs_that_are_in_the_queue_are_cancelled(login: LoginNode) -> None:
    sweep = login.sweep(0, 1)
    folder = login.folder(sweep)
    login.program("sbatch", SBATCH + r"""[ -e "$STATE/twice" ] && kill -INT $PPID && exit 1; touch "$STATE/twice" """)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(Interrupted, match=r"^submit: stopped\. Nothing of this submission is left in the queue\. "):
            submit_tasks(folder, sweep.specs, SITE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert login.cancelled() == "--quiet 11\n"
    assert not folder.submissions()


def test_an_answer_of_sbatch_that_is_no_text_ends_in_an_error_and_earlier_jobs_are_cancelled(login: LoginNode) -> None:
    sweep = login.sweep(0, 1)
    folder = login.folder(sweep)
    login.program("sbatch", SBATCH + r"""[ -e "$STATE/twice" ] && printf 'voil\340\n'; touch "$STATE/twice" """)
    with pytest.raises(StorageError, match="in the queue"):
        submit_tasks(folder, sweep.specs, SITE)
    assert login.cancelled() == "--quiet 11\n"

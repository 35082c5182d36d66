"""The state of a sweep, read from files and a fake queue."""

from pathlib import Path

from emotion.files import write_json
from slurm.status import as_json, as_table, statuses
from slurm.submit import submit_tasks
from slurm.sweep_folder import append_event
from tests.slurm.conftest import SITE, LoginNode


def test_a_task_whose_published_result_is_gone_is_lost(login: LoginNode) -> None:
    sweep = login.sweep(0)
    folder = login.folder(sweep)
    submission = submit_tasks(folder, sweep.specs, SITE)
    job = next(job.job for job in submission.jobs if job.kind == "task")
    append_event(folder.attempts_path("task", 0), {"event": "end", "outcome": "done", "job": job, "submission": 1})

    def state() -> str:
        return next(status.state for status in statuses(folder) if status.kind == "task")

    assert state() == "lost"
    manifest = Path(folder.tasks[0].published) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert state() == "done"


def test_status_shows_the_progress_that_the_job_has_written(login: LoginNode) -> None:
    sweep = login.sweep(0)
    folder = login.folder(sweep)
    submission = submit_tasks(folder, sweep.specs, SITE)
    job = next(job.job for job in submission.jobs if job.kind == "task")
    login.queue(job)
    run = folder.run_folder(0)
    (run / "gan-1").mkdir(parents=True)

    def columns() -> list[str]:
        (line,) = (line for line in as_table(folder, statuses(folder)).splitlines() if line.startswith("0 "))
        return line.split()[2:-5]

    assert columns() == ["running"]
    write_json(run / "progress.json", {"phase": "gan", "state": "running", "folder": "gan-1", "time": 10})
    assert columns() == ["running", "gan"]
    steps = {"step": 160, "steps": 360, "steps_per_second": 16.0, "time": 12}
    write_json(run / "gan-1" / "progress.json", steps)
    assert columns() == ["running", "gan", "160/360", "16", "12", "s"]
    (record,) = (record for record in as_json(statuses(folder)) if record["kind"] == "task")
    assert record["progress"] == {**steps, "phase": "gan", "state": "running"}
    assert record["seconds_to_go"] == 12
    write_json(run / "gan-1" / "progress.json", {**steps, "steps": 1302, "steps_per_second": 0.174})
    assert columns()[4:] == ["1", "h", "49", "min"]
    # The first report of a training has no rate yet.
    write_json(run / "gan-1" / "progress.json", {**steps, "steps_per_second": None})
    assert columns() == ["running", "gan", "160/360"]
    (record,) = (record for record in as_json(statuses(folder)) if record["kind"] == "task")
    assert (record["progress"]["steps_per_second"], record["seconds_to_go"]) == (None, None)


def test_a_job_that_was_cancelled_while_it_waited_does_not_wait_any_more(login: LoginNode) -> None:
    sweep = login.sweep(0)
    folder = login.folder(sweep)
    job = submit_tasks(folder, sweep.specs, SITE).jobs[-1]
    (login.state / "queue").write_text(f"{job.job}|CANCELLED|Dependency|\n", encoding="utf-8")
    status = statuses(folder)[-1]
    assert (status.job, status.state, status.details) == (job.job, "cancelled", "")


def test_a_preempted_task_that_is_not_started_again_is_preempted_and_not_lost(login: LoginNode) -> None:
    sweep = login.sweep(0)
    folder = login.folder(sweep)
    submission = submit_tasks(folder, sweep.specs, SITE)
    job = next(job.job for job in submission.jobs if job.kind == "task")

    def task() -> tuple[str, str]:
        return next((status.state, status.details) for status in statuses(folder) if status.kind == "task")

    # Killed before it could write down its end, and forgotten by the controller.
    (login.state / "queue").write_text(f"{job}|PREEMPTED|None|node1\n", encoding="utf-8")
    assert task()[0] == "preempted"
    assert "this site does not requeue: use emotion-slurm resubmit" in task()[1]
    login.queue()
    assert task()[0] == "lost"
    # SLURM refused.
    path = folder.attempts_path("task", 0)
    append_event(path, {"event": "end", "outcome": "preempted", "job": job, "submission": 1})
    append_event(path, {"event": "refused", "text": "this site does not requeue", "job": job, "submission": 1})
    assert task() == ("preempted", "this site does not requeue")
    # Started again by a person.
    login.queue(job)
    assert task()[0] == "running"

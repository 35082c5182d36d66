"""resubmit, on a login node with fake SLURM commands."""

import pytest

from emotion.errors import SpecError, StorageError
from slurm.operations import resubmit
from slurm.submit import submit_tasks
from slurm.sweep_folder import SweepFolder
from tests.slurm.conftest import SITE, LoginNode


def test_resubmit_prepares_features_in_the_run_of_a_resubmitted_task_and_not_of_a_running_one(login: LoginNode) -> None:
    sweep = login.sweep(0, 1, 2)
    folder = login.folder(sweep)
    first = submit_tasks(folder, sweep.specs, SITE)
    assert [(job.kind, job.index, job.job) for job in first.jobs] == [
        *(("prepare", 0, "11"), ("task", 0, "12_0"), ("task", 1, "12_1"), ("task", 2, "12_2"), ("collect", 0, "13"))
    ]
    login.queue("12_0")
    second, live = resubmit(folder, SITE, None)
    assert live == [0]
    assert second is not None
    assert [(job.kind, job.index) for job in second.jobs] == [*(("prepare", 1), ("task", 1), ("task", 2), ("collect", 0))]


def test_a_new_cluster_file_is_refused_while_jobs_run_and_recorded_only_if_sbatch_accepts_it(login: LoginNode) -> None:
    sweep = login.sweep(0, 1)
    folder = login.folder(sweep)
    submit_tasks(folder, sweep.specs, SITE)
    other = folder.cluster.model_copy(update={"cpus": 7})
    login.queue("12_0")
    with pytest.raises(SpecError, match="jobs of this sweep are in the queue"):
        resubmit(folder, SITE, other)
    assert SweepFolder(folder.path).cluster.cpus == 4
    login.queue()
    login.patch.setenv("FAILS_AT", "4")
    with pytest.raises(StorageError, match="no such thing"):
        resubmit(SweepFolder(folder.path), SITE, other)
    assert SweepFolder(folder.path).cluster.cpus == 4
    login.patch.setenv("FAILS_AT", "never")
    resubmit(SweepFolder(folder.path), SITE, other)
    assert SweepFolder(folder.path).cluster.cpus == 7

"""The walkthrough of a researcher with a SLURM account is followed on a real SLURM, with two folds of the tiny job as demo."""

from pathlib import Path

import pytest

from tests.slurm.conftest import require_slurm
from tests.slurm.private_slurm import started
from tests.walkthroughs import demo_in, follow


@pytest.mark.full
def test_a_researcher_with_a_slurm_account(tmp_path: Path) -> None:
    require_slurm()
    with started() as cluster:
        follow(
            "A researcher with a SLURM account",
            tmp_path / "home",
            {
                "runtime: bare": "runtime: bare\nwork_is_shared: true",  # its nodes are on this machine
                **{"4 tasks": "2 tasks", ": 4 ": ": 2 ", "4 of 4 folds": "2 of 2 folds", "these 4": "these 2", "job 7": "job 5"},
            },
            **cluster.environment,
            PLACE=str(tmp_path),
            PARTITION="low",
            GPUS="0",
            SPEC=demo_in(tmp_path, folds=2),
            DATA="generated:24",
        )

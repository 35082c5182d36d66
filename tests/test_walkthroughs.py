"""The walkthroughs are followed word by word, with the tiny job as the demo; that of SLURM beside its other tests."""

from pathlib import Path

import pytest

from tests.conftest import TinyRun
from tests.stores.servers import S3Server
from tests.walkthroughs import demo_in, follow

pytestmark = pytest.mark.full


def test_an_engineer_with_a_spot_budget(moto: S3Server, tmp_path: Path) -> None:
    follow(
        "An engineer with a spot budget",
        tmp_path / "home",
        BUCKET=moto.new_bucket(),
        DISK=str(tmp_path / "disk"),
        SPOT="null",
        PRICE="0.53",
        SPEC=demo_in(tmp_path),
        DATA="generated:24",
        **moto.environment(),
    )


def test_somebody_who_only_wants_a_prediction(tiny_run: TinyRun, tmp_path: Path) -> None:
    follow(
        "Somebody who only wants a prediction",
        tmp_path / "home",
        MODEL=str(tiny_run.published),
        MUSIC=str(tiny_run.phase("stage")),
    )

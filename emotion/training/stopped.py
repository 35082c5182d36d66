"""Record of trainings that the time budget ended early: a file in the outputs of a phase, passed on to later phases."""

from dataclasses import asdict, dataclass
from pathlib import Path

from emotion.files import read_json, write_json

STOPPED = "stopped_by_budget.json"  # absent where every training came to its end


@dataclass(frozen=True)
class Stop:
    """The training ended after `step` of at most `steps` steps; both are of all trainings of its phase."""

    step: int
    steps: int

    def advice(self) -> str:
        return (
            f"stopped by budget.minutes after step {self.step} of at most {self.steps}: the model is what there was by then. For "
            f"a longer training, raise budget.minutes, which makes it another run."
        )


def write_stops(folder: Path, stops: dict[str, Stop]) -> None:
    """stops: phase → where its training ended. Nothing is written where there are none."""
    if stops:
        write_json(folder / STOPPED, {phase: asdict(stop) for phase, stop in stops.items()})


def read_stops(folder: Path) -> dict[str, Stop]:
    path = folder / STOPPED
    return {phase: Stop(**stop) for phase, stop in read_json(path).items()} if path.exists() else {}

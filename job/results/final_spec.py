"""From a complete set of folds: their predictions and results, and the spec of the final model, trained on all songs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emotion.data.out_of_fold import MEMBERS, OUT_OF_FOLD, FoldRun, OutOfFold, SongPredictions, write_out_of_fold
from emotion.data.song_ids import in_order
from emotion.errors import SpecError
from emotion.files import digest_of, write_text
from job.results.published_runs import PublishedRun, by_seeds
from job.spec.load import spec_of
from job.spec.location import parse_path
from job.spec.model import JobSpec, to_yaml

FINAL = "final.yaml"


def write_final(group: Sequence[PublishedRun], over_seeds: dict[str, Any], out: Path, *, is_only: bool) -> dict[str, Any] | None:
    """Write `out_of_fold.json` and `final.yaml` into `out`, with a key in their names unless the setting is the only one with
    complete folds.

    group: the runs of one setting; over_seeds: predictor → dimension → metric → mean and SD. The epochs come from all complete
    sets, seed and predictions from the first. Returns the names of the files and the epoch to stop at; None without a complete
    set of this version.
    """
    sets, complete = by_seeds(group), complete_sets(group)
    if not complete:
        return None
    found = _out_of_fold(complete, over_seeds if len(complete) == len(sets) > 1 else {})
    mark = "" if is_only else f"-{digest_of(found.setting)[:8]}"
    names = [name.replace(".", f"{mark}.") for name in (FINAL, OUT_OF_FOLD)]
    try:
        parse_path(str(out.absolute()))
    except ValueError as error:
        raise SpecError(f"collect: --out: {error}") from None
    try:
        spec = _final_spec(complete[0][0], out.absolute() / names[1])
    except SpecError:  # the run is of another version, with other keys
        return None
    write_out_of_fold(out / names[1], found)
    write_text(out / names[0], to_yaml(spec))
    return {"spec": names[0], "out_of_fold": names[1], "stop_epoch": found.stop_epoch, "runs": len(found.runs)}


def complete_sets(group: Sequence[PublishedRun]) -> list[list[PublishedRun]]:
    """The runs of each pair of seed and split.seed with which each fold of `kfold` has been run once, by this version."""
    return [runs for runs in by_seeds(group).values() if _is_complete(runs)]


def _is_complete(runs: Sequence[PublishedRun]) -> bool:
    # Runs of earlier versions have no stack.
    are_of_this_version = all(run.training and {*MEMBERS} <= {*run.predicted} for run in runs)
    return are_of_this_version and runs[0].folds is not None and [run.fold for run in runs] == [*range(runs[0].folds)]


def _out_of_fold(sets: Sequence[Sequence[PublishedRun]], over_seeds: dict[str, Any]) -> OutOfFold:
    runs = [run for one in sets for run in one]
    common = set.intersection(*({*run.manifest.inputs.items()} for run in runs))
    songs = {song: (run, labels) for run in sets[0] for song, labels in run.actual.items()}
    return OutOfFold(
        setting=runs[0].setting,
        inputs={name: digest for name, digest in sorted(common) if not name.startswith(("data.source/", "split."))},
        files=frozenset(digest for name, digest in common if name.startswith("data.source/")),
        runs=[
            FoldRun(
                run=run.manifest.name,
                seed=run.seed,
                split_seed=run.split_seed,
                fold=run.fold,
                predictions_sha256=run.manifest.artifacts["predictions.csv"].sha256,
                training=run.training or {},
            )
            for run in runs
        ],
        songs=[
            SongPredictions(song, run.fold, labels, {name: pairs[song] for name, pairs in run.predicted.items()})
            for song, (run, labels) in ((song, songs[song]) for song in in_order(songs))
        ],
        over_seeds=over_seeds,
    )


def _final_spec(run: PublishedRun, out_of_fold: Path) -> JobSpec:
    """The spec of a run of one fold, changed to train on all songs. Device, storage and destination stay."""
    spec = run.manifest.spec
    split = {**spec["split"], "protocol": "all", "fold": 0, "out_of_fold": str(out_of_fold)}
    return spec_of({**spec, "name": f"{run.name[:34].rstrip('-')}-final", "split": split})

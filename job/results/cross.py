"""`evaluate`: a published run on the songs of another dataset."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from emotion.audio.extract import extract_features
from emotion.audio.feature_store import Features
from emotion.audio.song_workers import Workers
from emotion.config import DataConfig, DeviceConfig, EvaluateConfig
from emotion.data.faults import Fault, may_leave_out, read_faults
from emotion.data.leaks import SEEN
from emotion.data.songs import Dataset, Song, read_songs
from emotion.data.songs_table import scale_question
from emotion.errors import DataError, Interrupted, SpecError, counted, first_of, printable
from emotion.evaluation.cross import model_of, scores_on
from emotion.evaluation.evaluate import TrainedModel
from emotion.evaluation.metrics import DIMENSIONS
from emotion.files import make_folder
from emotion.training.device import resolve_device
from emotion.vit.embedder import read_embedder
from emotion.vit.predict import SongPredictor
from job.config import StorageConfig
from job.entry import stop_signals_held
from job.environment import available_threads
from job.results.manifest import LIMITS, MANIFEST, song_limits, verified_manifest
from job.results.sounds import fetched_model
from job.results.tables import METRICS, aligned, shown_name, with_interval
from job.spec.location import parse_source
from job.storage.local_folder import LocalFolder
from job.storage.stage import stage, staged_scale

SEEN_SONGS = (f"model/{SEEN}", f"stack/{SEEN}")


def evaluate_run(
    run: str, source: str, scale: tuple[float, float] | None, temporary: Path, should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Scores on all songs of `source` that the run has not seen. Songs with faults are left out and listed. Returns JSON.

    run, source: a folder or s3://…; source may also be generated:N. scale: of the ratings in a songs.csv. temporary: an empty
    folder for the songs' features and for fetched files. Needs a prepared environment. Raises DataError for too many faults, if
    no song or too few songs are left, and whatever staging and reading a run raise.
    """
    try:
        located = str(parse_source(source))
    except ValueError as error:
        raise SpecError(f"--data: {error}") from None
    folder = fetched_model(run, temporary, should_stop, also=SEEN_SONGS)
    manifest = verified_manifest(folder)
    listed = [name for name in SEEN_SONGS if manifest and name in manifest.artifacts]
    root = folder if (folder / MANIFEST).exists() else folder.absolute().parent
    if manifest and (problem := manifest.problem(LocalFolder(root), listed)):
        raise DataError(f"evaluate: {root}: {problem}. Copy the run again.")
    limits = song_limits(manifest).model_dump(include={*LIMITS})
    try:
        data = DataConfig.model_validate({**limits, "source": located, "scale": scale, "faults": "drop"})
    except ValidationError as error:
        raise SpecError(f"--scale: {error.errors()[0]['msg']}") from None
    predict = SongPredictor(folder, resolve_device(DeviceConfig(), "fp32"))
    model, stack = model_of(folder)
    embed = read_embedder(model, predict.device) if stack.is_dir() else None
    staged, features = temporary / "staged", temporary / "features"
    make_folder(staged)
    try:
        digests, _ = stage(data, StorageConfig(), temporary / "manifests", staged, should_stop)
        songs, known_faults = read_songs(staged / "songs.csv"), read_faults(staged / "faults.csv")
        _refuse_many_faults(known_faults, songs, data)
        faults = extract_features(
            Dataset(staged, songs, known_faults, digests, staged_scale(staged)),
            data,
            predict.preprocessing.mel,
            out=features,
            faults_table=None,
            workers=Workers(available_threads(), stop_signals_held),
            should_stop=should_stop,
        )
    except SpecError as error:
        # The scale is an option of this command, not a key of a spec.
        text = re.sub(r"data\.scale=\[(\S+), (\S+)\]", r"--scale \1 \2", str(error))
        raise SpecError(text.replace("data.scale", "--scale")) from error
    except DataError as error:
        raise DataError(str(error).replace("data.source", "--data")) from error
    _refuse_many_faults(faults, songs, data)

    def check_stop() -> None:
        if should_stop():
            raise Interrupted("evaluate: stopped; the same command starts again")

    if not (model / SEEN).is_file():
        raise DataError(
            f"evaluate: {model} has no {SEEN}, so songs that it has seen cannot be identified. Name the published run."
        )
    spec = manifest.spec if manifest else {}
    found = scores_on(
        Features(features),
        TrainedModel(model, stack, predict, predict.curve, embed=embed, threads=predict.device.threads),
        bootstrap_samples=spec.get("evaluate", {}).get("bootstrap_samples", EvaluateConfig().bootstrap_samples),
        seed=spec.get("seed", 0),
        check_stop=check_stop,
    )
    left_out = [str(fault).replace("(data.scale)", "(--scale)") for fault in faults]
    return {"run": manifest.name if manifest else printable(run), "data": printable(source), "left_out": left_out, **found}


def _refuse_many_faults(faults: Sequence[Fault], songs: Sequence[Song], data: DataConfig) -> None:
    """Raise DataError if more songs have faults than a run leaves out by default: the rest would be a biased selection."""
    unusable = {fault.song_id for fault in faults} - {None}
    count = len({song.song_id for song in songs} | unusable)
    allowed = may_leave_out(count, data)
    if len(unusable) <= allowed:
        return
    advice = (scale_question(faults, data.scale) if data.scale is not None else None) or "Correct them."
    raise DataError(
        f"evaluate: {len(unusable)} of {counted(count, 'song')} of {printable(data.source)} cannot be used, and at most "
        f"{allowed} may be left out; the first: {faults[0]}. {advice}".replace("(data.scale)", "(--scale)")
    )


def as_text(found: dict[str, Any]) -> str:
    """The scores as a table, preceded by the songs that were left out."""
    measured = counted(found["songs"], "song")
    lines = [f"{found['run']} on {measured} of {found['data']}; {found['scale']}"]
    for what, songs in (("songs that the run has seen", found["seen_by_the_run"]), ("faults", found["left_out"])):
        if songs:
            lines.append(f"left out: {len(songs)} {what}: {first_of(songs)}")
    shown = METRICS[:3]
    rows = [["predictor", *(f"{dimension} {metric}" for dimension in DIMENSIONS for metric in shown)]]
    own = {name: found[name] for name in ("stack", "model") if name in found}
    for name, table in {**own, **found["baselines"]}.items():
        rows.append(
            [shown_name(name), *(with_interval(table[dimension], metric) for dimension in DIMENSIONS for metric in shown)]
        )
    return "\n".join([*lines, "", *aligned(rows)])

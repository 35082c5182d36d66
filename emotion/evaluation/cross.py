"""Scores of a published run on another set of songs: its ViT, its stack, and the baselines that lie in the stack."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from emotion.audio.feature_store import Features
from emotion.data.label_scale import scale_text
from emotion.data.leaks import identities, read_seen
from emotion.errors import DataError
from emotion.evaluation.evaluate import INTERVALS, TrainedModel
from emotion.evaluation.metrics import scores
from emotion.evaluation.stack import read_stack, stack_vectors


def scores_on(
    songs: Features, model: TrainedModel, *, bootstrap_samples: int, seed: int, check_stop: Callable[[], None]
) -> dict[str, Any]:
    """JSON: `metrics.json`'s stack, model and baselines over these songs, and which were left out as the run has seen them.

    model.stack: a folder that may be missing, as in a run of an earlier version; then the ViT alone is scored. A song is known by
    the digests of its file and its sound, whatever its name. check_stop: called before each forward pass and song; its exceptions
    pass through. Raises DataError where the run has seen all songs.
    """
    has_stack = model.stack.is_dir()
    seen = read_seen(model.folder) | (read_seen(model.stack) if has_stack else set())
    is_known = [bool(identities([song]) & seen) for song in songs.songs]
    known = [song.song_id for song, is_one in zip(songs.songs, is_known, strict=True) if is_one]
    if len(known) == len(songs.songs):
        raise DataError(f"evaluate: the run has seen all of these {len(known)} songs in its training. Name other songs.")
    songs = songs.only([index for index, is_one in enumerate(is_known) if not is_one])
    predicted = model.predict([songs.stored(index) for index in range(len(songs.songs))], check_stop).astype(np.float64)
    members = {"model": predicted}
    if has_stack:
        vectors, stack = stack_vectors(songs, model.embed, threads=model.threads, check_stop=check_stop), read_stack(model.stack)
        members |= {"stack": stack.predict(vectors, predicted), **stack.baselines(vectors)}
    actual = songs.labels.astype(np.float64)
    groups = [song.group for song in songs.songs]
    scored = {
        name: scores(values, actual, groups=groups, bootstrap_samples=bootstrap_samples, seed=seed)
        for name, values in members.items()
    }
    own: dict[str, Any] = {name: scored.pop(name) for name in ("stack", "model") if name in scored}
    return {
        "scale": f"{scale_text(songs.scale)}; {INTERVALS}",
        "songs": len(songs.songs),
        "seen_by_the_run": known,
        **own,
        "baselines": scored,
    }


def model_of(run: Path) -> tuple[Path, Path]:
    """The folders of ViT and stack of a published run, or of its `model/`, which has no stack."""
    return (run / "model" if (run / "model").is_dir() else run), run / "stack"

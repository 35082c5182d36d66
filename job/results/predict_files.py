"""The command `predict`: loads the model once, then writes one row after the other."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from emotion.errors import DataError, EmotionError, Interrupted, SpecError, StorageError, printable
from job.environment import available_threads, prepare_environment
from job.results.curves import CurveFiles, check_curve_names
from job.results.manifest import song_limits, verified_manifest
from job.results.predictions import Form, header_of, notes_on, row_of
from job.results.sounds import Sounds, fetched_model, refusals_of

Say = Callable[[object, TextIO | None], None]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # by which Excel knows that a CSV is UTF-8


def form_of(*, as_json: bool, as_csv: bool, bom: bool) -> Form:
    """The output format that the options select; without an option, a table for people on a terminal, else tab-separated rows.
    Raises SpecError for options that exclude each other."""
    if as_json and as_csv:
        raise SpecError("--json and --csv exclude each other. Name one.")
    if bom and not as_csv:
        raise SpecError("--bom is for --csv only. Name both, or none.")
    if as_json:
        return "jsonl"
    if as_csv:
        return "csv-bom" if bom else "csv"
    return "table" if _is_for_people() else "tsv"


def _is_for_people() -> bool:
    """Whether standard output is a terminal. sys.stdout is None if it was closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def predict_files(
    model: str,
    audio: Sequence[str],
    *,
    plain: bool,
    form: Form,
    curves: Sequence[Path],
    say: Say,
    should_stop: Callable[[], bool],
) -> None:
    """Predict and print every sound. say: writes a line of text, or bytes unchanged, to a stream (None: standard output). The
    errors of all sounds without a prediction are raised at the end, as one. Raises Interrupted."""
    check_curve_names(curves)
    with tempfile.TemporaryDirectory() as name:
        sounds = Sounds(audio, Path(name), should_stop)
        raise_as_one([*refusals_of(model), *sounds.refusals])
        folder = fetched_model(model, Path(name), should_stop)
        manifest = verified_manifest(folder)
        prepare_environment(available_threads())
        # Imported only now: they need a prepared environment.
        from emotion.config import DeviceConfig
        from emotion.progress_bar import ProgressBar
        from emotion.training.device import resolve_device
        from emotion.vit.curve import window_seconds
        from emotion.vit.predict import AudioPredictor, Prediction

        predictor = AudioPredictor(folder, resolve_device(DeviceConfig(), "fp32"), song_limits(manifest), plain=plain)
        for note in notes_on(predictor, curves, form):
            say(f"emotion-job: note: {note}", sys.stderr)
        files = CurveFiles(curves, window_seconds(predictor.predict.preprocessing)) if curves else None
        header = header_of(form)
        if header is not None:
            say(_encoded(header, form, BYTE_ORDER_MARK if form == "csv-bom" else b""), None)

        def check_stop() -> None:
            if should_stop():
                raise Interrupted(f"predict: stopped after {done - 1} of {sounds.count} files; the same command starts again")

        def predicted(file: str, path: Path) -> Prediction | EmotionError:
            try:
                return predictor(path, with_curve=files is not None, check_stop=check_stop)
            except (DataError, StorageError) as error:
                return type(error)(str(error).replace(str(path), printable(file)))

        warned: list[str] = []
        failed: list[EmotionError] = []
        # On a terminal the rows themselves show the progress.
        with contextlib.nullcontext() if _is_for_people() else ProgressBar("predict", sounds.count) as bar:
            for done, (file, path) in enumerate(sounds, 1):
                check_stop()
                found = path if isinstance(path, EmotionError) else predicted(file, path)
                if isinstance(found, EmotionError):
                    failed.append(found)
                else:
                    if files is not None and found.curve is not None:
                        files.add(file, found.curve)
                    say(_encoded(row_of(file, found, form), form), None)
                    if found.warnings:
                        warned.append(f"{printable(file)}: {'; '.join(found.warnings.values())}")
                if bar is not None and bar.advance_to(done) and done < sounds.count:
                    say(f"emotion-job: predict: {done} of {sounds.count} files", sys.stderr)
        if files is not None:
            files.draw()
    for line in warned:
        say(f"emotion-job: warning: {line}", sys.stderr)
    raise_as_one(failed)


def raise_as_one(errors: Sequence[EmotionError]) -> None:
    """Raise one error with a line for each of `errors`, if there are any. Its type is that of the first permanent one, for which
    a retry does not help, else of the first."""
    if errors:
        kind = next((type(error) for error in errors if not error.retry_helps), type(errors[0]))
        raise kind("\n".join(map(str, errors)))


def _encoded(row: str, form: Form, before: bytes = b"") -> str | bytes:
    """The row to print. CSV is bytes, as it is UTF-8 in every locale; before: its byte order mark."""
    return before + f"{row}\n".encode() if form.startswith("csv") else row

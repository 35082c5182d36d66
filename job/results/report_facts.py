"""Facts for a run's report that are not in the published files: attempts, provenance, genres and excerpts of songs."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from emotion.audio.decoding import decode_blocks
from emotion.data.genres import read_genres
from emotion.data.song_ids import SongId
from emotion.data.songs import read_songs
from emotion.errors import DataError, StorageError, counted
from emotion.files import digest_of
from emotion.report.run_report import Facts
from job.results.manifest import Manifest
from job.secrets import scrubbed_json
from job.spec.location import Generated
from job.spec.model import JobSpec

EXCERPT_SECONDS = 8
EXCERPT_ENDS = 23  # second of a song; excerpts begin at second 15, as DEAM's curves do
EXCERPT_RATE_HZ = 22050
EXCERPT_COMPRESSION = 0.8  # of libsndfile's range 0..1; about 40 kbit/s
NUMERIC = ("torch", "timm", "numpy", "scipy", "scikit-learn")  # the libraries that matter most
DIGITS = 12  # shown digits of a digest


def report_facts(manifest: Manifest, spec: JobSpec, staged: Path) -> Facts:
    """The facts of a run. manifest: that of the run, without artifacts. staged: folder of the phase stage; if it is empty by now,
    there are neither genres nor excerpts. Excerpts are only of generated songs, unless `artifacts.excerpts` is set."""
    found = scrubbed_json(manifest.model_dump(mode="json"))
    may_be_heard = spec.artifacts.excerpts or isinstance(spec.source, Generated)
    return Facts(
        phases=[*found["phases"]],
        attempts=found["attempts"],
        provenance=_provenance(found),
        genres=read_genres(staged),
        excerpt=lambda song: excerpt_of(staged, song) if may_be_heard else None,
    )


def excerpt_of(staged: Path, song: SongId) -> bytes | None:
    """The EXCERPT_SECONDS of a song before second EXCERPT_ENDS, as MP3 of a low bit rate; None if it can no longer be read."""
    kept: list[Any] = []
    with contextlib.suppress(DataError, StorageError, OSError, StopIteration):
        audio = next(found.audio for found in read_songs(staged / "songs.csv") if found.song_id == song)
        for block in decode_blocks(staged / audio, EXCERPT_RATE_HZ):
            kept.append(block)
            if sum(map(len, kept)) >= EXCERPT_ENDS * EXCERPT_RATE_HZ:
                break
        sound = np.concatenate(kept)[: EXCERPT_ENDS * EXCERPT_RATE_HZ][-EXCERPT_SECONDS * EXCERPT_RATE_HZ :]
        content = io.BytesIO()
        sound = sound / max(1.0, float(np.abs(sound).max(initial=0)))
        soundfile.write(content, sound, EXCERPT_RATE_HZ, format="MP3", compression_level=EXCERPT_COMPRESSION)
        return content.getvalue()
    return None


def _provenance(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of a manifest, in the order of a reader's questions."""
    code, spec, platform = manifest["code"], manifest["spec"], manifest["platform"]
    changed = "" if code["uncommitted_sha256"] is None else ", with changes that are not committed"
    revision = f"revision {code['revision'][:DIGITS]}{changed}" if code["revision"] else "no revision"
    versions = [f"{name} {manifest['libraries'][name]}" for name in NUMERIC if manifest["libraries"].get(name)]
    inputs = counted(len(manifest["inputs"]), "file")
    facts = [
        ("run", manifest["name"]),
        ("data", f"{spec['data']['source']}, {inputs}, digest {digest_of(manifest['inputs'])[:DIGITS]}"),
        ("seeds", ", ".join(f"{name} {value}" for name, value in manifest["seeds"].items())),
        ("code", f"emotion-job {code['version']}, {revision}, sources {code['source_sha256'][:DIGITS]}"),
        ("libraries", ", ".join([f"Python {manifest['python']}", *versions])),
        *((f"device of {phase}", _device(manifest["phases"][phase]["measured"].get("device"))) for phase in ("gan", "vit")),
        ("processor", f"{platform.get('cpu_model')}, {platform.get('system')} {platform.get('kernel')}, {platform.get('libc')}"),
    ]
    if platform.get("nvidia_driver"):
        facts.append(("NVIDIA driver", platform["nvidia_driver"]))
    if manifest["container"]:
        facts.append(("container", ", ".join(str(value) for value in manifest["container"].values() if value)))
    return facts


def _device(found: dict[str, Any] | None) -> str:
    """cpu, precision bf16, threads 2, deterministic True, …"""
    if found is None:
        return "none"
    first = [str(found[name]) for name in ("kind", "name") if found.get(name)]
    rest = [f"{name} {value}".replace("True", "yes").replace("False", "no") for name, value in found.items()]
    return ", ".join(first + [text for text in rest if not text.startswith(("kind ", "name "))])

"""Compares predicted and measured memory of training steps on this CPU, each case in a process of its own.

    python tests/bench/memory.py

Each case runs two steps with a checkpoint after each, on clips of 128 mels x 3 s at 22,050 Hz, with random weights and otherwise
the defaults of a spec. Tensors: the memory of all live tensors at the peak of a step. Process: the highest resident memory from
before the training to its end. Needs 6 GiB of memory, 4 GB of disk temporarily, and a few minutes. Goals: tensors within 10 %,
process within 25 %.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# For importing other tests when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.rows import record

CASES = [
    (model, batch)
    for model, batches in (
        ("gan", (2, 8, 32)),
        ("vit_tiny_patch16_224", (4, 16, 64)),
        ("vit_small_patch16_224", (4, 8, 32)),
        ("vit_base_patch16_224", (2, 4, 16)),
    )
    for batch in batches
]
SECONDS = 3.0
MIB = 2**20


def measured(model: str, batch: int) -> dict[str, Any]:
    """The memory account of a training in a new process, with `peak_process_bytes`."""
    command = [sys.executable, __file__, model, str(batch)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    account: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return account


def train(model: str, batch: int, folder: Path) -> dict[str, Any]:
    from job.environment import available_threads, prepare_environment

    prepare_environment(available_threads())
    import numpy as np

    from emotion.audio.feature_store import Features, FeatureWriter
    from emotion.config import CheckpointConfig, DeviceConfig, GanConfig, MelConfig, VitConfig
    from emotion.data.leaks import write_seen
    from emotion.data.songs import SongLabels
    from emotion.training.context import TrainingContext
    from emotion.training.device import resolve_device
    from job.pipeline.peak_memory import peak_memory, reset_peak_memory
    from tests.emotion.trainings import partition, run_gan, run_vit

    mel = MelConfig()
    frames = mel.frames(SECONDS)

    def features(name: str, songs: int, digests: bool) -> Features:
        (folder / name).mkdir()
        rng = np.random.default_rng(0)
        with FeatureWriter(folder / name, mel) as writer:
            for song in range(songs):
                valence, arousal = rng.uniform(-1, 1, 2)
                log_mel = (-30 + 5 * rng.standard_normal((frames, mel.mels))).astype(np.float32)
                known = {"file_sha256": f"file {song}", "sound_sha256": f"sound {song}"} if digests else {}
                writer.append(SongLabels(song, valence, arousal, 0.3, 0.3, f"artist {song}"), log_mel, **known)
        return Features(folder / name)

    real, synthetic = features("real", 6, True), features("synthetic", 4, False)
    write_seen(synthetic.folder, {"file 0"})
    songs = partition(real.only(range(4)), real.only([4, 5]))
    device = resolve_device(DeviceConfig(kind="cpu"), "auto")
    out = folder / "out"
    out.mkdir()
    context = TrainingContext(0, device, CheckpointConfig(every_seconds=0), out, lambda: False)
    reset_peak_memory()
    if model == "gan":
        config = GanConfig(epochs=2 * batch / 4, batch_size=batch, clip_seconds=SECONDS, penalty_every_steps=1)
        account = run_gan(songs, config, context)
    else:
        real_batch = batch - round(0.25 * batch)
        vit = VitConfig(
            model=model, weights="random", epochs=2 * real_batch / 4, batch_size=batch, clip_seconds=SECONDS, patience_epochs=9
        )
        account = run_vit(songs, synthetic, vit, context)
    return {**account, **peak_memory(), "precision": device.precision}


def main() -> None:
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(train(sys.argv[1], int(sys.argv[2]), Path(folder))))
        return
    print("| network | precision | clips | tensors, predicted | measured | process, predicted | measured |")
    print("|---|---|---|---|---|---|---|")
    for model, batch in CASES:
        account = measured(model, batch)
        pairs = [
            (account["predicted"]["peak"], account["measured"]["peak"]),
            (account["predicted"]["process"], account["peak_process_bytes"]),
        ]
        cells = [f"{p / MIB:,.0f} MiB | {m / MIB:,.0f} MiB ({100 * (p / m - 1):+.1f} %)" for p, m in pairs]
        print(f"| {model} | {account['precision']} | {batch} | {' | '.join(cells)} |", flush=True)
        for (predicted, found), name, off in zip(pairs, ("tensors", "process"), (0.1, 0.25), strict=True):
            what = f"memory of {name}, {model}, batch {batch}, predicted / measured"
            record(what, predicted / found, least=1 - off, most=1 + off)


if __name__ == "__main__":
    main()

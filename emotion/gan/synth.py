"""The phase synth: labelled log-mels from the generator, stored like those of real songs, and a few audio samples."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from emotion.audio.clips import Normalisation, in_db
from emotion.audio.decoding import Array
from emotion.audio.feature_store import FeatureWriter, widened
from emotion.audio.griffin_lim import synthesize_sound, write_wav
from emotion.audio.partition import Partition
from emotion.config import MelConfig, SynthConfig
from emotion.data.leaks import identities, read_seen, refuse_leak, write_seen
from emotion.data.songs import SongLabels
from emotion.errors import Interrupted
from emotion.evaluation.plots import save_spectrogram
from emotion.files import make_folder, read_json, sha256_of
from emotion.gan.density import draw_labels
from emotion.gan.label_reader import LabelReader
from emotion.gan.networks import Generator
from emotion.threads import in_threads, started_ahead
from emotion.training.context import TrainingContext
from emotion.training.device import Device, Fetched
from emotion.training.progress import Progress
from emotion.training.seeding import generator as random_generator
from emotion.training.stopped import read_stops, write_stops

Half = npt.NDArray[np.float16]

BATCH = 16
MOST_SOUNDS_AT_ONCE = 8  # of 80 MB each for clips of 30 s


class Synthesizer:
    """A trained generator with its normalisation: labels → clips in dB. folder: as `train_gan` writes it."""

    def __init__(self, folder: Path, device: Device) -> None:
        config = read_json(folder / "config.json")
        self.mel = MelConfig.model_validate(config["mel"])
        self.frames: int = config["frames"]
        normalisation = Normalisation.from_json(config["normalisation"])
        self._mean_db, self._sd_db = (device.send(torch.from_numpy(db)) for db in (normalisation.mean_db, normalisation.sd_db))
        self.device = device
        self.network = Generator(self.mel.mels, config["latent"], config["width"])
        self.network.load_state_dict(load_file(folder / "generator.safetensors"))
        self.network.to(device.device).eval()

    def __call__(self, labels: Array, seed: int, stream: str, first: int) -> Array:
        """labels [batch, 2] → clips [batch, frames, mels] in dB.

        Clip i of the batch has number first + i in its stream; its noise depends on that number, not on the batch.
        """
        return self._clips(labels, seed, stream, first).cpu().numpy()

    def start(self, labels: Array, seed: int, stream: str, first: int) -> Fetched:
        """Start computing the same clips without waiting for a GPU. As float16, the storage format, which halves the copy."""
        return self.device.fetch(self._clips(labels, seed, stream, first).half().contiguous())

    @torch.no_grad()
    def _clips(self, labels: Array, seed: int, stream: str, first: int) -> Tensor:
        shape = (self.network.latent, 1 + Generator.columns(self.frames))
        numbers = range(first, first + len(labels))
        noise = [random_generator(seed, stream, number).standard_normal(shape, np.float32) for number in numbers]
        inputs = [self.device.send(torch.from_numpy(array)) for array in (labels, np.stack(noise))]
        with self.device.autocast():
            clips = self.network(*inputs, self.frames)
        return in_db(clips, self._mean_db, self._sd_db)


def synthesize(partition: Partition, *, gan: Path, config: SynthConfig, context: TrainingContext) -> None:
    """Write `config.songs` clips as a features folder, with labels from the density of the training labels, and `samples/`.

    With `config.candidates` or `config.read_share` a regressor selects clips and corrects labels (`label_reader`), not for the
    samples. gan: a folder as `train_gan` writes it. A second call resumes after the last durable clip (see FeatureWriter). Raises
    ModelError if the GAN has seen a validation or test song, Interrupted when asked to stop.
    """
    training, seed, out = partition.training, context.seed, context.out
    seen = read_seen(gan) | identities(training.songs)
    refuse_leak("what makes synthetic clips", seen, partition.held_out)
    synthesizer = Synthesizer(gan, context.device)
    random = random_generator(seed, "synth", "labels")
    labels = draw_labels(training.labels, config.songs, config.label_spread, random).astype(np.float32)
    digests = [sha256_of(gan / name) for name in ("config.json", "generator.safetensors")]
    made_from = {"generator": digests, "labels": labels.tolist(), "seed": seed}
    if config.needs_reader:
        made_from |= {"candidates": config.candidates, "read_share": config.read_share}
    with FeatureWriter(out, synthesizer.mel, made_from) as writer, Progress(out, "synth", writer.done, config.songs) as progress:
        done = writer.done

        def check_stop() -> None:
            if context.should_stop():
                raise Interrupted(f"synth: stopped after {writer.done} of {config.songs} clips")

        reader = None
        if config.needs_reader and done < config.songs:
            threads = context.device.threads
            reader = LabelReader(partition, synthesizer.frames, seed=seed, threads=threads, check_stop=check_stop)
        streams = ["synth", *(f"synth candidate {number}" for number in range(1, config.candidates))]

        def start(first: int) -> list[Fetched]:
            return [synthesizer.start(labels[first : first + BATCH], seed, stream, first) for stream in streams]

        # All clips of an interrupted batch are generated again: the last bits of a clip depend on the others of its batch.
        batches = range(done - done % BATCH if done < config.songs else done, config.songs, BATCH)
        # A GPU computes the next batch while this one is written.
        for first, candidates in zip(batches, started_ahead(start, batches, most=2), strict=True):
            check_stop()
            clips, their_labels = candidates[0].wait().numpy(), labels[first : first + BATCH]
            if reader is not None:
                clips = np.stack([clips, *(other.wait().numpy() for other in candidates[1:])])
                clips, their_labels = chosen(reader, clips, their_labels, config.read_share)
            for number, log_mel in enumerate(clips, first):
                if number < done:
                    continue
                valence, arousal = their_labels[number - first].tolist()
                writer.append(SongLabels(number, valence, arousal, 0.0, 0.0, f"synthetic:{number}"), log_mel)
            progress.advance(min(first + BATCH, config.songs))
    write_seen(out, seen)
    write_stops(out, read_stops(gan))
    write_samples(synthesizer, config, context)


def chosen(reader: LabelReader, clips: Half, asked: Array, read_share: float) -> tuple[Half, Array]:
    """Select a candidate for each requested label and correct the label.

    clips: [candidates, batch, frames, mels]; asked: [batch, 2]. Returns the clips [batch, frames, mels] whose predicted label is
    nearest to the requested one, and labels [batch, 2]: (1 - read_share) requested + read_share predicted, clipped to [-1, 1].
    """
    read = reader.read(widened(clips))
    each = reader.nearest(read, asked), np.arange(len(asked))
    labels = (1 - read_share) * asked + read_share * read[each]
    return clips[each], labels.clip(-1, 1).astype(np.float32)


def write_samples(synthesizer: Synthesizer, config: SynthConfig, context: TrainingContext) -> None:
    """Write a wav and a png per point of `config.samples` to `samples/`. The sounds are computed in threads."""
    out, seed = context.out / "samples", context.seed
    make_folder(out)
    points = np.array(config.samples, np.float32).reshape(-1, 2)
    written = 0
    is_over = threading.Event()

    def check_stop() -> None:
        if context.should_stop():
            is_over.set()
            raise Interrupted(f"synth: stopped after {written} of {len(points)} samples")

    def check_over() -> None:
        if is_over.is_set():
            raise Interrupted("synth: stopped")

    def path(number: int, ending: str) -> Path:
        valence, arousal = points[number].tolist()
        return out / f"{number:02d}_valence{valence:+.2f}_arousal{arousal:+.2f}.{ending}"

    def log_mels() -> Iterator[Array]:
        made = []
        for number in range(len(points)):
            check_stop()
            made.append(synthesizer(points[number : number + 1], seed, "samples", number)[0])
            yield made[-1]
        # The pictures are drawn while the last sounds are computed.
        for number, log_mel in enumerate(made):
            check_stop()
            valence, arousal = points[number].tolist()
            title = f"valence {valence:+.2f}, arousal {arousal:+.2f}"
            save_spectrogram(path(number, "png"), log_mel, synthesizer.mel, title)

    def sound_of(log_mel: Array) -> Array:
        phases = random_generator(seed, "griffin-lim")
        return synthesize_sound(log_mel, synthesizer.mel, config.griffin_lim_iterations, phases, check_over)

    threads = min(context.device.threads, MOST_SOUNDS_AT_ONCE)
    for sound in in_threads(sound_of, log_mels(), threads, check_stop):
        write_wav(path(written, "wav"), sound, synthesizer.mel.sample_rate_hz)
        written += 1

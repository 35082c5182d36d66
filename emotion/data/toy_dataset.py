"""A small generated dataset in DEAM's layout, with songs composed from their labels.

Arousal controls tempo, loudness, brightness and drums; valence controls mode, register, dissonance, timing and articulation,
in the directions that listeners perceive (mostly: Eerola, Friberg and Bresin 2013, Frontiers in Psychology 4:487). Controls
are noisy and a label is the mean of a few simulated raters: labels can be learned from the sound, but not perfectly.
"""

import io
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from emotion.errors import Interrupted
from emotion.files import make_folder, write_bytes, write_text
from emotion.progress_bar import ProgressBar

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]

SAMPLE_RATE_HZ = 22050
EXCERPT_SECONDS = 10.0
SECTION_SECONDS = 5.0  # a full song is verse, chorus, verse, chorus

AUDIO_FOLDER = Path("DEAM_audio/MEMD_audio")
LABEL_FOLDER = Path("DEAM_Annotations/annotations/annotations averaged per song/song_level")
METADATA_FOLDER = Path("metadata")

# Purposes of random numbers: there is one generator per (seed, purpose, song or artist).
MOOD, RATERS, SOUND, ARTIST = range(4)

# Moods vary less and correlate more than labels: with the raters' noise below, the labels have DEAM's mean (valence, arousal),
# standard deviations (1.17, 1.28) and correlation (.57).
MEAN = np.array([4.90, 4.81])
MOOD_DEVIATION = np.array([1.08, 1.20])
MOOD_CORRELATION = 0.67
ARTIST_SHARE = 0.5  # of the variance of moods: songs of one artist are alike
RATER_DEVIATION = 1.5
CHORUS = np.array([0.4, 0.7])  # a chorus is this far above its song's mood, a verse this far below

# Standard deviations of noise, in units of the moods' own: noise that all controls of a song share, then that of each. Ridge
# regression on pooled log-mels of 96 to 200 songs has a CCC of 0.3 to 0.6 for valence and 0.6 to 0.7 for arousal.
SONG_NOISE = np.array([0.8, 0.5])
VALENCE_NOISE = np.array([0.4, 1.3, 1.0, 0.8])  # mode, register, dissonance, timing and articulation
AROUSAL_NOISE = np.array([0.8, 0.7, 0.7, 0.7, 0.8])  # tempo, loudness, brightness, drums, articulation

CEILING = 0.7  # of the amplitude; after MP3 coding, peaks are up to a quarter higher

ARTIST_SIZES = (3, 1, 5, 2, 4)  # number of songs of each artist in turn, repeated
FULL_SONG_EVERY = 24
FIRST_FULL_SONG = 11

MODES = (  # semitones above the root, dark to bright
    (0, 1, 3, 5, 7, 8, 10),  # Phrygian
    (0, 2, 3, 5, 7, 8, 10),  # Aeolian
    (0, 2, 3, 5, 7, 9, 10),  # Dorian
    (0, 2, 4, 5, 7, 9, 10),  # Mixolydian
    (0, 2, 4, 5, 7, 9, 11),  # Ionian
)
PROGRESSIONS = ((0, 3, 4, 0), (0, 5, 3, 4), (0, 4, 5, 3), (0, 3, 0, 4))  # degrees of the scale, a chord for two beats
PARTIALS = 10
TABLE_SAMPLES = 2048
SINES = np.sin(2 * np.pi * np.outer(np.arange(1, PARTIALS + 1), np.arange(TABLE_SAMPLES) / TABLE_SAMPLES))


@dataclass(frozen=True)
class PlannedSong:
    song_id: int
    artist: int
    full: bool


@dataclass(frozen=True)
class Timbre:
    """What the songs of an artist share."""

    key: int  # semitones above A
    partials: Array  # [partials] factors of the amplitudes
    rolloff: float  # added to Controls.rolloff
    attack_seconds: float
    hiss: float  # amplitude
    gain_db: float


@dataclass(frozen=True)
class Controls:
    """How a section is played, given its mood."""

    beat_seconds: float
    gain: float
    rolloff: float  # amplitude of partial k is 1 / k ** rolloff
    drums: float  # chance of a drum on a half beat
    mode: int  # index into MODES
    register: int  # MIDI note of the melody's root
    dissonance: float  # chance of a semitone against a chord
    jitter_seconds: float  # standard deviation of the onsets from the beat
    held: float  # sounding share of a note's time


@dataclass(frozen=True)
class Arrangement:
    """What the sections of a song share. progression: degrees of the scale. drums: kick, snare, hat."""

    timbre: Timbre
    progression: Sequence[int]
    drums: tuple[Array, Array, Array]


def generate_dataset(root: Path, songs: int, seed: int, should_stop: Callable[[], bool]) -> None:
    """Write `songs` generated songs below `root`: mono MP3 files, then both label tables and the metadata of three years.

    Excerpts have ids 2 to 2000 with gaps and last 10 s; every 24th song is a full one of 20 s with an id from 2001. Labels are
    on 1..9. A song depends only on the seed and its position: a smaller dataset is the beginning of a larger one. Existing
    songs are kept, so the same call resumes; another seed needs another folder.
    Raises Interrupted if `should_stop`, called before each song, returns True. songs: at most 1200, as the ids of excerpts end
    at 2000; the spec limits them to 1000.
    """
    for folder in (AUDIO_FOLDER, LABEL_FOLDER, METADATA_FOLDER):
        make_folder(root / folder)
    planned = _plan(songs)
    with ProgressBar("stage generated songs", songs) as bar:
        for number, song in enumerate(planned, 1):
            if should_stop():
                raise Interrupted(f"stage: stopped before song {song.song_id} was generated")
            path = root / AUDIO_FOLDER / f"{song.song_id}.mp3"
            if not path.exists():
                write_bytes(path, _mp3(_compose(seed, song)))
            if bar.advance_to(number):
                log.info("phase=stage songs=%d/%d", number, songs)
    _write_labels(root / LABEL_FOLDER, seed, planned)
    _write_metadata(root / METADATA_FOLDER, planned)


def _plan(songs: int) -> list[PlannedSong]:
    """The first `songs` songs. The ids of excerpts alternate between those of 2013 (from 2) and of 2014 (from 1001)."""
    planned = []
    excerpts = 0
    artists = (artist for artist in itertools.count() for _ in range(ARTIST_SIZES[artist % len(ARTIST_SIZES)]))
    for position in range(songs):
        if position % FULL_SONG_EVERY == FIRST_FULL_SONG:
            planned.append(PlannedSong(2001 + position // FULL_SONG_EVERY, next(artists), full=True))
            continue
        turn, later = divmod(excerpts, 2)
        first = 1001 if later else 2
        planned.append(PlannedSong(first + turn + 2 * turn // 3, next(artists), full=False))
        excerpts += 1
    return planned


def _moods(seed: int, song: PlannedSong) -> Array:
    """[sections, 2]: intended valence and arousal on 1..9; an excerpt has one section."""
    artist = np.random.default_rng([seed, MOOD, song.artist, 0]).normal(size=2)
    own = np.random.default_rng([seed, MOOD, song.artist, song.song_id]).normal(size=2)
    valence, other = np.sqrt(ARTIST_SHARE) * artist + np.sqrt(1 - ARTIST_SHARE) * own
    arousal = MOOD_CORRELATION * valence + np.sqrt(1 - MOOD_CORRELATION**2) * other
    mood = MEAN + MOOD_DEVIATION * np.array([valence, arousal])
    sections = [mood - CHORUS, mood + CHORUS] * 2 if song.full else [mood]
    return np.asarray(np.clip(sections, 1.6, 8.4))


def _ratings(seed: int, song: PlannedSong) -> Array:
    """[raters, sections, 2]: whole numbers on 1..9; ten raters for an excerpt and five for a full song, as in DEAM."""
    rng = np.random.default_rng([seed, RATERS, song.song_id])
    raters = 5 if song.full else 10
    opinion = rng.normal(scale=RATER_DEVIATION, size=(raters, 1, 2))
    return np.asarray(np.clip(np.rint(_moods(seed, song) + opinion), 1, 9))


def _mp3(sound: Array) -> bytes:
    # Rounded first, so that processors that differ in the last bit of a sine give the same file.
    samples = np.rint(sound * 32767).astype(np.int16)
    content = io.BytesIO()
    soundfile.write(content, samples, SAMPLE_RATE_HZ, format="MP3", compression_level=0.8)
    return content.getvalue()


def _compose(seed: int, song: PlannedSong) -> Array:
    """[samples] mono, with peaks below CEILING. Not normalised, since loudness carries arousal."""
    rng = np.random.default_rng([seed, SOUND, song.song_id])
    moods = _moods(seed, song)
    seconds = SECTION_SECONDS if song.full else EXCERPT_SECONDS
    sound = np.zeros(round(len(moods) * seconds * SAMPLE_RATE_HZ))
    timbre, drums = _timbre(seed, song.artist), _drum_kit(rng)
    arrangement = Arrangement(timbre, PROGRESSIONS[rng.integers(len(PROGRESSIONS))], drums)
    noise = rng.normal(size=11)
    for section, mood in enumerate(moods):
        _play(sound, section * seconds, (section + 1) * seconds, _controls(mood, timbre, noise), arrangement, rng)
    sound += timbre.hiss * rng.normal(size=len(sound))
    fade = np.linspace(0, 1, round(0.05 * SAMPLE_RATE_HZ))
    sound[: len(fade)] *= fade
    sound[-len(fade) :] *= fade[::-1]
    return np.asarray(CEILING * np.tanh(sound / CEILING))


def _timbre(seed: int, artist: int) -> Timbre:
    rng = np.random.default_rng([seed, ARTIST, artist])
    return Timbre(
        key=int(rng.integers(-5, 7)),
        partials=np.exp(0.8 * rng.normal(size=PARTIALS)),
        rolloff=0.3 * rng.normal(),
        attack_seconds=rng.uniform(0.004, 0.03),
        hiss=10 ** rng.uniform(-4, -3),
        gain_db=2.5 * rng.normal(),
    )


def _controls(mood: Array, timbre: Timbre, noise: Array) -> Controls:
    """noise: [11] standard normal, the same for all sections of a song."""
    expressed = (mood - MEAN) / MOOD_DEVIATION + SONG_NOISE * noise[:2]
    valence = expressed[0] + VALENCE_NOISE * noise[2:6]
    arousal = expressed[1] + AROUSAL_NOISE * noise[6:11]
    return Controls(
        beat_seconds=60 / float(np.clip(100 * 2 ** (0.3 * arousal[0]), 55, 190)),
        gain=0.08 * 10 ** ((3.5 * arousal[1] + timbre.gain_db) / 20),
        rolloff=float(np.clip(1.6 - 0.3 * arousal[2] + timbre.rolloff, 0.5, 3)),
        drums=float(1 / (1 + np.exp(0.3 - 1.2 * arousal[3]))),
        mode=int(np.clip(np.rint(2 + 1.1 * valence[0]), 0, len(MODES) - 1)),
        register=69 + timbre.key + int(np.rint(4 * valence[1])),
        dissonance=float(np.clip(0.3 - 0.25 * valence[2], 0, 0.9)),
        jitter_seconds=float(np.clip(0.015 - 0.015 * valence[3], 0, 0.05)),
        held=float(np.clip(0.75 - 0.15 * valence[3] - 0.1 * arousal[4], 0.3, 1.2)),
    )


def _play(
    sound: Array, start_seconds: float, end_seconds: float, controls: Controls, arrangement: Arrangement, rng: np.random.Generator
) -> None:
    """Add one section to `sound`: chords and bass every two beats, melody and drums on beats and half beats."""
    timbre, progression = arrangement.timbre, arrangement.progression
    amplitudes = timbre.partials / np.arange(1, PARTIALS + 1) ** controls.rolloff
    amplitudes /= np.sqrt(np.sum(amplitudes**2))  # so that a brighter timbre is not louder
    kick, snare, hat = arrangement.drums
    degree = 0

    def add(wave: Array, seconds: float, level: float) -> None:
        first = max(round(seconds * SAMPLE_RATE_HZ), 0)
        room = max(len(sound) - first, 0)
        sound[first : first + len(wave)] += controls.gain * level * wave[:room]

    def note(pitch: int, seconds: float, length: float, level: float) -> None:
        add(_note(pitch, length, amplitudes, timbre.attack_seconds), seconds, level)

    halves = int(np.ceil(2 * (end_seconds - start_seconds) / controls.beat_seconds))
    for half in range(halves):
        on_time = start_seconds + half * controls.beat_seconds / 2
        seconds = on_time + controls.jitter_seconds * rng.normal()
        chord = progression[half // 4 % len(progression)]
        if half % 4 == 0:
            length = 2 * controls.beat_seconds * controls.held
            for above in (0, 2, 4):
                note(_pitch(controls, chord + above) - 12, seconds, length, 0.45)
            if rng.random() < controls.dissonance:
                note(_pitch(controls, chord) - 11, seconds, length, 0.45)
            note(_pitch(controls, chord) - 24, seconds, length, 0.9)
        if half % 2 == 0 or rng.random() < controls.drums:
            degree = int(np.clip(degree + rng.integers(-2, 3), -3, 7))
            if half % 4 == 0:
                degree = chord
            note(_pitch(controls, degree), seconds, controls.beat_seconds * controls.held, 0.8)
        if rng.random() < controls.drums:
            add(hat, seconds, 0.5)
        if half % 2 == 0 and rng.random() < controls.drums:
            add(snare if half % 4 == 2 else kick, seconds, 1.0)


def _pitch(controls: Controls, degree: int) -> int:
    """MIDI note of a degree of the scale, counted from the root of the melody; any integer."""
    octave, step = divmod(degree, 7)
    return controls.register + 12 * octave + MODES[controls.mode][step]


def _note(pitch: int, seconds: float, amplitudes: Array, attack_seconds: float) -> Array:
    """[samples] a decaying tone of harmonic partials below 10 kHz, with a soft end."""
    frequency_hz = 440 * 2 ** ((pitch - 69) / 12)
    partials = min(int(10_000 / frequency_hz), PARTIALS)
    # The period is summed once and then read at the note's frequency: cheaper than a sine per partial and sample.
    period = np.sum(amplitudes[:partials, None] * SINES[:partials], axis=0)
    time = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    wave = period[(frequency_hz * TABLE_SAMPLES * time).astype(np.int64) % TABLE_SAMPLES]
    envelope = np.minimum(time / attack_seconds, 1) * np.exp(-2 * time) * np.minimum((seconds - time) / 0.03, 1)
    return np.asarray(wave * np.maximum(envelope, 0))


def _drum_kit(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Kick, snare and hat: a falling tone, a burst of noise, and a shorter burst of high-passed noise."""
    time = np.arange(round(0.2 * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    noise = rng.normal(size=len(time) + 1)
    kick = np.sin(2 * np.pi * (50 * time - 3 * np.exp(-30 * time))) * np.exp(-15 * time)
    snare = 0.4 * noise[1:] * np.exp(-25 * time)
    hat = 0.25 * np.diff(noise) * np.exp(-60 * time)
    return kick, snare, hat


def _write_labels(folder: Path, seed: int, songs: Sequence[PlannedSong]) -> None:
    """Write both label tables in DEAM's spellings: a blank after each comma of the header, one name with a blank inside."""
    excerpts = ["song_id, valence_mean, valence_std, arousal_mean, arousal_std"]
    full = [
        "song_id, valence_mean, valence_std, valence_ max_mean, valence_max_std, valence_min_mean, valence_min_std, "
        "arousal_mean, arousal_std, arousal_max_mean, arousal_max_std, arousal_min_mean, arousal_min_std"
    ]
    for song in sorted(songs, key=lambda song: song.song_id):
        ratings = _ratings(seed, song)
        cells = [str(song.song_id)]
        for dimension in (0, 1):
            by_section = ratings[:, :, dimension]
            views = [by_section.mean(axis=1)]
            if song.full:
                views += [by_section.max(axis=1), by_section.min(axis=1)]
            for view in views:
                # DEAM's first table has 5, its second 5.0.
                values = (round(float(view.mean()), 2), round(float(view.std()), 2))
                cells += [str(value) if song.full else f"{value:g}" for value in values]
        (full if song.full else excerpts).append(",".join(cells))
    write_text(folder / "static_annotations_averaged_songs_1_2000.csv", "\n".join(excerpts) + "\n")
    write_text(folder / "static_annotations_averaged_songs_2000_2058.csv", "\n".join(full) + "\n")


# fmt: off
ADJECTIVES = (
    "Amber", "Borrowed", "Crooked", "Distant", "Electric", "Folded", "Gentle", "Hollow", "Idle", "Jagged",
    "Kindly", "Lunar", "Modest", "Narrow", "Open", "Paper", "Quiet", "Rusty", "Silver", "Tidal",
)
NOUNS = (
    "Anchors", "Bicycles", "Candles", "Drifters", "Engines", "Foxes", "Gardens", "Harbours", "Islands", "Jackdaws",
    "Kettles", "Lanterns", "Meadows", "Numbers", "Orchards", "Pilots", "Quarries", "Rivers", "Sparrows", "Tailors",
)
# fmt: on
GENRES = ("Blues", "Classical", "Country", "Electronic", "Folk", "Jazz", "Pop", "Rock")


def _write_metadata(folder: Path, songs: Sequence[PlannedSong]) -> None:
    """Write the tables of three years with the peculiarities of each: see the comments."""
    tables = {
        2013: [["song_id", "album", "artist", "title", "Genre"]],
        2014: [["song_id", "artist", "album", "title", "Genre", "", "", ""]],
        2015: [["song_id", "title", "artist", "album", "Genre", "", "", ""]],
    }
    for song in sorted(songs, key=lambda song: song.song_id):
        number = str(song.song_id)
        artist = f"The {ADJECTIVES[song.artist % 20]} {NOUNS[song.artist // 20]}"
        title = f"Study No. {number}"
        genre = GENRES[song.artist % len(GENRES)]
        if song.song_id <= 1000:  # tabs inside the cells, the file name under album
            tables[2013].append([number, f"\t{number}.mp3", f"{artist}\t", f"\t{title}\t", f"\t{genre}\t"])
        elif song.song_id <= 2000:  # the genre spills over into cells without a header
            tags = ["made", genre.lower(), "study"][: song.song_id % 4]
            tables[2014].append([number, artist, "Studies", title, genre, *tags, *[""] * (3 - len(tags))])
        else:  # another order of columns, and n/a
            tables[2015].append([number, title, artist, "n/a", genre, "", "", ""])
    for year, rows in tables.items():
        text = io.StringIO()
        for row in rows:
            quoted = [f'"{cell}"' if "\t" in cell else cell for cell in row]
            text.write(",".join(quoted) + "\n")
        write_text(folder / f"metadata_{year}.csv", text.getvalue())

"""Files in a dataset's folder that are not used, by reason, so that none is ignored silently."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from emotion.data.songs import AUDIO_SUFFIX
from emotion.errors import printable

EXAMPLES = 3

MISNAMED = "audio files whose names are no song ids; rename them to SONG_ID.mp3, with the id of the label file"
UNLABELLED = "audio files without a label; songs without labels are not used"
UNLISTED = "audio files that songs.csv does not list; add a row to use one"
COLUMNS = "columns of songs.csv that are not used"
UNREAD = "audio files in unsupported formats; convert them to flac or wav"
UNKNOWN = "files that are named by a song id, but are not in a supported audio format"
UNFINISHED = "files whose download or copy is not finished; fetch them again"
ANNEX = "links to content that is absent (git-annex or datalad); run `git annex get` there"
DANGLING = "links to files that are absent; copy or mount what they name"
IRREGULAR = "songs or tables that are not regular files"
SPREADSHEETS = "spreadsheets; save labels and metadata as CSV"
ARCHIVES = "archives; unpack them if the songs or labels are in them"
TABLES = "CSV tables of other names than songs.csv, or than those of DEAM, EmoMusic and PMEmo"
MISPLACED = "tables in another place or spelling than songs.csv, in lower case, in the dataset's folder itself"
REPEATED = "folders that are reached again through links"
HIDDEN = "hidden files and folders, or files of the operating system"
OTHER = "other files"

WARNED = (MISNAMED, UNLISTED, UNREAD, UNKNOWN, UNFINISHED, ANNEX, DANGLING, IRREGULAR, SPREADSHEETS)
"""Reasons by which songs or labels may be missing."""

BY_SUFFIX = [
    (re.compile(r"\.(part|partial|crdownload|download|filepart|aria2|te?mp)", re.IGNORECASE), UNFINISHED),
    (re.compile(AUDIO_SUFFIX, re.IGNORECASE), MISNAMED),
    (re.compile(r"\.(aac|ac3|alac|amr|ape|dsf|m4b|midi?|mka|mkv|mov|mp4|mpc|ra|tta|webm|wma|wv)", re.IGNORECASE), UNREAD),
    (re.compile(r"\.(xlsx?|xlsm|ods|numbers)", re.IGNORECASE), SPREADSHEETS),
    (re.compile(r"\.(zip|tar|tgz|gz|bz2|xz|7z|rar|zst)", re.IGNORECASE), ARCHIVES),
    (re.compile(r"\.(csv|tsv)", re.IGNORECASE), TABLES),
    (re.compile(r"\.(txt|json|png|jpe?g|md|html?|pdf|npy|lab|lrc)", re.IGNORECASE), OTHER),
]
OF_THE_SYSTEM = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is one that a system hides: it begins with a dot, as ._1.mp3 of macOS does."""
    return name.startswith(".") or name.casefold() in OF_THE_SYSTEM


def reason(name: str) -> str:
    """Why a file of this name, without folders, is not used."""
    if is_hidden(name):
        return HIDDEN
    path = PurePosixPath(name)
    if path.name.casefold() == "songs.csv":
        return MISPLACED
    by_suffix = next((why for pattern, why in BY_SUFFIX if pattern.fullmatch(path.suffix)), None)
    return by_suffix or (UNKNOWN if re.fullmatch("[0-9]+", path.stem) else OTHER)


@dataclass
class Unused:
    """How many files were not used for each reason, and the first names. Millions of them take no more memory than a few."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, why: str | None = None) -> None:
        """name: path relative to the dataset's folder. why: if it is not clear from the name."""
        why = why or reason(name.rpartition("/")[2])
        self.counts[why] += 1
        examples = self.examples.setdefault(why, [])
        if len(examples) < EXAMPLES:
            examples.append(printable(name))

    def lines(self) -> dict[str, str]:
        """Reason → a line that names count and examples; the reasons first by which songs may be missing."""
        order = sorted(self.counts, key=lambda why: (why not in WARNED, -self.counts[why], why))
        return {why: f"not used: {why} ({self.counts[why]}: {self._examples(why)})" for why in order}

    def _examples(self, why: str) -> str:
        return ", ".join(self.examples[why]) + (", …" if self.counts[why] > EXAMPLES else "")

    def hint(self, *without: str) -> str:
        """What to add to the message that there are no songs or labels. without: reasons that do not matter there."""
        return "".join(f" N{line[1:]}." for why, line in self.lines().items() if why not in (HIDDEN, OTHER, *without))

"""Decode songs on all cores: in worker processes if there are many songs, else in threads of this process.

Threads wait for the GIL in scipy's sparse product, in the scan of mp3 frames and wherever Python touches a block.
A worker is another interpreter, started by a command line, not by a fork, that imports nothing larger than numpy, scipy.fft,
soundfile and soxr. It receives the log-mel's settings and then one song after another over a socket. If this process ends, even
by SIGKILL, the system closes the socket and the worker exits; if the worker is blocked on a file, the system kills it (prctl(2),
PR_SET_PDEATHSIG).
"""

import ctypes
import gc
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Self

from emotion.audio.mel import LogMel
from emotion.audio.song_decoding import DecodedSong, decode_song
from emotion.errors import EmotionError, LimitError, ModelError
from emotion.proc import memory_bytes

SONGS_PER_WORKER = 50  # with fewer, starting one takes longer than it saves: as long as ten excerpts of 45 s
MOST_WORKERS = 32  # this process writes their results and cannot keep up with more
PROGRAM = "import sys; sys.path[:] = sys.argv[3:]; from emotion.audio.song_workers import serve; serve(*sys.argv[1:3])"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SIGKILL = 9
PR_SET_PDEATHSIG = 1

Request = tuple[Path, float, str | None]  # as for decode_song: path, longest seconds, expected SHA-256
Line = tuple[str, int, str]  # of a log: the logger's name, level, text
Answer = tuple[DecodedSong | Exception, list[Line]]


@dataclass(frozen=True)
class Workers:
    """How songs are decoded. most: processes, or threads where processes are not worth it. started_within: is entered while
    processes start, which inherit what it changes, such as blocked signals. add_bytes: called at the end with the memory of
    the processes, without what they share, each at its peak."""

    most: int
    started_within: Callable[[], AbstractContextManager[object]] = nullcontext
    add_bytes: Callable[[int], None] = lambda _: None


class SongDecoders:
    """A context manager that decodes songs in parallel. At its end, processes are killed: they have nothing to save. Where the
    thread that has started them ends before, the system kills them, too.

    songs: how many there are to decode. count: workers, and songs that are decoded at the same time.
    """

    def __init__(self, log_mel: LogMel, longest_seconds: float, workers: Workers, *, songs: int) -> None:
        self._log_mel, self._longest_seconds, self._add_bytes = log_mel, longest_seconds, workers.add_bytes
        processes = min(workers.most, songs // SONGS_PER_WORKER, MOST_WORKERS)
        self._processes: list[_WorkerProcess] = []
        self._idle: SimpleQueue[_WorkerProcess] = SimpleQueue()
        if processes >= 2:
            self._start_processes(processes, workers.started_within)
        self.count = len(self._processes) or workers.most
        self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="features")

    def _start_processes(self, count: int, started_within: Callable[[], AbstractContextManager[object]]) -> None:
        try:
            with started_within():
                for _ in range(count):
                    self._processes.append(_WorkerProcess(self._log_mel))
        except BaseException:
            self._end_processes()
            raise
        for process in self._processes:
            self._idle.put(process)

    def start(self, path: Path, expected_sha256: str | None) -> Future[DecodedSong]:
        """Decode a file as soon as a worker is free; see decode_song. Where the worker dies, the result is a LimitError if it was
        killed, else a ModelError."""
        return self._threads.submit(self._decode, path, expected_sha256)

    def _decode(self, path: Path, expected_sha256: str | None) -> DecodedSong:
        if not self._processes:
            return decode_song(path, self._log_mel, self._longest_seconds, expected_sha256)
        process = self._idle.get()  # there is one for each thread
        try:
            return process.decode((path, self._longest_seconds, expected_sha256))
        finally:
            self._idle.put(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._add_bytes(sum(process.own_bytes() for process in self._processes))
        self._end_processes()
        self._threads.shutdown()
        for process in self._processes:
            process.connection.close()

    def _end_processes(self) -> None:
        for process in self._processes:
            process.kill()


class _WorkerProcess:
    """Decodes one song at a time. Used by one thread at a time."""

    def __init__(self, log_mel: LogMel) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-IB", "-c", PROGRAM, str(theirs.fileno()), str(os.getpid()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                pass_fds=[theirs.fileno()],
            )
        self._first: LogMel | None = log_mel

    def decode(self, request: Request) -> DecodedSong:
        found: DecodedSong | Exception
        try:
            if self._first is not None:
                self.connection.send(self._first)
                self._first = None
            self.connection.send(request)
            found, lines = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._death(request[0]) from None
        for name, level, text in lines:
            logging.getLogger(name).log(level, "%s", text)
        if isinstance(found, Exception):
            raise found
        return found

    def _death(self, path: Path) -> EmotionError:
        code = self._process.wait()
        if code == -SIGKILL:
            return LimitError(
                f"features: the process that decoded {path} was killed, as the system does where memory runs out. Give the job "
                f"more memory, or lower device.threads; then run it again: it resumes."
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return ModelError(
            f"features: the process that decoded {path} ended with {how}. What it said, if anything, is on standard error. If it "
            f"ends there again, replace that file or remove it."
        )

    def own_bytes(self) -> int:
        """Of its memory at its peak, what is not a library's file, which all processes share. 0 where it has ended."""
        status = Path(f"/proc/{self._process.pid}/status")
        return max((memory_bytes("VmHWM", status) or 0) - (memory_bytes("RssFile", status) or 0), 0)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class _Lines(logging.Handler):
    """Collects the log lines of a worker for the process that owns the log file."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append((record.name, record.levelno, record.getMessage()))


def serve(descriptor: str, parent: str) -> None:
    """Main loop of a worker: decode requested files until the other end of its socket, this file descriptor, is closed. parent:
    number of the process that has it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != int(parent):
        return
    gc.freeze()  # what was imported stays, and is not searched for garbage again with every song
    lines, logger = _Lines(), logging.getLogger("emotion")
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    with Connection(int(descriptor)) as connection:
        try:
            log_mel: LogMel = connection.recv()
            while True:
                request: Request = connection.recv()
                answer: Answer = (_decoded_or_error(request, log_mel), lines.kept)
                connection.send(answer)
                lines.kept.clear()
        except (EOFError, ConnectionError):
            return


def _decoded_or_error(request: Request, log_mel: LogMel) -> DecodedSong | Exception:
    path, longest_seconds, expected_sha256 = request
    try:
        return decode_song(path, log_mel, longest_seconds, expected_sha256)
    except Exception as error:  # noqa: BLE001 - it is raised where the song is asked for
        if not isinstance(error, EmotionError):
            error.add_note(traceback.format_exc())
        return error

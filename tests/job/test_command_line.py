"""A user's mistake: one line, a remedy, the documented exit code, no traceback."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from emotion.errors import SpecError
from emotion.training.memory_account import COMPONENTS
from job.__main__ import app, logging_to
from job.pipeline.phases import PHASES
from tests.conftest import TINY, TinyRun

Command = Callable[..., subprocess.CompletedProcess[str]]


def refused(found: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    lines = [line for line in found.stderr.splitlines() if " INFO " not in line]
    assert len(lines) == 1, found.stderr
    for text in said:
        assert text in lines[0]


def test_a_mistyped_key(emotion_job: Command, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: a\ndata: {source: 'generated:24'}\ngan:\n  epocs: 3\n")
    refused(emotion_job("run", spec, "--work", tmp_path), 64, f"{spec}:4:3:", "gan.epocs", "epochs")


def test_a_wrong_type(emotion_job: Command, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: a\ndata: {source: 'generated:24'}\ngan: {epochs: ten}\n")
    refused(emotion_job("check", spec), 64, f"{spec}:3:7:", "gan.epochs", "'ten'", "number")


def test_a_wrong_override(emotion_job: Command) -> None:
    refused(emotion_job("check", TINY, "--set", "gan.epochs=-2"), 64, "--set gan.epochs=-2", "-2")


def test_a_missing_spec(emotion_job: Command, tmp_path: Path) -> None:
    refused(emotion_job("run", tmp_path / "absent.yaml"), 64, "absent.yaml", "no such file")


def test_no_control_byte_of_an_argument_a_file_or_a_name_reaches_the_terminal(emotion_job: Command, tmp_path: Path) -> None:
    evil = "\x1b]0;x\x07\x9b31m"
    songs = tmp_path / f"songs{evil}"
    songs.mkdir()
    (songs / "static_annots.csv").write_text(f"song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,{evil},1,1,1\n")
    (songs / "2.mp3").write_bytes(b"x")
    spec = tmp_path / "spec.yaml"
    spec.write_bytes(f"name: a\ndata: {{source: 'generated:24'}}\n{evil}: 1\n".encode())
    for arguments in (
        [evil],
        ["check", f"{evil}.yaml"],
        ["check", spec],
        ["check", TINY, "--set", f"gan.epochs={evil}"],
        ["check", TINY, "--set", f"data.source={songs}"],
        ["plan", TINY, "--set", f"data.source={songs}", "--work", tmp_path / "work"],
        ["run", TINY, "--set", f"data.source={songs}", "--work", tmp_path / "work", "--until", "features"],
    ):
        found = emotion_job(*arguments)
        assert not set(found.stdout + found.stderr) & set("\x1b\x07\x9b"), arguments
    for log in (tmp_path / "work").rglob("job.log"):
        assert not set(log.read_text()) & set("\x1b\x07\x9b")


def test_an_unknown_phase(emotion_job: Command, tmp_path: Path) -> None:
    refused(emotion_job("run", TINY, "--work", tmp_path, "--until", "training"), 64, "'training'", "stage, features, split, gan")


def test_an_unknown_option(emotion_job: Command) -> None:
    refused(emotion_job("run", TINY, "--wrok", "x"), 64, "--wrok")


def test_a_command_that_needs_a_library_which_is_not_installed(tmp_path: Path) -> None:
    without_numpy = "import sys; sys.modules['numpy'] = None; from job.__main__ import main; main()"
    found = subprocess.run([sys.executable, "-c", without_numpy, "collect", str(tmp_path)], capture_output=True, text=True)
    refused(found, 64, "needs the libraries of a job, and numpy is not", "In a clone", "--editable '.[job]'")


def test_a_missing_dataset(emotion_job: Command, tmp_path: Path) -> None:
    found = emotion_job("run", TINY, "--work", tmp_path, "--set", f"data.source={tmp_path / 'absent'}")
    refused(found, 65, "data.source", "absent", "Name the folder")


def test_an_empty_dataset(emotion_job: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = emotion_job("run", TINY, "--work", tmp_path, "--set", f"data.source={tmp_path / 'empty'}")
    refused(found, 65, "empty", "static_annotations_averaged_songs_1_2000.csv")


def test_missing_weights_are_reported_before_the_first_phase(emotion_job: Command, tmp_path: Path) -> None:
    found = emotion_job("run", TINY, "--work", tmp_path, "--set", "vit.weights=./absent.safetensors")
    refused(found, 65, "absent.safetensors")
    assert not list(tmp_path.glob("scratch/*/receipt.json"))


def test_a_work_folder_that_cannot_be_made(emotion_job: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(emotion_job("run", TINY, "--work", tmp_path / "file" / "work"), 64, "--work")


def test_a_missing_mirror(emotion_job: Command, tmp_path: Path) -> None:
    found = emotion_job("run", TINY, "--work", tmp_path / "work", "--set", f"checkpoint.mirror={tmp_path / 'absent'}")
    refused(found, 69, "checkpoint.mirror", "absent", "No such file or directory", "--mirror-unreachable")
    assert not list(tmp_path.rglob("stage-*"))


def test_an_allocator_setting_that_torch_refuses(emotion_job: Command, tmp_path: Path) -> None:
    found = emotion_job("run", TINY, "--work", tmp_path, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:1")
    refused(found, 64, "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments")


def test_a_folder_without_a_model(emotion_job: Command, tmp_path: Path) -> None:
    refused(emotion_job("predict", tmp_path, TINY), 65, "model.safetensors", "published run")


def test_a_published_model_with_a_changed_byte(emotion_job: Command, tiny_run: TinyRun, tmp_path: Path) -> None:
    published = shutil.copytree(tiny_run.published, tmp_path / "published")
    weights = published / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for model in (published, published / "model"):
        refused(emotion_job("predict", model, TINY), 65, "model/model.safetensors", "manifest.json", "Copy the run")


def test_a_missing_gpu(emotion_job: Command, tmp_path: Path) -> None:
    found = emotion_job("run", TINY, "--work", tmp_path, "--set", "device.kind=cuda", CUDA_VISIBLE_DEVICES="")
    refused(found, 70, "cuda", "device.kind", "no usable GPU", "--gpus all")
    assert not list(tmp_path.glob("scratch/*")), "a phase has started"


def test_check_and_plan_and_schema_import_nothing_heavy(tmp_path: Path) -> None:
    program = """
import sys
from job.__main__ import command
code = command()
heavy = {"torch", "numpy", "scipy", "librosa", "timm", "matplotlib"} & set(sys.modules)
print(code, sorted(heavy), file=sys.stderr)
"""
    for arguments in (["check", str(TINY)], ["plan", str(TINY), "--work", str(tmp_path)], ["schema"]):
        found = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        assert found.stderr == "0 []\n", arguments


@pytest.mark.full
def test_plan_with_probe_prints_time_price_and_the_memory_of_both_trainings(emotion_job: Command, tmp_path: Path) -> None:
    found = emotion_job("plan", TINY, "--probe", "--work", tmp_path, "--set", "budget.price_per_hour=3600")
    assert found.returncode == 0, found.stderr
    times = r"\nexpected +seconds\n(.*)\nin all [\d.]+ (?:s|min), price ([\d.]+), from the start;"
    expected = re.search(times, found.stdout, re.DOTALL)
    assert expected is not None, found.stdout
    seconds = {line.split()[0]: float(line.split()[1]) for line in expected[1].splitlines()}
    assert list(seconds) == ["imports", *(phase.name for phase in PHASES if phase.name != "publish")]
    assert sum(seconds.values()) == pytest.approx(float(expected[2]), abs=1)
    # 24 songs: 6 test, 5 validate; 13 train the GAN in batches of 6, and the ViT in batches with 6 real ones.
    assert "5 steps of" in expected[1]
    assert "7 steps of" in expected[1]
    rows = dict(line.split(maxsplit=1) for line in found.stdout.rpartition("\n\n")[2].splitlines())
    assert rows["MiB"].split() == ["gan", "vit"]
    assert rows["micro_batch"].split() == ["4", "5"]
    *components, peak = [list(map(float, rows[name].split())) for name in (*COMPONENTS, "peak")]
    assert [sum(phase) for phase in zip(*components, strict=True)] == pytest.approx(peak, abs=0.5)


def test_the_schema_is_json_with_the_sections(emotion_job: Command) -> None:
    properties = json.loads(emotion_job("schema").stdout)["properties"]
    assert {"name", "data", "gan", "vit"} <= set(properties)


@pytest.mark.parametrize("name", ["demo", "small", "deam", "deam-t4"])
def test_every_preset_is_valid_and_opens_with_its_cost(emotion_job: Command, name: str) -> None:
    preset = TINY.parent.parent / "job" / "specs" / f"{name}.yaml"
    found = emotion_job("check", preset, "--set", "data.source=generated:96")
    assert found.returncode == 0, found.stderr
    opening = preset.read_text().split("\nname:")[0]
    assert "Cost" in opening
    assert "Measured" in opening


def test_a_value_may_come_from_the_environment(emotion_job: Command) -> None:
    given = emotion_job("check", TINY, "--set", "split.fold=2")
    assert given.returncode == 0
    assert emotion_job("check", TINY, "--set", "split.fold=$INDEX", INDEX="2").stdout == given.stdout
    assert emotion_job("check", TINY, "--set", "split.fold=$INDEX", INDEX="1").stdout != given.stdout
    missing = emotion_job("check", TINY, "--set", "split.fold=$INDEX_OF_NOBODY")
    refused(missing, 64, "--set split.fold=$INDEX_OF_NOBODY", "no INDEX_OF_NOBODY")


@pytest.mark.parametrize("option", ["--work", "--scratch"])
@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (os.fsdecode(b"caf\xe9"), "not UTF-8"),
        ("two\nlines", "control character"),
        ("", "is empty"),
        ("file", "cannot be a folder: there is a file"),
        ("file/below", "file is a file"),
        ("link", "link to nowhere"),
        ("a" * 300, "File name too long"),
        ("/".join(["a" * 200] * 19), "bytes"),
    ],
)
def test_a_folder_that_cannot_be_one_is_refused_at_the_start(
    option: str, folder: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    with pytest.raises((SpecError, click.ClickException), match=said):
        app(["plan", str(TINY), option, folder], standalone_mode=False)


def test_a_work_folder_that_is_not_utf8_is_refused_before_any_work(emotion_job: Command, tmp_path: Path) -> None:
    work = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    refused(emotion_job("run", TINY, "--work", work), 64, "--work", "udce9", "not UTF-8")
    assert not list(tmp_path.iterdir())
    refused(emotion_job("check", TINY, "--set", os.fsdecode(b"data.source=caf\xe9")), 64, "--set", "not UTF-8")


def test_a_file_that_looks_like_an_option(tmp_path: Path) -> None:
    (tmp_path / "-x.mp3").touch()
    command = [sys.executable, "-m", "job", "predict", "model", "-x.mp3"]
    environment = {**os.environ, "PYTHONPATH": str(TINY.parent.parent)}
    refused(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True), 64, "-x", "./-x.mp3")


def test_a_name_that_the_terminal_cannot_show(emotion_job: Command, tmp_path: Path) -> None:
    spec = shutil.copy(TINY, tmp_path / "für.yaml")
    found = emotion_job("check", spec, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (found.returncode, found.stderr) == (0, "")
    assert r"f\xfcr.yaml: valid" in found.stdout


def test_a_log_line_is_one_line(tmp_path: Path) -> None:
    with logging_to(tmp_path / "job.log"):
        logging.getLogger("job").warning("%s: damaged", "a\n\x1b[2Jb\udcff.mp3")
    assert (tmp_path / "job.log").read_text().endswith("WARNING a\\n\\x1b[2Jb\\udcff.mp3: damaged\n")


NAMES = [b"tab\tline\n.wav", b"caf\xe9.wav", "Für ☂.wav".encode()]


@pytest.mark.full
@pytest.mark.parametrize("as_json", [False, True])
def test_names_of_songs_are_escaped_in_predictions(
    emotion_job: Command, tiny_run: TinyRun, tmp_path: Path, as_json: bool
) -> None:
    song = next((tiny_run.published / "samples").glob("*.wav"))
    paths = [os.fsdecode(os.fsencode(tmp_path) + b"/" + name) for name in NAMES]
    for path in paths:
        shutil.copy(song, path)
    found = emotion_job("predict", tiny_run.published, *paths, *(["--json"] if as_json else []), PYTHONIOENCODING="ascii")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    if as_json:
        names = [Path(json.loads(line)["file"]).name for line in lines]
        assert names == ["tab\tline\n.wav", r"caf\udce9.wav", "Für ☂.wav"]
    else:
        rows = [line.split("\t") for line in lines[1:]]
        assert [Path(row[-1]).name for row in rows] == [r"tab\tline\n.wav", r"caf\udce9.wav", r"F\xfcr \u2602.wav"]


FAULT = """
import sys
class Fault:
    def find_spec(self, name, path, target=None):
        if name == "emotion.gan.train":
            raise ValueError("nobody expects this")
sys.meta_path.insert(0, Fault())
"""
"""As sitecustomize.py: a module of the program has a fault."""


def test_an_error_that_nobody_expected_is_one_line_with_the_traceback_in_the_log(emotion_job: Command, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT, encoding="utf-8")
    found = emotion_job("run", TINY, "--work", tmp_path, "--until", "gan", PYTHONPATH=str(tmp_path))
    refused(found, 70, "an unexpected error, ValueError", "job.log")
    (log,) = tmp_path.glob("tiny-*/job.log")
    assert "Traceback (most recent call last)" in log.read_text()
    end = json.loads((log.parent / "attempts.jsonl").read_text().splitlines()[-1])
    assert (end["exit_code"], end["reason"]) == (70, "ValueError")
    again = emotion_job("run", TINY, "--work", tmp_path, "--until", "gan", PYTHONPATH=str(tmp_path), EMOTION_TRACEBACK="1")
    assert "Traceback (most recent call last)" in again.stderr
    # The environment's fault, and not the program's.
    wrong = emotion_job("run", TINY, "--work", tmp_path, "--until", "gan", TORCH_LOGS="nonsense")
    refused(wrong, 64, "TORCH_LOGS in the environment is 'nonsense', which a library refuses: Invalid log settings")


def limited(*limits: str) -> list[str]:
    """The command under limits. As the kernel does not count the processes of root, root becomes a user who may read all."""
    may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    user = ["setpriv", "--reuid=54322", "--clear-groups", *may_read] if os.getuid() == 0 else []
    return [*user, "prlimit", *limits, sys.executable, "-m", "job"]


@pytest.mark.parametrize(("limit", "said"), [("--nproc=4", "ulimit -u"), ("--as=314572800", "ulimit -v")])
def test_a_limit_on_the_process_is_named(limit: str, said: str, tmp_path: Path, component: Callable[[str], str]) -> None:
    component("setpriv")
    command = [*limited(limit), "run", str(TINY), "--work", str(tmp_path / "work")]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    refused(found, 70, said)


def test_a_number_of_threads_that_is_none_ends_a_run_before_it_makes_a_folder(emotion_job: Command, tmp_path: Path) -> None:
    arguments = ("run", TINY, "--work", tmp_path / "work", "--set", "device.threads=null")
    refused(emotion_job(*arguments, OMP_NUM_THREADS="zero"), 64, "emotion-job: OMP_NUM_THREADS is 'zero', expected a number")
    assert not (tmp_path / "work").exists()


@pytest.mark.full
def test_an_address_space_without_room_for_the_libraries(tmp_path: Path, component: Callable[[str], str]) -> None:
    command = [component("prlimit"), "--as=1073741824", sys.executable, "-m", "job", "run", str(TINY), "--work", str(tmp_path)]
    refused(subprocess.run(command, capture_output=True, text=True), 70, "ulimit -v", "1048576 KiB")


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_closed_stream_is_no_error(descriptor: int) -> None:
    check = [sys.executable, "-m", "job", "check", str(TINY)]
    assert subprocess.run(check, preexec_fn=lambda: os.close(descriptor)).returncode == 0


@pytest.mark.parametrize("command", [["check", str(TINY)], ["schema"]])
def test_a_full_disk_below_standard_output_is_named(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        found = subprocess.run([sys.executable, "-m", "job", *command], stdout=full, stderr=subprocess.PIPE, text=True)
    refused(found, 69, "emotion-job: standard output: No space left on device. Not all was printed: make room")


def test_a_full_disk_below_standard_error_leaves_the_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-m", "job", "check", "absent.yaml"], stderr=full).returncode == 64


def test_no_file_gets_what_is_printed_to_a_closed_stream(tmp_path: Path) -> None:
    program = "import os, sys; from job.entry import main; sys.argv[1:] = ['schema']; os._exit = sys.exit\n"
    program += "try: main()\nexcept SystemExit: print(os.readlink('/proc/self/fd/2'), os.open('/', os.O_RDONLY))"
    found = subprocess.run([sys.executable, "-c", program], preexec_fn=lambda: os.close(2), stdout=subprocess.PIPE, text=True)
    null, opened = found.stdout.split()[-2:]
    assert (null, int(opened) > 2) == (os.devnull, True)

"""--help of every command, and the completion of what is typed."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from job.__main__ import app as job_app
from job.help import Group
from slurm.__main__ import app as slurm_app

GROUPS = {"emotion-job": job_app, "emotion-slurm": slurm_app}


def commands() -> Iterator[tuple[str, str]]:
    for program, group in GROUPS.items():
        yield from ((program, name) for name in ("", *group.commands))


@pytest.mark.parametrize(("program", "command"), [*commands()])
def test_help_ends_with_examples_that_can_be_typed_and_with_exit_codes(program: str, command: str) -> None:
    group = GROUPS[program]
    assert isinstance(group, Group)
    found = CliRunner().invoke(group, [*([command] if command else []), "--help"], prog_name=program, terminal_width=80)
    assert found.exit_code == 0
    assert max(map(len, found.output.splitlines())) <= 80
    assert not re.search(r"^ .*\w\.\.\.$", found.output, re.MULTILINE), "a command's first sentence is cut off in the list"
    examples, codes = found.output.split("Examples:\n")[1].split("Exit codes:\n")
    lines = examples.split("\n\n")[0].splitlines()
    assert lines
    for line in lines:
        words = shlex.split(line.split(" > ")[0], comments=True)
        assert words[0] == program
        assert command in ("", words[1])
        group.commands[words[1]].make_context(words[1], words[2:])
    assert [line.split()[0] for line in codes.split("\n\n")[0].splitlines()][:2] == ["0", "64"]


@pytest.mark.parametrize("program", [*GROUPS])
def test_a_program_alone_prints_its_help_and_a_wrong_command_line_says_where_it_is_explained(program: str) -> None:
    module = {"emotion-job": "job", "emotion-slurm": "slurm"}[program]
    for words, said in {
        "": f"Usage: {program} [OPTIONS] COMMAND [ARGS]...\n",
        "doctor --clutser x": f"{program}: No such option '--clutser'.",
        "script extra extra": f"{program}: ",
    }.items():
        found = subprocess.run([sys.executable, "-m", module, *words.split()], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (64, "")
        assert found.stderr.startswith(said)
        assert not words or re.search(r"[.?] See \S+( \w+)? --help\.\n\Z", found.stderr)


@pytest.mark.parametrize("program", [*GROUPS])
def test_the_version_is_that_of_the_installation_and_in_an_image_its_name_and_revision(program: str) -> None:
    version = importlib.metadata.version("emotion-job")
    for of_image, said in [
        ({"EMOTION_IMAGE": None, "EMOTION_REVISION": None}, f"{program} {version}\n"),
        (
            {"EMOTION_IMAGE": "jobs:1-cpu", "EMOTION_REVISION": "4f00d"},
            f"{program} {version} (image jobs:1-cpu, revision 4f00d)\n",
        ),
    ]:
        found = CliRunner().invoke(GROUPS[program], ["--version"], prog_name=program, env=of_image)
        assert (found.exit_code, found.output) == (0, said)


def completed(program: str, *words: str) -> list[str]:
    """What bash is told when the last of the words is completed."""
    module = {"emotion-job": "job", "emotion-slurm": "slurm"}[program]
    code = f"import sys; sys.argv = [{program!r}]; import runpy; runpy.run_module({module!r}, run_name='__main__')"
    environment = {"COMP_WORDS": " ".join([program, *words]), "COMP_CWORD": str(len(words))}
    variable = f"_{program}_COMPLETE".replace("-", "_").upper()
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, variable: "bash_complete"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout.splitlines()


def test_commands_keys_phases_and_files_are_completed() -> None:
    assert completed("emotion-job", "pl") == ["plain,plan"]
    assert completed("emotion-job", "run", "x.yaml", "--set", "gan.ep") == ["plain,gan.epochs="]
    assert completed("emotion-job", "run", "x.yaml", "--until", "st") == ["plain,stage", "plain,stack"]
    assert completed("emotion-job", "check", "de") == ["file,de"]
    # What may also be in object storage is no path for click.
    for words in [("predict", "wo"), ("predict", "run", "so"), ("evaluate", "run", "--data", "so"), ("reproduce", "wo")]:
        assert completed("emotion-job", *words) == [f"file,{words[-1]}"]
    assert completed("emotion-slurm", "resu") == ["plain,resubmit"]
    assert completed("emotion-slurm", "local", "x.yaml", "--set", "gan.ep") == ["plain,gan.epochs="]


def test_the_line_in_the_help_switches_completion_on_in_bash() -> None:
    group = click.Context(job_app, info_name="emotion-job")
    line = job_app.get_help(group).strip().splitlines()[-1]
    bin_folder = Path(sys.executable).parent
    script = f"{line}\ncomplete -p emotion-job"
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    found = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("complete -o nosort -F _emotion_job_completion emotion-job")

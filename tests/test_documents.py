"""The documents say what the code does: generated tables, commands, links, paths, messages.

Code blocks in the documents are fenced, and the word after the language says what a test does with them:

    sh            every command is parsed: programs, options, targets, files and keys of the spec exist
    sh run        the same, and the block is run; all blocks of one document in one folder, in order
    sh follow     the same, in a walkthrough: tests/test_walkthroughs.py follows it; sh yours names what its reader sets first
    yaml spec     keys of a spec (a part of one is enough); `yaml sweep` and `yaml cluster` are whole files
"""

import ast
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import pytest
import yaml

from emotion.errors import SpecError
from job.__main__ import app as job_app
from job.spec.load import load_spec
from job.spec.model import JobSpec, run_name
from slurm.__main__ import app as slurm_app
from slurm.cluster import load_cluster
from slurm.sweep import load_sweep
from tests.documents import (
    DOCUMENTS,
    FOLDERS,
    GENERATED,
    ROOT,
    RUN_OF_DEMO,
    between,
    cluster_table,
    rows_of_fields,
    spec_table,
    sweep_table,
)

Shell = Callable[[str], "subprocess.CompletedProcess[str]"]
EVERY = pytest.mark.parametrize("name", DOCUMENTS)

PROGRAMS = {
    ".": "changes the shell that reads it",
    "aws": "needs an account; its parameters are compared with the job definition",
    "column": "shows a table",
    "container/debian-base.sh": "needs root and mmdebstrap",
    "container/lock.sh": "writes the lock files",
    "docker": "needs an engine; what follows the image is parsed, and tests/container runs the images",
    "apptainer": "needs Apptainer; what follows the image is parsed",
    "git": "needs a remote repository",
    "hf": "needs an account",
    "jq": "reads JSON",
    "kubectl": "needs a cluster; the file is validated in tests/container",
    **dict.fromkeys(("pip", ".venv/bin/pip", "python3"), "need a package index, or make a virtual environment"),
    "sha256sum": "reads a file that is made elsewhere",
    "wandb": "needs a server",
    "sky": "needs SkyPilot and an account; the file is validated in tests/container",
    "sbatch": "needs SLURM; tests/slurm runs the script",
    "squeue": "needs SLURM",
    **dict.fromkeys(("cat", "cp", "export", "grep", "head", "ls", "mkdir", "rm", "sed", "tail", "touch"), "the shell's own"),
    **dict.fromkeys(("bash", "do", "done", "echo", "kill", "until", "wait", "while"), "of bash, followed in a walkthrough"),
}
"""Programs of commands that are not run here, and why. Those of this project and make are parsed."""
SPEC_KEYS = {row[0].strip("`* ") for row in rows_of_fields(JobSpec)}
MADE = {"container/wheels"}
"""Paths that a build makes."""
GROUPS = {"emotion-job": job_app, "emotion-slurm": slurm_app}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    use: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of every command of a shell block, without assignments, redirections and here-documents."""
        text = re.sub(r"<<'?(\w+)'?(.*?)\n.*?^\1$", r"\2", self.text.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)
        for line in text.splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word in ("&&", "|", ";", "&"):
                    while words and re.fullmatch(r"[A-Z]\w*=.*", words[0]):
                        words.pop(0)
                    if words:
                        yield _without_redirections(words)
                    words = []
                else:
                    words.append(word)


def _without_redirections(words: list[str]) -> list[str]:
    kept = [word for before, word in itertools.pairwise(["", *words]) if before not in (">", "<", ">>")]
    return [word for word in kept if word not in (">", "<", ">>")]


@cache
def text_of(name: str) -> str:
    return DOCUMENTS[name].read_text(encoding="utf-8")


def blocks_of(name: str, language: str) -> list[Block]:
    found = re.findall(r"^```(\w*) ?(.*?)\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)
    return [Block(*one) for one in found if one[0] == language]


def scripts_of(name: str) -> list[str]:
    return [block.text for block in blocks_of(name, "sh") if block.use == "run"]


# Generated tables


@pytest.mark.parametrize(("name", "mark"), GENERATED)
def test_a_generated_table_is_what_the_code_says(name: str, mark: str) -> None:
    (found,) = between(mark).findall(text_of(name))
    assert found[1].strip() == GENERATED[name, mark](), "`make docs` writes it anew"


def test_every_key_has_a_description() -> None:
    assert "None |" not in spec_table() + cluster_table() + sweep_table()


# Commands


def words_of_options(group: click.Group) -> Iterator[tuple[str, str]]:
    for name, command in group.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield name, parameter.opts[0]


@pytest.mark.parametrize(("name", "program"), [("README.md", "emotion-job"), ("slurm/README.md", "emotion-slurm")])
def test_the_list_of_commands_has_every_command_and_option(name: str, program: str) -> None:
    (listed,) = (block.text for block in blocks_of(name, "text") if block.text.startswith(program))
    for command, option in words_of_options(GROUPS[program]):
        (entry,) = re.findall(rf"^{program} {command} .*", listed, re.MULTILINE)
        assert option in entry


def require_options(words: Sequence[str]) -> None:
    """Parse a command line of ours without running it."""
    program, command, *arguments = words
    if command == "--help":
        return
    with pytest.MonkeyPatch.context() as patch:
        for variable in re.findall(r"=\$(\w+)", " ".join(arguments)):
            patch.setenv(variable, "0")
        context = GROUPS[program].commands[command].make_context(command, arguments)
    for override in context.params.get("overrides", ()):
        assert override.partition("=")[0] in SPEC_KEYS, override


def check_command(words: list[str]) -> None:
    program, *arguments = words
    if program in GROUPS:
        require_options(words)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in arguments if "=" not in word), words
        variables = re.findall(r"\$\((\w+)\)|^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
        known = {name for pair in variables for name in pair}
        assert all(word.partition("=")[0] in known for word in arguments if "=" in word), words
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in arguments[2:] if not word.startswith("-")), words
    elif program == "python":
        module = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
        assert arguments[0] == "-c" or (ROOT / module).is_file(), words
    elif program in ("docker", "apptainer") and arguments[0] == "run":
        image = next(place for place, word in enumerate(arguments) if re.search(r"emotion-job[:-].*(cpu|cuda)", word))
        require_options(["emotion-job", *arguments[image + 1 :]])
    else:
        assert program in PROGRAMS, f"{program}: run it, parse it, or say in PROGRAMS why not"


@EVERY
def test_commands_name_programs_options_and_keys_that_exist(name: str) -> None:
    for block in blocks_of(name, "sh"):
        for words in block.commands():
            try:
                check_command(words)
            except (click.ClickException, SpecError, KeyError, StopIteration) as error:
                pytest.fail(f"{name}: {shlex.join(words)}: {error!r}")


@EVERY
def test_commands_within_sentences_exist(name: str) -> None:
    """Their arguments may be left out."""
    prose = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    for text in re.findall(r"`((?:emotion-job|emotion-slurm|make) [a-z][^`]*)`", prose):
        try:
            check_command(shlex.split(text.replace("TASK", "0")))
        except click.MissingParameter:
            continue
        except (click.ClickException, KeyError) as error:
            pytest.fail(f"{name}: {text}: {error!r}")


def test_the_parameters_of_a_batch_job_are_those_of_its_definition() -> None:
    definition = json.loads((ROOT / "container/aws-batch/job-definition.json").read_text())
    used = []
    for block in blocks_of("container/README.md", "sh"):
        for words in block.commands():
            if "--parameters" in words:
                used += re.findall(r"(?:^|,)(\w+)=", words[words.index("--parameters") + 1])
    assert used
    assert {*used} <= {*definition["parameters"]}
    listed = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", text_of("container/README.md"), re.MULTILINE)
    assert dict(listed) == definition["parameters"]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Runs a script where the repository's folders are, but what is written goes elsewhere; with a SLURM that runs nothing."""
    for entry in ("emotion", "job", "slurm", "container", "tests", "Makefile"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    programs = {
        "emotion-job": f'exec {sys.executable} -m job "$@"',
        "emotion-slurm": f'exec {sys.executable} -m slurm "$@"',
        "python": f'exec {sys.executable} "$@"',
        "scontrol": 'case "$*" in *config) echo "MaxArraySize = 1001" ;; *partition) '
        'echo "PartitionName=gpu State=UP"; echo "PartitionName=cpu State=UP" ;; esac',
        **dict.fromkeys(("sbatch", "squeue", "scancel", "srun"), "exit 1"),
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(script: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if scripts_of(name)])
def test_blocks_that_can_be_run_are_run(name: str, shell: Shell) -> None:
    for script in scripts_of(name):
        found = shell(script)
        assert found.returncode == 0, f"{script}\n{found.stdout[-2000:]}\n{found.stderr[-2000:]}"


def test_the_sweep_and_the_cluster_file_of_the_document_can_be_submitted(shell: Shell, tmp_path: Path) -> None:
    for block in blocks_of("slurm/README.md", "yaml"):
        text = block.text.replace("/shared/emotion-job.sif", str(DOCUMENTS["slurm/README.md"]))
        (tmp_path / f"{block.use}.yaml").write_text(text.replace("/shared/emotion", str(tmp_path / "work")))
    found = shell("emotion-slurm submit sweep.yaml --cluster cluster.yaml --dry-run; emotion-slurm doctor --cluster cluster.yaml")
    assert found.returncode == 0, found.stderr
    assert "#SBATCH --array=0-19%8" in found.stdout
    assert not (tmp_path / "work").exists()


# Other blocks


@EVERY
def test_code_blocks_are_fenced_and_name_their_language(name: str) -> None:
    fences = re.findall(r"^```(.*)$", text_of(name), re.MULTILINE)
    assert [fence.partition(" ")[0] for fence in fences[::2]] == re.findall(
        r"^```(sh|yaml|json|text|csv|python)\b", text_of(name), re.MULTILINE
    )
    assert set(fences[1::2]) <= {""}
    outside = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^    \S", outside, re.MULTILINE)


@EVERY
def test_yaml_is_valid_for_what_it_is(name: str, tmp_path: Path) -> None:
    for block in blocks_of(name, "yaml"):
        path = tmp_path / f"{block.use}.yaml"
        if block.use == "spec":
            part = {"name": "x", "data": {"source": "generated:24"}, **yaml.safe_load(block.text)}
            path.write_text(json.dumps(part))
            load_spec(path)
        elif block.use == "sweep":
            path.write_text(block.text)
            (tmp_path / "job").mkdir()
            (tmp_path / "job/specs").symlink_to(ROOT / "job/specs")
            load_sweep(path)
        else:
            assert block.use == "cluster", f"{name}: say what this is: spec, sweep or cluster"
            path.write_text(block.text)
            load_cluster(path)


def test_the_policy_allows_what_storage_asks_for() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "job/storage").glob("*.py"))
    policy = next(json.loads(block.text) for block in blocks_of("job/README.md", "json") if "Statement" in block.text)
    allowed = [statement["Action"] for statement in policy["Statement"]]
    flat = {action for one in allowed for action in (one if isinstance(one, list) else [one])}
    asked = set(re.findall(r'"(s3:[A-Z]\w+)"', sources))
    assert {"s3:GetObject", "s3:PutObject"} <= asked
    assert flat == asked | {"s3:AbortMultipartUpload"}


# Names


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors_of(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@EVERY
def test_links_lead_somewhere(name: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text_of(name)):
        path = DOCUMENTS[name].parent / target if target else DOCUMENTS[name]
        assert path.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors_of(path), f"{name}: {target}#{anchor}"


@EVERY
def test_files_that_are_named_exist(name: str) -> None:
    for path in re.findall(r"(?<![\w./-])((?:emotion|job|slurm|container|tests)/[\w./*-]*\w)", text_of(name)):
        assert path in MADE or any(ROOT.glob(path)), f"{name}: {path}"


OTHERS = re.compile(r"(AWS|PIP|HF|TORCH|WANDB)_\w+|few_validation_songs")
"""Names of other programs, and of an example."""
SOURCES = {".py", ".yaml", ".json", ".sh", ".c", ".def", ".jinja"}


@EVERY
def test_names_in_the_documents_are_names_in_the_code(name: str) -> None:
    """Identifiers with an underscore, keys of the spec, and the classes that the contributing guide names."""
    files = [path for folder in FOLDERS if folder for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    files += [ROOT / path for path in ("Makefile", "pyproject.toml", "container/Dockerfile", ".ci/run")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files).lower()
    sections = {key.partition(".")[0] for key in SPEC_KEYS if "." in key}
    prose = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    unknown = []
    for code in set(re.findall(r"`([^`]+)`", prose)):
        is_class = name == "tests/README.md" and re.fullmatch(r"[A-Z][a-z]+[A-Za-z]*", code)
        if (is_class or (code.isidentifier() and "_" in code.strip("_"))) and not OTHERS.fullmatch(code):
            unknown += [code] if code.lower() not in text else []
        called = re.match(r"(?!timm\.)\w+\.(\w+)\(", code)
        unknown += [code] if called and f"def {called[1]}(" not in text else []
        key = re.fullmatch(r"(\w+)\.([a-z]\w*)(: .*)?", code)
        if key and key[1] in sections and not code.endswith((".csv", ".json", ".py", ".txt", ".yaml")):
            unknown += [code] if f"{key[1]}.{key[2]}" not in SPEC_KEYS else []
    assert unknown == []


def test_every_document_is_checked_here() -> None:
    """But for the model cards of runs below a work folder."""
    found = {*ROOT.glob("*.md")}.union(*((ROOT / folder).rglob("*.md") for folder in FOLDERS if folder))
    assert found == {*DOCUMENTS.values()}


def test_the_first_page_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 200


def literals_of(path: Path) -> set[str]:
    """Every text in a file, … for what is put in."""
    found = set()
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    pieces = {id(piece) for node in nodes if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            found.add(re.sub(r"%[-.\d]*[sdfg]", "…", node.value))
    return found


def explained_messages() -> dict[str, re.Pattern[str]]:
    """What stands in the first column of the tables of troubleshooting."""
    rows: list[str] = []
    for name in DOCUMENTS:
        for after in text_of(name).split("| the line says | cause | what to do |\n")[1:]:
            rows += after.partition("\n\n")[0].splitlines()[1:]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    return {message: re.compile(".*?".join(map(re.escape, message.split("…")))) for message in messages}


def test_messages_that_are_explained_are_messages_of_the_code() -> None:
    texts: set[str] = set()
    for package in ("emotion", "job", "slurm"):
        texts.update(*map(literals_of, (ROOT / package).rglob("*.py")))
    messages = explained_messages()
    assert len(messages) > 60
    assert [message for message, pattern in messages.items() if not any(map(pattern.search, texts))] == []


def test_every_warning_of_a_training_is_explained() -> None:
    patterns = explained_messages().values()
    texts = literals_of(ROOT / "emotion/training/health.py")
    warnings = [text for text in texts if re.search(r"\b(raise|lower|set|change) (gan|vit|precision|…)", text, re.IGNORECASE)]
    assert len(warnings) > 8
    assert [text for text in warnings if not any(pattern.search(text) for pattern in patterns)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "job/specs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_of_a_preset_gives_its_reason(path: Path) -> None:
    _, values = re.split(r"^name: .*\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [line for line in values.splitlines() if not re.search(r":$|  # .", line)] == []


WRITES = re.compile(r"(?:[^2&]> ?|--(?:curve|out|onnx|work) |mkdir -p )([\w.-]+)(?=[ /\n])")
"""What a command writes into the current folder."""


def test_what_the_documents_write_into_a_clone_is_ignored_by_git() -> None:
    shell = "".join(block.text for name in DOCUMENTS for block in blocks_of(name, "sh"))
    written = {*WRITES.findall(shell)}
    assert {"my-songs", "curve.png", "job.sh", "cluster.yaml"} <= written
    # A pattern that is a folder's fits a name only with a slash behind it.
    names = "".join(f"{name}\0{name}/\0" for name in sorted(written))
    found = subprocess.run(["git", "check-ignore", "-z", "--stdin"], cwd=ROOT, input=names, capture_output=True, text=True)
    ignored = {name.rstrip("/") for name in found.stdout.split("\0")}
    assert written - ignored == set()


def test_a_run_of_the_demo_has_the_name_that_its_spec_gives() -> None:
    shown = {name: set(RUN_OF_DEMO.findall(path.read_text(encoding="utf-8"))) for name, path in DOCUMENTS.items()}
    name_of_demo = run_name(load_spec(ROOT / "job/specs/demo.yaml"))
    assert {name: runs for name, runs in shown.items() if runs} == {
        "job/README.md": {name_of_demo},
        "job/walkthroughs.md": {name_of_demo},
    }

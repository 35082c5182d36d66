"""What import-linter cannot see: who may import signal and timm, and who may write the environment."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in ("emotion", "job", "slurm"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def importers(module: str) -> set[str]:
    found = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(each.split(".")[0] == module for each in names):
                found.add(name)
    return found


def test_signals_are_handled_in_one_place_of_the_job_and_one_of_the_launcher() -> None:
    assert importers("signal") == {"job/entry.py", "job/preemption.py", "slurm/task.py"}


def test_timm_and_torchvision_are_imported_in_one_place() -> None:
    assert importers("timm") == importers("torchvision") == {"emotion/compat.py"}


def test_the_environment_is_written_in_one_place_of_the_job_and_one_of_the_launcher() -> None:
    writers = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            match node:
                case ast.Subscript(value=ast.Attribute(attr="environ"), ctx=ast.Store() | ast.Del()):
                    writers.add(name)
                case ast.Attribute(value=ast.Attribute(attr="environ"), attr="clear" | "pop" | "setdefault" | "update"):
                    writers.add(name)
                case ast.Attribute(attr="putenv" | "unsetenv"):
                    writers.add(name)
    assert writers == {"job/environment.py", "slurm/environment.py"}


def test_every_field_of_the_spec_is_read_somewhere() -> None:
    from job.spec.model import JobSpec
    from tests.conftest import section_of

    attributes = {node.attr for _, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for section, field in JobSpec.model_fields.items():
        for key in getattr(section_of(field), "model_fields", {section: None}):
            assert key in attributes, f"{section}.{key}"


def test_the_launcher_imports_the_spec_the_progress_of_a_run_and_little_else() -> None:
    found = set()
    for name, tree in sources():
        if name.startswith("slurm/"):
            found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in found if module.split(".")[0] in ("emotion", "job")}
    assert ours - {"job.run_folder.progress"} == {
        "emotion.characters",
        "emotion.config",
        "emotion.errors",
        "emotion.files",
        "emotion.proc",
        "job.help",
        "job.preemption",
        "job.secrets",
        "job.set_option",
        "job.spec.load",
        "job.spec.location",
        "job.spec.model",
    }

"""Measures the GPU performance of the job, compared with the notebook's loops and the limits of the device.

    python -m tests.bench.gpu [--device cpu] [--json FILE] [--minutes 6]       or: make bench-gpu

Runs whole phases through the job's own code on a generated dataset of DEAM's size. Each part runs in a process of its own, so
that parts share neither memory nor settings. A part that fails or has no time left is "not measured". The output ends with a line
per goal. With --device cpu the same code runs at toy sizes, as a test of this file: its numbers mean nothing.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.bare_step import bare_vit_step, seconds_of
from tests.bench.gpu_goals import CAP_GIB, verdicts

ROOT = Path(__file__).resolve().parents[2]
SPECS = ROOT / "job" / "specs"
EPOCHS = {"gan": 400, "vit": 40}
"""Epochs of deam.yaml. Only one in SHORT of them is run here; the time of the rest is computed from the measured rates."""
SHORT = 20
FIRST_STEP, PROFILED_STEPS = 60, 10
TOY = """
vit.model=test_vit vit.image_size=null vit.channels=1 vit.clip_seconds=1 vit.epochs=8 gan.epochs=8 gan.clip_seconds=1
gan.width=4 gan.latent=4 synth.songs=4 gan.batch_size=4 gan.micro_batch=4 vit.batch_size=8 vit.micro_batch=null synth.samples=[]
evaluate.bootstrap_samples=100 split.folds=2 split.validation_fraction=0.4 mel.mels=32 mel.window_samples=512
mel.hop_samples=512 mel.fmax_hz=8000 vit.frozen_epochs=0 vit.unfreeze_epochs=0
"""


@dataclass(frozen=True)
class Setting:
    """The arguments of all parts. folder: contains the dataset D, and receives work folders. is_toy: whether sizes are toy."""

    folder: Path
    is_toy: bool

    @property
    def kind(self) -> str:
        return "cpu" if self.is_toy else "cuda"


def spec_of(setting: Setting, preset: str, changes: list[str]) -> Any:
    """A preset for the generated dataset; on a CPU with toy networks and few epochs."""
    from job.spec.load import load_spec

    common = [f"data.source={setting.folder / 'D'}", "vit.weights=random", f"device.kind={setting.kind}"]
    if setting.is_toy:
        common += TOY.split()
        changes = [change for change in changes if change.split("=")[0] not in {known.split("=")[0] for known in common}]
    return load_spec(SPECS / f"{preset}.yaml", common + changes)


def run_phases(setting: Setting, spec: Any, work: str, until: str, should_stop: Any = None) -> dict[str, Any]:
    """Run a job. Returns phase → its measurements, with `seconds_to_first_step` and `seconds_per_step`."""
    from job.environment import available_threads, prepare_environment
    from job.pipeline.folders import JobFolders

    if "torch" not in sys.modules:
        prepare_environment(available_threads())
    from job.pipeline.runner import run_job
    from job.preemption import StopRequest

    folders = JobFolders(setting.folder / work, setting.folder / "scratch")
    run_job(spec, folders, until, False, should_stop or StopRequest())
    receipts = [*folders.scratch.glob("*/receipt.json"), *folders.run_folder(spec).glob("*/receipt.json")]
    ends = [receipt.stat().st_mtime for receipt in receipts]
    found = {}
    for receipt in receipts:
        record = json.loads(receipt.read_text(encoding="utf-8"))
        measured = {name: value for name, value in record["measured"].items() if isinstance(value, int | float)}
        found[record["phase"]] = {**measured, **rates(receipt.parent, ends)}
    return found


def rates(phase_folder: Path, ends: list[float]) -> dict[str, float]:
    """Rates from metrics.jsonl. The median over records excludes validations and saves. ends: time at which each phase ended."""
    path = phase_folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    steps = {record["step"]: record["time"] for record in reversed(records)}  # the first record of each step
    points = sorted(steps.items())
    gaps = [(t - s) / (b - a) for (a, s), (b, t) in itertools.pairwise(points)]
    found = {}
    if points and points[0][0] == 1:
        before = [end for end in ends if end < points[0][1]]
        found["seconds_to_first_step"] = points[0][1] - max(before, default=points[0][1])
    if len(gaps) > 1:
        found["seconds_per_step"] = statistics.median(gaps[len(gaps) // 4 :])
    return found


def part_limits(setting: Setting) -> dict[str, Any]:
    """Measure a large matrix product, and the step of a bare ViT on one batch: eager, and as a CUDA graph."""
    import torch

    device = torch.device(setting.kind)
    size = 256 if setting.is_toy else 8192
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    found: dict[str, Any] = {"matrix_tflops": 2 * size**3 / seconds_of(lambda: matrix @ matrix, device, 20) / 1e12}
    model, batch, shape = ("test_vit", 2, (1, 32, 32)) if setting.is_toy else ("vit_base_patch16_224", 12, (3, 224, 224))
    for graph in (False, True)[: 1 if setting.is_toy else 2]:
        found["vit_graph_ms" if graph else "vit_eager_ms"] = 1000 * bare_vit_step(device, model, batch, shape, graph)
    return found


def part_notebook(setting: Setting) -> dict[str, Any]:
    import torch

    from tests.bench.notebook_loops import GAN_BATCH, VIT_BATCH, gan_loop, vit_loop

    device = torch.device(setting.kind)
    model = "vit_tiny_patch16_224" if setting.is_toy else "vit_base_patch16_224"
    clips, steps = (24, 2) if setting.is_toy else (1200, 75)
    vit = vit_loop(device, model=model, clips=clips, steps=steps, amp=True)
    gan = gan_loop(device, clips=2 * clips, frames=32 if setting.is_toy else 1292, steps=2 if setting.is_toy else 60)
    return {
        "vit_ms": 1000 * vit.seconds_per_step,
        "vit_images_per_second": VIT_BATCH / vit.seconds_per_step,
        "vit_peak_gb": vit.peak_bytes / 1e9,
        "gan_songs_per_second": GAN_BATCH / gan.seconds_per_step,
        "gan_peak_gb": gan.peak_bytes / 1e9,
    }


def part_deam_t4(setting: Setting) -> dict[str, Any]:
    """Time the whole job, from a cold start."""
    started = time.perf_counter()
    found = run_phases(setting, spec_of(setting, "deam-t4", ["vit.patience_epochs=1000"]), "T4", "publish")
    return {"seconds": time.perf_counter() - started, "phases": found}


def part_deam(setting: Setting) -> dict[str, Any]:
    """Time a twentieth of the epochs, and compute the time of all."""
    epochs = [f"{phase}.epochs={all_epochs / SHORT:g}" for phase, all_epochs in EPOCHS.items()]
    short = ["vit.frozen_epochs=0", "vit.unfreeze_epochs=0", "vit.patience_epochs=1000"]
    spec = spec_of(setting, "deam", [*epochs, *short])
    found = run_phases(setting, spec, "DEAM", "publish")
    seconds = sum(phase["seconds"] for phase in found.values())
    trainings = sum(found[phase]["seconds"] for phase in EPOCHS)
    return {"seconds_of_a_twentieth": seconds, "seconds_computed": seconds + (SHORT - 1) * trainings, "phases": found}


def part_variants(setting: Setting) -> dict[str, Any]:
    """Time GAN steps of deam-t4 in alternation: unchanged, within the memory cap, with the cache cleared every fifth step."""
    variants = {
        "plain": ["device.gpu_memory_gib=null"],
        "capped": [f"device.gpu_memory_gib={CAP_GIB}"],
        "clearing": ["gan.clear_cache_every_steps=5"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(1 if setting.is_toy else 2):
        for name, changes in variants.items():
            spec = spec_of(setting, "deam-t4", ["gan.epochs=2", f"seed={number}", *changes])
            found = run_phases(setting, spec, f"V{name}", "gan")
            seconds[name].append(found["gan"].get("seconds_per_step", found["gan"]["seconds"]))
    return {f"gan_{name}_seconds_per_step": min(values) for name, values in seconds.items()}


def part_profile(setting: Setting) -> dict[str, Any]:
    """Profile steps inside both trainings of deam-t4: the kernels' share of a step's time, launches and waits."""
    import contextlib

    from job.preemption import StopRequest

    class Watched(StopRequest):
        """A StopRequest that is called once per step, so it can begin and end the profile of some steps."""

        def __init__(self, first: int) -> None:
            super().__init__()
            self.first, self.asked, self.result = first, 0, {}
            self.profile: Any = None

        def __call__(self) -> bool:
            import torch

            self.asked += 1
            if self.asked == self.first:
                activities = [torch.profiler.ProfilerActivity.CPU]
                if torch.cuda.is_available():
                    activities.append(torch.profiler.ProfilerActivity.CUDA)
                    torch.cuda.synchronize()
                self.profile, self.started = torch.profiler.profile(activities=activities), time.perf_counter()
                self.profile.__enter__()
            elif self.asked == self.first + PROFILED_STEPS:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                wall = time.perf_counter() - self.started
                self.profile.__exit__(None, None, None)
                self.result = summary(self.profile.key_averages(), wall / PROFILED_STEPS)
                self.request("the profile is complete")
            return super().__call__()

    found = {}
    for phase, epochs in (("gan", 10), ("vit", 2)):
        spec = spec_of(setting, "deam-t4", [f"gan.epochs={1 if phase == 'vit' else epochs}", f"vit.epochs={epochs}", "seed=7"])
        run_phases(setting, spec, "P", {"gan": "split", "vit": "quality"}[phase])
        watched = Watched(2 if setting.is_toy else FIRST_STEP)
        from emotion.errors import Interrupted

        with contextlib.suppress(Interrupted):
            run_phases(setting, spec, "P", phase, watched)
        found |= {f"{phase}_{name}": value for name, value in watched.result.items()}
    return found


def part_graphs(setting: Setting) -> dict[str, Any]:
    """Time steps of both trainings of deam-t4 with all layers, in alternation without and with CUDA graphs."""
    from job.environment import available_threads, prepare_environment
    from job.pipeline.folders import JobFolders
    from tests.bench.gpu_graphs import Stopwatch, seconds_per_step

    prepare_environment(available_threads())
    first, last = (2, 4) if setting.is_toy else (FIRST_STEP, FIRST_STEP + 100)
    found: dict[str, Any] = {}
    for phase, epochs in (("gan", 10), ("vit", 1)):
        spec = spec_of(setting, "deam-t4", [f"gan.epochs={epochs}", "vit.frozen_epochs=0", "vit.unfreeze_epochs=0", "seed=7"])
        for uses_graphs in (False, True):
            name = f"{phase}_{'graph' if uses_graphs else 'eager'}_ms"
            folders, watch = JobFolders(setting.folder / "P", setting.folder / "scratch"), Stopwatch(first, last)
            out = setting.folder / f"G-{name}"
            found[name] = 1000 * seconds_per_step(spec, folders, phase, out, watch, uses_graphs)
    return found


def summary(averages: Any, wall: float) -> dict[str, Any]:
    """Summarise a profile. averages: its key averages; wall: seconds per step."""
    kernels = [one for one in averages if str(one.device_type).endswith("CUDA")]
    busy = sum(one.self_device_time_total for one in kernels) / 1e6 / PROFILED_STEPS
    launches = sum(one.count for one in averages if "LaunchKernel" in one.key or "GraphLaunch" in one.key) / PROFILED_STEPS
    waits = sum(one.count for one in averages if "Synchronize" in one.key or one.key == "aten::_local_scalar_dense")
    slowest = sorted(kernels, key=lambda one: -one.self_device_time_total)[:5]
    return {
        "busy_share": busy / wall,
        "launches_per_step": launches,
        "waits_per_step": waits / PROFILED_STEPS,
        "slowest": [[one.key[:80], one.self_device_time_total / 1e3 / PROFILED_STEPS] for one in slowest],
    }


def part_attention(setting: Setting) -> dict[str, Any]:
    """Time forward and backward of channel attention and of the notebook's spatial attention, on the notebook's map."""
    import torch

    from tests.bench.attention import MODULES, NOTEBOOK_BATCH, NOTEBOOK_MAP

    device = torch.device(setting.kind)
    batch, shape = (1, (64, 8, 10)) if setting.is_toy else (NOTEBOOK_BATCH, NOTEBOOK_MAP)
    found = {}
    for name, module in MODULES.items():
        network = module(shape[0]).to(device)
        x = torch.randn(batch, *shape, device=device, requires_grad=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found[f"{name}_ms"] = 1000 * seconds_of(lambda network=network, x=x: network(x).sum().backward(), device, 5)
        found[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        del network, x
    return found


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "notebook": part_notebook,
    "deam_t4": part_deam_t4,
    "deam": part_deam,
    "profile": part_profile,
    "graphs": part_graphs,
    "variants": part_variants,
    "limits": part_limits,
    "attention": part_attention,
}
"""Name → part, the most important first, as time may run out. deam_t4 computes the features; later parts reuse them."""


def rows_of(found: dict[str, Any], name: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of all numbers in nested results."""
    rows = []
    for key, value in found.items():
        path = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            rows += rows_of(value, path)
        elif isinstance(value, list):
            rows += [(path, f"{text}: {number:.3g} ms") for text, number in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append((path, f"{value:,.4g}"))
    return rows


def environment(setting: Setting) -> dict[str, Any]:
    """The environment, read in a process of its own, so that this process uses no GPU memory."""
    code = (
        "import json, torch; from importlib.metadata import version; "
        "gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None; "
        "print(json.dumps({'GPU': gpu, 'torch': torch.__version__, 'CUDA': torch.version.cuda, 'timm': version('timm')}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    cores = len(os.sched_getaffinity(0))
    return {"device": setting.kind, "cores": cores, "Python": platform.python_version(), **json.loads(found.stdout)}


def run_part(name: str, setting: Setting, seconds: float) -> dict[str, Any] | None:
    """Run a part in a process of its own. Returns its result; None if it failed or took too long, with the reason on stderr."""
    command = [sys.executable, "-m", "tests.bench.gpu", "--part", name, "--folder", str(setting.folder)]
    command += ["--device", "cpu"] if setting.is_toy else []
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=seconds, cwd=ROOT)
    except subprocess.SubprocessError as error:
        print(f"{name}: not measured: {error}", file=sys.stderr, flush=True)
        return None
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--part", choices=PARTS, help="one part alone, as JSON; needs --folder with a dataset D")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](Setting(arguments.folder, arguments.device == "cpu"))))
        return

    ends = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        setting = Setting(Path(folder), arguments.device == "cpu")
        about = environment(setting)
        print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
        from tests.bench.deam_sized import make_dataset

        make_dataset(setting.folder / "D", **({"excerpts": 20, "full": 0, "pieces": 7} if setting.is_toy else {}))
        found: dict[str, Any] = {}
        for name in PARTS:
            started = time.monotonic()
            left = ends - started
            result = run_part(name, setting, left) if left > 0 else None
            if result is not None:
                found[name] = result
                print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        print("\n| measured | |\n|---|---|")
        for path, value in rows_of(found):
            print(f"| {path} | {value} |")
        print("\n| goal | limit | value | |\n|---|---|---|---|")
        rows = verdicts(found, setting.is_toy)
        for row in rows:
            print(f"| {' | '.join(row)} |", flush=True)
        if arguments.json:
            content = {"environment": about, "measured": found, "goals": rows}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The model card: README.md of `model/`, which makes that folder a complete repository of the Hugging Face Hub.

timm opens a repository by the config.json and model.safetensors at its top, so `model/` is the repository, not the whole run. The
card holds the scores of the ViT, which is in the repository, and for comparison those of the stack and the baselines, which are
not. All numbers come from the run's own records: metrics.json, receipts of the phases, attempts.

Source of the header: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

import importlib.resources
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

from emotion.files import read_json, write_text
from job.results.manifest import AttemptRecord, CodeRecord, PhaseRecord
from job.results.scores import DIMENSIONS, best_baseline
from job.spec.location import Generated
from job.spec.model import JobSpec, run_name

CARD = "model/README.md"
UNKNOWN_LICENSE = "unknown"  # the hub's name for it
METRICS = {"ccc": "CCC", "mae": "MAE", "rmse": "RMSE", "r2": "R²", "pearson": "Pearson's r"}
HUB_METRICS = {"ccc": "ccc", "mae": "mae", "rmse": "rmse", "r2": "r_squared", "pearson": "pearsonr"}  # the hub's names of ours
WEIGHTS = {"random": "from random weights", "pretrained": "from timm's pretrained weights"}


def write_card(run: Path, spec: JobSpec, phases: dict[str, PhaseRecord], attempts: list[AttemptRecord], code: CodeRecord) -> None:
    """Write README.md into `model/` of `run`, the folder to be published, which must have its metrics.json."""
    metrics, how = read_json(run / "metrics.json"), read_json(run / "model" / "preprocessing.json")
    training = read_json(run / "model" / "training.json")
    known = [attempt.duration_seconds for attempt in attempts if attempt.duration_seconds is not None]
    ceiling = {name: (metrics["ceiling"] or {}).get(name, {}).get("ccc") for name in DIMENSIONS}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701
    template = importlib.resources.files("job.results").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    card = environment.from_string(template).render(
        header=yaml.safe_dump(card_header(spec, metrics), sort_keys=False, allow_unicode=True, width=120),
        name=run_name(spec),
        model=spec.vit.model,
        depth=spec.vit.depth,
        weights=WEIGHTS.get(spec.vit.weights, "from given weights"),
        is_probe=training.get("is_linear_probe", False),
        songs=metrics["songs"],
        out_of_fold=metrics.get("out_of_fold", {}).get("scores_are_of"),
        dataset=dataset_name(spec),
        scale=metrics["scale"].partition(";")[0],
        image_size=how["image_size"],
        channels=how["channels"],
        metric_names=list(METRICS.values()),
        rows=_score_rows(metrics),
        compared=_beside_baselines(metrics),
        ceiling=" and ".join(f"{ccc:.2f} for {name}" for name, ccc in ceiling.items() if ccc is not None),
        crop_seconds=how["frames"] * how["mel"]["hop_samples"] / how["mel"]["sample_rate_hz"],
        is_unlicensed=spec.artifacts.license is None,
        phases=[[name, record.measured.get("seconds", ""), _device(record)] for name, record in phases.items()],
        known_seconds=sum(known),
        attempts=len(attempts),
        killed=len(attempts) - len(known),
        version=code.version,
        revision=code.revision,
    )
    write_text(run / CARD, card)


def card_header(spec: JobSpec, metrics: dict[str, Any]) -> dict[str, Any]:
    """The metadata of the card, as JSON. metrics: metrics.json. Scores that are undefined are left out."""
    name = dataset_name(spec)
    identifier = re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.") or "songs"
    scored = [
        {"type": hub_name, "value": round(scores[metric], 4), "name": _metric_name(scores, metric, dimension)}
        for dimension, scores in ((dimension, metrics["model"][dimension]) for dimension in DIMENSIONS)
        for metric, hub_name in HUB_METRICS.items()
        if scores[metric] is not None
    ]
    result = {
        "task": {"type": "audio-classification", "name": "valence and arousal of music"},
        "dataset": {"type": identifier, "name": name, "split": "folds" if "out_of_fold" in metrics else "test"},
        "metrics": scored,
    }
    return {
        "license": spec.artifacts.license or UNKNOWN_LICENSE,
        "library_name": "timm",
        "pipeline_tag": "audio-classification",
        "tags": ["timm", "music", "emotion", "valence", "arousal"],
        "datasets": [identifier],
        "metrics": list(HUB_METRICS.values()),
        **({"model-index": [{"name": run_name(spec), "results": [result]}]} if scored else {}),
    }


def dataset_name(spec: JobSpec) -> str:
    """The name of the folder or prefix that data.source names."""
    if isinstance(spec.source, Generated):
        return f"{spec.source.songs} generated songs"
    return spec.source.name or "songs"


def _metric_name(scores: dict[str, Any], metric: str, dimension: str) -> str:
    interval = scores[f"{metric}_ci"]
    return f"{METRICS[metric]} of {dimension}" + (f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else "")


def _score_rows(metrics: dict[str, Any]) -> list[list[str]]:
    predictors = {"**this model**": metrics["model"], "stack": metrics["stack"], **metrics["baselines"]}
    return [
        [f"{dimension}, {name}", *(_with_interval(scores[dimension], metric) for metric in METRICS)]
        for dimension in DIMENSIONS
        for name, scores in predictors.items()
    ]


def _beside_baselines(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """The CCC of the model and of the best baseline, so that a reader sees whether something simpler does better."""
    found = []
    for dimension in DIMENSIONS:
        own, best = metrics["model"][dimension], best_baseline(metrics, dimension)
        if best is not None and own["ccc"] is not None:
            name = best[0]
            baseline = _with_interval(metrics["baselines"][name][dimension], "ccc")
            found.append({"dimension": dimension, "best": name, "own": _with_interval(own, "ccc"), "baseline": baseline})
    return found


def _with_interval(scores: dict[str, Any], metric: str) -> str:
    value, interval = scores[metric], scores[f"{metric}_ci"]
    if value is None:
        return "undefined"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _device(record: PhaseRecord) -> str:
    device = record.measured.get("device")
    if not isinstance(device, dict):
        return "CPU"
    threads = device.get("threads")
    return str(device.get("gpu") or f"CPU, {threads} thread{'' if threads == 1 else 's'}")

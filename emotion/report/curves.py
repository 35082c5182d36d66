"""Charts of the trainings, from the lines of metrics.jsonl."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from emotion.evaluation.metrics import DIMENSIONS
from emotion.report.charts import Line, line_chart
from emotion.report.page import at
from emotion.training.progress import WITH, WITHOUT

Records = Sequence[dict[str, Any]]

STYLES = ("a", "b", "c", "d", "muted")


def gan_charts(records: Records) -> dict[str, Markup]:
    """Losses and accuracy of the discriminator over the steps."""
    found = [record for record in records if record["phase"] == "gan" and {"d_loss", "g_loss", "d_accuracy"} <= record.keys()]
    if not found:
        return {}
    steps = [record["step"] for record in found]
    losses = [Line("discriminator", steps, [record["d_loss"] for record in found], "a")]
    losses.append(Line("generator", steps, [record["g_loss"] for record in found], "b"))
    accuracy = [Line("share of pairs ranked correctly", steps, [record["d_accuracy"] for record in found], "c")]
    return {
        "gan loss": line_chart("Losses of the GAN", losses, x="step", y="loss"),
        "gan accuracy": line_chart(
            "Accuracy of the discriminator", accuracy, x="step", y="accuracy", y_range=(-0.03, 1.03), level=("chance", 0.5)
        ),
    }


def vit_charts(records: Records, training: Any) -> dict[str, Markup]:
    """Loss over the steps and CCC per epoch. training: content of model/training.json. Of two trainings, without and with
    synthetic clips, one is published; the other is drawn beside it."""
    published = _published_training(training)
    of_vit = [record for record in records if record["phase"] == "vit"]
    own = [record for record in of_vit if record.get("training") == published]
    losses, epochs = ([record for record in own if name in record] for name in ("loss", "epoch"))
    others = [record for record in of_vit if "epoch" in record and record.get("training") != published]
    charts = {}
    if losses:
        steps = [record["training_step" if "training_step" in record else "step"] for record in losses]
        line = Line("training loss", steps, [record["loss"] for record in losses], "a")
        charts["vit loss"] = line_chart("Loss of the ViT", [line], x="step", y="loss")
    if epochs:
        lines = [
            _over_epochs(dimension, epochs, f"validation_ccc_{dimension}", "ab"[i]) for i, dimension in enumerate(DIMENSIONS)
        ]
        if all("training_ccc" in record for record in epochs):
            lines.append(_over_epochs("training songs, mean of both", epochs, "training_ccc", "muted"))
        if others:
            lines.append(_over_epochs("mean of both", epochs, "validation_ccc", "d"))
            lines.append(_over_epochs(f"not published, {others[0]['training']}: mean of both", others, "validation_ccc", "c"))
        best = at(training, "best_epoch")
        mark = None if best is None else (f"published: epoch {best}", float(best))
        charts["vit ccc"] = line_chart("CCC of the ViT on validation songs", lines, x="epoch", y="CCC", mark=mark)
    return charts


def fold_chart(runs: Sequence[tuple[str, Records, Any]]) -> Markup | None:
    """CCC on validation songs per epoch, mean of both dimensions, of several runs: [(label, records, content of training.json)].
    None where none of them has any."""
    lines: list[Line] = []
    for label, records, training in runs:
        own = [
            record for record in records if record.get("training") == _published_training(training) and "validation_ccc" in record
        ]
        if own:
            lines.append(_over_epochs(label, own, "validation_ccc", STYLES[len(lines) % len(STYLES)]))
    return line_chart("CCC on validation songs", lines, x="epoch", y="CCC") if lines else None


def _published_training(training: Any) -> str | None:
    """Of two trainings, without and with synthetic clips, the one that is published; None where there was only one."""
    kept = at(training, "synthetic_clips", "kept")
    return None if kept is None else WITH if kept else WITHOUT


def _over_epochs(label: str, records: Records, name: str, style: str) -> Line:
    found = [record for record in records if name in record]
    return Line(label, [record["epoch"] for record in found], [record[name] for record in found], style)

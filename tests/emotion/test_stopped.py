"""Trainings that a budget ends before their last step."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emotion.audio.feature_store import Features
from emotion.data.leaks import write_seen
from emotion.errors import Interrupted
from emotion.files import read_json_lines
from emotion.training.context import TrainingContext
from emotion.training.stopped import Stop, read_stops, write_stops
from tests.emotion.trainings import (
    SMALL_GAN,
    SMALL_MEL,
    SMALL_VIT,
    context,
    never,
    partition,
    run_gan,
    run_vit,
    stop_at_question,
    write_songs,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Seven training songs: two steps an epoch.
GAN = SMALL_GAN.model_copy(update={"epochs": 4})
VIT = SMALL_VIT.model_copy(update={"epochs": 3, "synthetic_share": 0.5, "batch_size": 8})


def ended_at(out: Path, last: int, should_stop: Callable[[], bool] = never) -> TrainingContext:
    return replace(context(out, should_stop), is_used_up=lambda step: step >= last)


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_gan_that_is_ended_is_that_of_a_training_of_so_many_steps(real: Features, tmp_path: Path) -> None:
    songs = partition(real.only(range(6)))  # one step an epoch: the rates are constant, so equal steps are equal networks
    run_gan(songs, GAN.model_copy(update={"epochs": 2}), context(tmp_path / "short"))
    run_gan(songs, GAN, ended_at(tmp_path / "ended", 2))
    for name in ("generator.safetensors", "discriminator.safetensors", "config.json"):
        assert (tmp_path / "ended" / name).read_bytes() == (tmp_path / "short" / name).read_bytes()
    run_gan(songs, GAN, ended_at(tmp_path / "ended", 0))  # as after a kill before its receipt, when time is up from the start
    assert read_stops(tmp_path / "ended") == {"gan": Stop(2, 4)}
    assert read_stops(tmp_path / "short") == {}
    warnings = [json.loads(line).get("text", "") for line in (tmp_path / "ended" / "metrics.jsonl").read_text().splitlines()]
    assert any("stopped by budget.minutes after step 2 of at most 4" in text for text in warnings)


def test_a_gan_whose_budget_is_used_up_makes_one_step_and_killed_at_its_end_does_not_go_on(
    real: Features, tmp_path: Path
) -> None:
    songs = partition(real.only(range(6)))
    with pytest.raises(Interrupted):
        run_gan(songs, GAN, ended_at(tmp_path, 1, stop_at_question(1)))  # when its only step is done
    run_gan(songs, GAN, ended_at(tmp_path, 0))
    assert read_stops(tmp_path) == {"gan": Stop(1, 4)}


def test_a_vit_without_validation_songs_is_the_average_at_the_step_where_it_is_ended(
    real: Features, synthetic: Features, tmp_path: Path
) -> None:
    songs = partition(real.only(range(7)))
    run_vit(songs, synthetic, VIT, context(tmp_path / "one epoch"), stop_epoch=1)
    run_vit(songs, synthetic, VIT, ended_at(tmp_path / "ended", 2), stop_epoch=3)
    assert are_equal(weights_of(tmp_path / "one epoch"), weights_of(tmp_path / "ended"))
    assert summary_of(tmp_path / "ended")["stopped_by_budget"] == {"vit": {"step": 2, "steps": 6}}


def test_a_vit_ended_within_its_first_epoch_is_validated_there_and_interrupted_anywhere_is_the_same(
    real: Features, synthetic: Features, tmp_path: Path
) -> None:
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))
    asked: list[bool] = []
    run_vit(songs, synthetic, VIT, ended_at(tmp_path / "whole", 1, lambda: bool(asked.append(False))))
    found = summary_of(tmp_path / "whole")
    assert (found["best_epoch"], found["stopped_by_budget"]) == (1, {"vit": {"step": 1, "steps": 6}})
    run_vit(songs, synthetic, VIT, ended_at(tmp_path / "twice", 3))
    run_vit(songs, synthetic, VIT, ended_at(tmp_path / "twice", 0))
    assert summary_of(tmp_path / "twice")["stopped_by_budget"]["vit"]["step"] == 3
    for stop_at in range(1, len(asked) + 1):
        out = tmp_path / str(stop_at)
        with pytest.raises(Interrupted):
            run_vit(songs, synthetic, VIT, ended_at(out, 1, stop_at_question(stop_at)))
        run_vit(songs, synthetic, VIT, ended_at(out, 1))
        assert summary_of(out) == found
        assert are_equal(weights_of(out), weights_of(tmp_path / "whole"))


def test_a_vit_keeps_what_was_best_before_it_was_ended_and_says_what_ended_the_gan(real: Features, tmp_path: Path) -> None:
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))
    write_seen(tmp_path, {"file 0", "sound 0"})
    clips = write_songs(tmp_path, SMALL_MEL, 5, seed=1, synthetic=True)
    write_stops(tmp_path, {"gan": Stop(3, 9)})
    run_vit(songs, clips, VIT, context(tmp_path / "whole"))
    run_vit(songs, clips, VIT, ended_at(tmp_path / "ended", 5))
    whole, ended = (read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "ended"))
    scores = {record["epoch"]: record["validation_ccc"] for record in ended if "epoch" in record}
    assert {epoch: scores[epoch] for epoch in (1, 2)} == {r["epoch"]: r["validation_ccc"] for r in whole if r.get("epoch", 9) < 3}
    found = summary_of(tmp_path / "ended")
    assert found["validation_ccc"] == max(scores.values())
    assert found["stopped_by_budget"] == {"gan": {"step": 3, "steps": 9}, "vit": {"step": 5, "steps": 6}}


@pytest.mark.parametrize("last", [3, 9])  # in the training without synthetic clips, and in the one with them, from step 7 on
def test_where_two_trainings_cannot_be_compared_the_synthetic_clips_are_left_out(
    real: Features, synthetic: Features, tmp_path: Path, last: int
) -> None:
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))
    config = VIT.model_copy(update={"synthetic": "auto"})
    run_vit(songs, synthetic, config, ended_at(tmp_path / "both", last))
    found = summary_of(tmp_path / "both")
    assert found["synthetic_clips"]["kept"] is False
    assert "before they could be compared" in found["synthetic_clips"]["why"]
    assert found["stopped_by_budget"]["vit"] == {"step": last, "steps": 13}
    assert found["synthetic_per_batch"] == 0

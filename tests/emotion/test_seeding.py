import itertools

import numpy as np
import pytest
import torch

from emotion.training.seeding import batch_indices, crop_starts, derive, generator, seed_step, step_generator


def test_every_item_is_used_equally_often_and_no_partial_batch_is_lost() -> None:
    # 7 items in batches of 3: after 7 steps exactly 3 epochs have passed.
    drawn = np.concatenate([batch_indices(1, "gan", step, 3, 7) for step in range(7)])
    assert np.bincount(drawn, minlength=7).tolist() == [3] * 7


def test_each_epoch_is_a_permutation_also_where_a_batch_straddles_two() -> None:
    drawn = np.concatenate([batch_indices(1, "gan", step, 3, 7) for step in range(7)])
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert drawn[:7].tolist() != drawn[7:14].tolist()


def test_a_batch_larger_than_the_dataset_repeats_items() -> None:
    assert np.bincount(batch_indices(0, "vit", 0, 10, 5), minlength=5).tolist() == [2] * 5


def test_batches_are_the_shuffled_epochs_cut_one_after_another() -> None:
    epochs = [np.random.Generator(np.random.PCG64(derive(5, "vit", "epoch", epoch))).permutation(7) for epoch in range(9)]
    drawn = np.concatenate(epochs).tolist()
    # Forwards, as a training goes, backwards, and with a batch that holds more than two epochs.
    for batch in (3, 20):
        steps = range(len(drawn) // batch)
        for step in itertools.chain(steps, reversed(steps)):
            assert batch_indices(5, "vit", step, batch, 7).tolist() == drawn[step * batch : (step + 1) * batch]


def test_an_epoch_is_shuffled_once_and_not_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(np.random.PCG64):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            made.append(seed)

    monkeypatch.setattr(np.random, "PCG64", Counted)
    # As a ViT draws: from two streams in turn, each over 5 epochs of 100 items.
    for step in range(50):
        batch_indices(11, "vit", step, 10, 100)
        batch_indices(11, "vit-synthetic", step, 10, 100)
    assert len(made) == len(set(made)) == 10


def test_what_is_done_to_a_batch_does_not_reach_the_next() -> None:
    before = batch_indices(2, "gan", 0, 3, 9).copy()
    batch_indices(2, "gan", 0, 3, 9)[:] = -1
    assert np.array_equal(batch_indices(2, "gan", 0, 3, 9), before)


def test_draws_depend_on_seed_phase_and_step_only() -> None:
    seed_step(3, "gan", 5)
    first = torch.rand(4)
    torch.rand(1000)
    again = torch.rand(4, generator=step_generator(3, "gan", 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(4, generator=step_generator(3, "gan", 6)))
    assert not torch.equal(first, torch.rand(4, generator=step_generator(3, "vit", 5)))


def test_names_do_not_run_together() -> None:
    assert derive(1, "a", 12) != derive(1, "a", 1, 2)


def test_crops_stay_inside_their_song() -> None:
    starts = np.array([crop_starts(0, "vit", step, [10, 5, 3], 4) for step in range(200)])
    assert starts[:, 0].min() == 0
    assert starts[:, 0].max() == 6
    assert starts[:, 1].max() == 1
    assert starts[:, 2].max() == 0


def test_generators_of_one_purpose_agree() -> None:
    assert generator(1, "x").random() == generator(1, "x").random()

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emotion.audio.clips import Normalisation
from emotion.audio.feature_store import Features
from emotion.compat import timm
from emotion.config import InitConfig, VitConfig
from emotion.data.leaks import TRAINED, read_seen
from emotion.errors import DataError, Interrupted, ModelError, SpecError
from emotion.training.context import COLD_START, WarmStart, read_warm_start
from emotion.vit.augment import blend, draw_keep, draw_mixup, mask
from emotion.vit.crops import predict_songs
from emotion.vit.layers import BatchNoise, install_noise, layer_numbers, lowest_learning, parameter_groups, unfreeze
from emotion.vit.network import Preprocessing, check_model, create_network, load_model, network_input, preprocessing_for
from emotion.vit.objective import batch_concordance
from tests.emotion.operators import Operators
from tests.emotion.trainings import CPU, SMALL_MEL, context, never, partition, run_vit, stop_at_question

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = SMALL_MEL
CONFIG = VitConfig(
    model="test_vit",
    weights="random",
    clip_seconds=1.1,
    epochs=2,
    batch_size=4,
    synthetic_share=0.25,
    learning_rate=1e-3,
    max_crops=2,
)
NORMALISATION = Normalisation(np.full(32, -30, np.float32), np.full(32, 10, np.float32))
LABEL_MEAN = np.array([0.1, -0.2], np.float32)


def changed(**values: object) -> VitConfig:
    return VitConfig.model_validate(CONFIG.model_dump() | values)


Train = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def train(real: Features, synthetic: Features) -> Train:
    def run(
        out: Path,
        config: VitConfig = CONFIG,
        should_stop: Callable[[], bool] = never,
        warm_start: WarmStart = COLD_START,
        training: Sequence[int] = range(7),
    ) -> dict[str, torch.Tensor]:
        songs = partition(real.only(training), real.only([7, 8, 9]))
        run_vit(songs, synthetic, config, context(out, should_stop), warm_start)
        return load_file(out / "model" / "model.safetensors")

    return run


@pytest.fixture(scope="module")
def trained(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted training."""
    out = tmp_path_factory.mktemp("trained")
    train(out)
    return out


def network_of(config: VitConfig = CONFIG) -> tuple[torch.nn.Module, Preprocessing]:
    preprocessing = preprocessing_for(config, MEL, NORMALISATION)
    return create_network(config, preprocessing, LABEL_MEAN, 0), preprocessing


# The network


def test_a_clip_is_cut_to_whole_patches() -> None:
    # 1.1 s are 35 frames; test_vit has patches of 16.
    assert preprocessing_for(CONFIG, MEL, NORMALISATION).input_size == (32, 32)
    assert preprocessing_for(changed(image_size=(64, 48)), MEL, NORMALISATION).input_size == (64, 48)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "vit_tinny"}, "knows no model"),
        ({"model": "resnet18"}, "not a vision transformer"),
        ({"clip_seconds": 0.2}, "shorter than one patch"),
        ({"image_size": (40, 48)}, "whole patches"),
        ({"model": "vit_tiny_r_s16_p8_224", "image_size": (112, 224)}, r"takes no input of 112 x 224\."),
        ({"weights": "vit_tiny_patch16_224.augreg_in21k"}, "not a weights tag"),
        ({"weights": "test_vit.nonsense"}, "nonsense"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_any_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_model(changed(**values), MEL)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_any_vit_of_timm_takes_one_channel_and_a_shape_of_its_own(model: str) -> None:
    config = changed(model=model, image_size=(28, 70) if "14" in model else (32, 80))
    network, preprocessing = network_of(config)
    assert network(network_input(torch.zeros(1, 1, 32, 70), preprocessing)).shape == (1, 2)
    assert layer_numbers(network)["head.bias"] == max(layer_numbers(network).values())


def test_rgb_at_224_repeats_the_clip() -> None:
    _, preprocessing = network_of(changed(image_size=(224, 224), channels=3))
    image = network_input(torch.randn(1, 1, 32, 35), preprocessing)
    assert image.shape == (1, 3, 224, 224)
    assert torch.equal(image[:, 0], image[:, 2])


def test_an_untrained_head_starts_at_the_mean_label() -> None:
    network, _ = network_of()
    assert np.allclose(network.get_classifier().bias.detach().numpy(), LABEL_MEAN)


def test_the_last_norm_learns_with_the_head() -> None:
    numbers = layer_numbers(network_of()[0])
    assert numbers["norm.weight"] == numbers["head.weight"] > numbers["blocks.5.attn.qkv.weight"] > 0
    assert numbers["patch_embed.proj.weight"] == 0


def test_learning_rates_fall_by_layer_and_norms_do_not_decay() -> None:
    network, _ = network_of()
    layers = layer_numbers(network)
    groups = parameter_groups(network, layers, changed(layer_decay=0.5, weight_decay=0.3))
    rate_of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = dict(network.named_parameters())
    assert len(rate_of) == len(named)
    assert rate_of[id(named["head.weight"])] == (1e-3, 0.3)
    assert rate_of[id(named["norm.weight"])] == (1e-3, 0.0)
    assert rate_of[id(named["blocks.4.mlp.fc1.weight"])][0] == 2 * rate_of[id(named["blocks.3.mlp.fc1.weight"])][0]
    assert rate_of[id(named["pos_embed"])][1] == 0.0
    # Each group is a call of its own in every step.
    assert len(parameter_groups(network, layers, changed(layer_decay=1.0))) == 2


def test_unfreezing_unfreezes() -> None:
    network, _ = network_of()
    layers = layer_numbers(network)
    config = changed(frozen_epochs=2, unfreeze_epochs=3)
    learning = []
    for epoch in (0, 1.9, 2, 3, 4, 4.99, 5, 30):
        unfreeze(network, layers, lowest_learning(layers, config, epoch))
        learning.append({layers[name] for name, p in network.named_parameters() if p.requires_grad})
    top = max(layers.values())
    assert learning[0] == learning[1] == {top}
    assert learning[2] == {top, top - 1}
    assert all(earlier <= later for earlier, later in pairwise(learning))
    assert learning[-1] == learning[-2] == set(range(top + 1))


# Weights


def test_a_published_model_can_be_the_weights_of_another(trained: Path) -> None:
    published = load_file(trained / "model" / "model.safetensors")
    network, _ = network_of(changed(weights=str(trained / "model")))
    assert torch.equal(network.state_dict()["blocks.0.attn.qkv.weight"], published["blocks.0.attn.qkv.weight"])
    assert torch.equal(network.state_dict()["head.weight"], published["head.weight"])


# Training


def test_a_training_interrupted_at_any_step_or_validated_batch_and_resumed_leaves_the_same_model(
    train: Train, trained: Path, tmp_path: Path
) -> None:
    def recorded(out: Path) -> list[tuple[int, int | None]]:
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [(record["step"], record.get("epoch")) for record in records]

    asked: list[bool] = []
    whole = train(tmp_path / "whole", should_stop=lambda: bool(asked.append(False)))
    assert [step for step, epoch in recorded(trained) if epoch is None] == list(range(1, 6))
    assert len(asked) > 5
    # Every fifth question; `make test-all` asks the others in the tiny job.
    for stop_at in range(0, len(asked), 5):
        out = tmp_path / str(stop_at)
        with pytest.raises(Interrupted):
            train(out, should_stop=stop_at_question(stop_at + 1))
        resumed = train(out)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), stop_at
        assert recorded(out) == recorded(trained), stop_at


def test_the_micro_batch_changes_neither_objective_nor_noise(train: Train, tmp_path: Path) -> None:
    config = changed(drop_path=0.3, head_dropout=0.3)
    whole = train(tmp_path / "whole", config)
    parts = train(tmp_path / "parts", config.model_copy(update={"micro_batch": 3}))
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], atol=1e-4), name


def test_training_stops_when_validation_stops_improving(train: Train, tmp_path: Path) -> None:
    # A learning rate of almost nothing: the first epoch stays the best.
    train(tmp_path, changed(epochs=50, patience_epochs=2, learning_rate=1e-12))
    summary = json.loads((tmp_path / "summary.json").read_text())
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] <= summary["steps_per_epoch"] * (summary["best_epoch"] + 2) < 50


def test_without_validation_songs_it_leaves_the_weights_of_the_epoch_that_it_is_told(
    train: Train, real: Features, synthetic: Features, tmp_path: Path
) -> None:
    config = changed(epochs=6, patience_epochs=1, learning_rate=3e-3)
    chosen = train(tmp_path / "validated", config)
    best = json.loads((tmp_path / "validated" / "summary.json").read_text())["best_epoch"]
    assert best < 5, "too late to tell its schedule from a shorter one"
    out, songs = tmp_path / "told", partition(real.only(range(7)))
    with pytest.raises(Interrupted):
        run_vit(songs, synthetic, config, context(out, stop_at_question(3)), stop_epoch=best)
    run_vit(songs, synthetic, config, context(out), stop_epoch=best)
    told = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(value, told[name]) for name, value in chosen.items())
    assert json.loads((out / "summary.json").read_text())["stop_epoch"] == best


def test_frozen_layers_keep_their_weights_and_thawed_ones_do_not(train: Train, tmp_path: Path) -> None:
    config = changed(frozen_epochs=2)
    start = network_of(config)[0].state_dict()
    trained = train(tmp_path, config)
    assert torch.equal(trained["blocks.5.mlp.fc1.weight"], start["blocks.5.mlp.fc1.weight"])
    assert not torch.equal(trained["head.weight"], start["head.weight"])
    assert not torch.equal(trained["norm.weight"], start["norm.weight"])


def test_plain_timm_opens_the_model_and_says_the_same(real: Features, trained: Path) -> None:
    plain = timm.create_model(f"local-dir:{trained / 'model'}", pretrained=True).eval()
    network, preprocessing = load_model(trained / "model", CPU)
    song = real.song(3)
    starts = [0, 80 - preprocessing.frames]
    crops = np.stack([song[start : start + preprocessing.frames] for start in starts])
    images = torch.from_numpy(preprocessing.normalisation.apply(crops)).transpose(1, 2).unsqueeze(1)
    with torch.no_grad():
        expected = plain(images).mean(dim=0).clamp(-1, 1).numpy()
    assert np.allclose(predict_songs(network, preprocessing, CPU, [song]), expected[None], atol=1e-6)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="published run"):
        load_model(tmp_path, CPU)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("norm.bias"), r"it lacks norm\.bias"),
        (lambda state: state.pop("head.bias"), r"it lacks head\.bias"),
        (lambda state: state.update(extra=torch.ones(1)), "it has, left over, extra"),
        (lambda state: state.update({"norm.bias": torch.ones(3)}), r"norm\.bias \[3\] for \[64\]"),
        (lambda state: state.update({"norm.bias": torch.full((64,), torch.nan)}), r"norm\.bias holds NaN"),
        (lambda state: state.update({"norm.bias": torch.ones(64, dtype=torch.int8)}), r"norm\.bias is int8"),
    ],
)
def test_a_published_model_whose_tensors_are_not_those_of_its_config_is_refused(
    trained: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained / "model", tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(DataError, match=words):
        load_model(folder, CPU)


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("config.json", ("architecture",), "resnet18"),
        ("config.json", ("num_classes",), 1000),
        ("config.json", ("pretrained_cfg",), None),
        ("config.json", ("model_args",), {"zzz": 1}),
        ("config.json", ("model_args",), {"img_size": [32, 64], "in_chans": 1}),
        ("preprocessing.json", ("channels",), 3),
        ("preprocessing.json", ("frames",), 48),
        ("preprocessing.json", ("image_size",), [32, 64]),
    ],
)
def test_a_published_model_whose_settings_contradict_each_other_is_refused(
    trained: Path, name: str, keys: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained / "model", tmp_path / "model"))
    settings = json.loads((folder / name).read_text())
    section = settings
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    (folder / name).write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"^model: [^\n]*$"):
        load_model(folder, CPU)


def test_batch_concordance_is_lins() -> None:
    predicted, actual = torch.tensor([[1.0], [2.0], [3.0], [6.0]]), torch.tensor([[2.0], [2.0], [4.0], [8.0]])
    # means 3 and 4, variances 3.5 and 6, covariance 4.5: 2 · 4.5 / (3.5 + 6 + 1).
    assert batch_concordance(predicted, actual).item() == pytest.approx(9 / 10.5, abs=1e-5)


# Augmentation


def test_a_sample_meets_the_same_noise_in_any_micro_batch() -> None:
    network, _ = network_of(changed(drop_path=0.5, head_dropout=0.5))
    noise = install_noise(network)
    network.train()
    x = torch.randn(6, 1, 32, 32)
    noise.draw(7, 6, CPU)
    noise.rows = slice(0, 6)
    whole = network(x)
    noise.rows = slice(4, 6)
    assert torch.allclose(network(x[4:]), whole[4:], atol=1e-5)
    noise.draw(8, 6, CPU)
    noise.rows = slice(0, 6)
    assert not torch.allclose(network(x), whole, atol=1e-3)


def test_the_first_forward_pass_of_a_process_meets_the_noise_that_later_ones_would() -> None:
    """A resumed training sees the layers for the first time at a later step."""
    x = torch.randn(6, 1, 32, 32)
    outputs = []
    for seeds in ([8], [5, 8], [5, 6, 8]):
        network, _ = network_of(changed(drop_path=0.5, head_dropout=0.5))
        noise = install_noise(network)
        network.train()
        for seed in seeds:
            noise.draw(seed, 6, CPU)
            # The first pass that meets the layers may be that of another micro-batch.
            for rows in (slice(0, 3) if seed % 2 else slice(3, 6), slice(0, 6)):
                noise.rows = rows
                output = network(x[rows])
        outputs.append(output)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_factors_are_those_of_one_sequence_of_numbers_layer_after_layer() -> None:
    noise = BatchNoise()
    tokens, features = torch.ones(3, 4, 2), torch.ones(3, 5)
    for seed in (4, 9):  # layer by layer in the first round, all at once in the second
        noise.draw(seed, 3, CPU)
        noise.rows = slice(0, 3)
        found = [
            noise.factors("path", 0.8, tokens, per_sample=True),
            noise.factors("dropout", 0.25, features, per_sample=False),
            noise.factors("last", 0.5, tokens.bfloat16(), per_sample=False),
        ]
        numbers = torch.rand(3 + 15 + 24, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found[0], torch.where(numbers[:3] < 0.8, 1.25, 0.0).view(3, 1, 1))
        assert torch.equal(found[1], torch.where(numbers[3:18] < 0.25, 4.0, 0.0).view(3, 5))
        assert torch.equal(found[2], torch.where(numbers[18:] < 0.5, 2.0, 0.0).view(3, 4, 2).bfloat16())


def test_the_noise_of_a_step_is_drawn_in_one_call_and_stays_where_it_is() -> None:
    """A forward pass draws and sends nothing, so a step on a GPU does not wait, and can be captured as a graph."""
    network, _ = network_of(changed(drop_path=0.5, head_dropout=0.5))
    noise = install_noise(network)
    network.train()
    noise.draw(0, 6, CPU)
    noise.rows = slice(0, 6)
    network(torch.randn(6, 1, 32, 32))
    noise.draw(1, 6, CPU)
    address = noise._factors.data_ptr()
    with Operators() as drawing:
        noise.draw(2, 6, CPU)
    with Operators() as passing:
        network(torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(3)))
    assert drawing.names.count("aten::rand") == 1
    assert drawing.names.count("aten::copy_") == 1
    assert "aten::rand" not in passing.names
    assert noise._factors.data_ptr() == address


def test_dropout_keeps_the_mean() -> None:
    noise = BatchNoise()
    noise.draw(1, 4000, CPU)
    noise.rows = slice(0, 4000)
    factors = noise.factors("head_drop", 0.5, torch.ones(4000, 2), per_sample=False)
    assert sorted(factors.unique().tolist()) == [0, 2]
    assert factors.mean().item() == pytest.approx(1, abs=0.05)


def test_mixup_blends_clips_and_labels_alike_and_prefers_near_labels() -> None:
    labels = torch.tensor([[-0.5, -0.5]] * 20 + [[0.5, 0.5]] * 20)
    clips = labels[:, :1, None, None].expand(-1, 1, 4, 4).clone()
    clips += torch.arange(40)[:, None, None, None] * 1e-6
    drawn = draw_mixup(labels.numpy(), changed(mixup_alpha=1.0, mixup_bandwidth=0.1), 0, 0)
    partners, shares = map(torch.from_numpy, drawn)
    mixed, mixed_labels = blend(clips, partners, shares), blend(labels, partners, shares)
    assert torch.allclose(mixed[:, 0, 0, 0], mixed_labels[:, 0], atol=1e-3)
    assert mixed_labels.abs().min() > 0.49  # a partner from the other mood would pull towards 0
    assert not torch.equal(mixed, clips)


def test_masks_blank_whole_bands_and_frames_and_no_more_than_allowed() -> None:
    config = changed(time_masks=1, mel_masks=1, mel_mask_bands=3)
    keep_mels, keep_frames = map(torch.from_numpy, draw_keep(50, (20, 30), config, 5, 0, 0))
    masked = mask(torch.ones(50, 1, 20, 30), keep_mels, keep_frames)
    blank_bands = (masked[:, 0] == 0).all(dim=2).sum(dim=1)
    blank_frames = (masked[:, 0] == 0).all(dim=1).sum(dim=1)
    assert blank_bands.max() == 3
    assert blank_frames.max() == 5
    expected = (20 - blank_bands) * (30 - blank_frames)
    assert torch.equal(masked.sum(dim=(1, 2, 3)).long(), expected)


# The guard against leaks


def test_a_test_song_or_a_validation_song_among_the_others_is_refused_by_its_content(
    real: Features, synthetic: Features, tmp_path: Path
) -> None:
    def train(training: list[int], validation: list[int], test: list[int]) -> None:
        songs = partition(real.only(training), real.only(validation), real.only(test))
        run_vit(songs, synthetic, CONFIG, context(tmp_path))

    with pytest.raises(ModelError, match=r"what the ViT learns from has seen .* ids: 2\."):
        train([0, 1, 2, 3], [2, 7], [9])
    with pytest.raises(ModelError, match=r"chosen by has seen .* ids: 7\."):
        train([0, 1, 2, 3], [6, 7], [7, 9])
    # The GAN behind the synthetic clips has seen song 0.
    with pytest.raises(ModelError, match=r"what the ViT learns from has seen .* ids: 0\."):
        train([1, 2, 3], [0, 7], [9])
    with pytest.raises(ModelError, match=r"has seen .* ids: 0\."):
        train([1, 2, 3], [6, 7], [0, 9])
    assert list(tmp_path.iterdir()) == []


def test_synthetic_clips_neither_validate_nor_test(real: Features, synthetic: Features, tmp_path: Path) -> None:
    training, validation = real.only(range(7)), real.only([7, 8, 9])
    for songs in ((training, synthetic), (training, validation, synthetic), (synthetic, validation)):
        with pytest.raises(ModelError, match="is no song: a synthetic clip has no file digests"):
            run_vit(partition(*songs), synthetic, CONFIG, context(tmp_path))


def test_a_model_comes_with_the_list_of_the_songs_it_has_seen(trained: Path) -> None:
    assert read_seen(trained / "model") == {f"{kind} {song}" for kind in ("file", "sound") for song in range(10)}


# Warm start


@pytest.fixture(scope="module")
def earlier(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on songs 0 to 3, and chosen by 7 to 9."""
    run = tmp_path_factory.mktemp("earlier")
    train(run, training=range(4))
    return run


@pytest.fixture(scope="module")
def warm_start(earlier: Path) -> WarmStart:
    return read_warm_start("vit", InitConfig(run=str(earlier)))


def test_with_a_learning_rate_of_almost_0_the_earlier_model_stays_with_its_head_and_normalisation(
    train: Train, real: Features, earlier: Path, warm_start: WarmStart, tmp_path: Path
) -> None:
    train(tmp_path, changed(learning_rate=1e-12), warm_start=warm_start, training=[4, 5, 6])
    before, after = (load_model(folder / "model", CPU) for folder in (earlier, tmp_path))
    songs = [real.stored(song) for song in range(10)]
    assert np.allclose(predict_songs(*after, CPU, songs), predict_songs(*before, CPU, songs), atol=1e-6)
    assert after[1].normalisation.to_json() == before[1].normalisation.to_json()


def test_another_length_of_crops_has_its_position_embeddings_resampled(
    train: Train, earlier: Path, warm_start: WarmStart, tmp_path: Path
) -> None:
    before = load_file(earlier / "model" / "model.safetensors")
    # 2.2 s are 69 frames, cut to 4 patches.
    after = train(tmp_path / "warm", changed(learning_rate=1e-12, clip_seconds=2.2), warm_start=warm_start)
    assert before["pos_embed"].shape[1] == 1 + 2 * 2
    assert after["pos_embed"].shape[1] == 1 + 2 * 4
    assert torch.allclose(before["head.bias"], after["head.bias"], atol=1e-7)


def test_weights_of_a_warm_start_that_no_epoch_improves_stay_the_model_with_a_warning(
    train: Train, earlier: Path, warm_start: WarmStart, tmp_path: Path
) -> None:
    before = load_file(earlier / "model" / "model.safetensors")
    # So fast that the first step destroys what was learnt.
    after = train(tmp_path / "warm", changed(learning_rate=0.3, warmup_fraction=0.0), warm_start=warm_start)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert json.loads((tmp_path / "warm" / "summary.json").read_text())["best_epoch"] == 0
    assert "no epoch is better" in (tmp_path / "warm" / "metrics.jsonl").read_text()


@pytest.mark.full
def test_a_warm_start_interrupted_anywhere_and_resumed_leaves_the_same_model(
    train: Train, earlier: Path, warm_start: WarmStart, tmp_path: Path
) -> None:
    asked: list[bool] = []
    whole = train(tmp_path / "whole", should_stop=lambda: bool(asked.append(False)), warm_start=warm_start)
    # In the validation of the weights it starts from, after steps, and in later validations.
    for stop_at in (0, 2, *range(5, len(asked), 6)):
        out = tmp_path / str(stop_at)
        with pytest.raises(Interrupted):
            train(out, should_stop=stop_at_question(stop_at + 1), warm_start=warm_start)
        resumed = train(out, warm_start=warm_start)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), stop_at
        assert (out / "summary.json").read_bytes() == (tmp_path / "whole" / "summary.json").read_bytes()


def test_a_model_lists_its_training_songs_apart_from_those_that_chose_it_also_of_earlier_runs(
    real: Features, synthetic: Features, earlier: Path, warm_start: WarmStart, tmp_path: Path
) -> None:
    def known(songs: Sequence[int]) -> set[str]:
        return {f"{kind} {song}" for kind in ("file", "sound") for song in songs}

    assert read_seen(earlier / "model", TRAINED) == known(range(4))

    def train(validation: list[int], test: list[int]) -> None:
        songs = partition(real.only([5, 6]), real.only(validation), real.only(test))
        run_vit(songs, synthetic, CONFIG, context(tmp_path / "warm"), warm_start)

    with pytest.raises(ModelError, match=r"learns from has seen .* ids: 3\."):
        train([3, 7], [4])
    with pytest.raises(ModelError, match=r"chosen by has seen .* ids: 9\."):
        train([7, 8], [4, 9])
    train([7, 8], [4])
    assert read_seen(tmp_path / "warm" / "model", TRAINED) == known([0, 1, 2, 3, 5, 6])
    assert read_seen(tmp_path / "warm" / "model") == known([0, 1, 2, 3, 5, 6, 7, 8, 9])

"""What the stack gets of a pretrained ViT: embeddings by its lower blocks, as they were before training."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from emotion.audio.feature_store import Features
from emotion.compat import timm
from emotion.config import VitConfig
from emotion.data.leaks import read_seen
from emotion.errors import DataError, ModelError
from emotion.evaluation.metrics import concordance
from emotion.evaluation.stack import fit_stack, read_stack, stack_vectors
from emotion.files import read_json_lines
from emotion.training.context import WarmStart
from emotion.vit.embedder import EMBEDDER, LowerHalf, SongEmbedder, kept_blocks, lower_half_of, read_embedder
from emotion.vit.network import create_network, identity_normalisation, preprocessing_for
from tests.emotion.trainings import CPU, SMALL_MEL, SMALL_VIT, context, never, partition, pretrained_vit, run_vit, write_songs

pytestmark = pytest.mark.usefixtures("one_thread")
IDENTITY = identity_normalisation(SMALL_MEL)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VitConfig:
    return pretrained_vit(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def model(real: Features, synthetic: Features, config: VitConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    run_vit(partition(real.only(range(7)), real.only([7, 8, 9])), synthetic, config, context(out))
    return out / "model"


@pytest.mark.parametrize(("depth", "kept"), [(None, 3), (5, 3), (3, 3), (2, 2)])
def test_of_a_model_with_fewer_blocks_half_of_the_whole_are_kept(config: VitConfig, depth: int | None, kept: int) -> None:
    shallow = config.model_copy(update={"depth": depth})
    network = create_network(shallow, preprocessing_for(shallow, SMALL_MEL, IDENTITY), np.zeros(2, np.float32), 0)
    assert kept_blocks(network) == kept


def untrained(config: VitConfig, model: Path) -> torch.nn.Module:
    preprocessing = SongEmbedder(model, CPU).preprocessing
    return create_network(config, preprocessing, np.zeros(2, np.float32), 0).eval()


def test_the_embedding_is_the_mean_of_the_patches_after_half_of_the_pretrained_blocks(config: VitConfig, model: Path) -> None:
    network = untrained(config, model)
    clips = torch.randn(3, 1, *SongEmbedder(model, CPU).preprocessing.input_size)
    half = len(network.blocks) // 2
    after: list[torch.Tensor] = []
    network.blocks[half - 1].register_forward_hook(lambda _module, _inputs, output: after.append(output))
    with torch.no_grad():
        network(clips)
        expected = network.norm(after[0])[:, 1:].mean(dim=1)  # without the class token
        found = SongEmbedder(model, CPU).lower_half(clips)
    assert torch.allclose(found, expected, atol=2e-3)  # stored in float16


def test_it_is_of_the_weights_before_training_and_the_vit_of_those_after(
    real: Features, synthetic: Features, config: VitConfig, tmp_path: Path
) -> None:
    songs = partition(real.only(range(7)), real.only([]))
    run_vit(songs, synthetic, config, context(tmp_path), stop_epoch=2)  # without validation the last weights are kept
    name, model = "blocks.0.attn.qkv.weight", tmp_path / "model"
    before = untrained(config, model).state_dict()[name].half().float()
    trained = timm.create_model(f"local-dir:{model}", pretrained=True).state_dict()[name].half().float()
    embedder = SongEmbedder(model, CPU).lower_half.network.state_dict()[name]
    assert torch.equal(embedder, before)
    assert not torch.equal(embedder, trained)


def test_a_song_gets_the_same_bytes_whatever_songs_are_beside_it(real: Features, model: Path) -> None:
    embed = SongEmbedder(model, CPU)
    songs = [real.stored(song) for song in range(6)]
    together = embed(songs)
    assert together.shape == (6, 64)
    assert all(np.array_equal(embed([song])[0], row) for song, row in zip(songs, together, strict=True))


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_reg4_dinov2", "vit_relpos_small_patch16_224", "eva02_tiny_patch14_224", "convit_tiny"]
)
def test_networks_with_and_without_class_and_register_tokens_are_cut(name: str) -> None:
    network = timm.create_model(name, pretrained=False, num_classes=2).eval()
    blocks, width = len(network.blocks), network.num_features
    weights = lower_half_of(network)
    lower = LowerHalf(network)
    assert len(network.blocks) == blocks // 2
    assert weights.keys() == network.state_dict().keys()
    with torch.no_grad():
        assert lower(torch.zeros(1, *network.pretrained_cfg["input_size"])).shape == (1, width)


def test_random_weights_have_no_embedder(real: Features, synthetic: Features, tmp_path: Path) -> None:
    config = SMALL_VIT.model_copy(update={"epochs": 1, "synthetic_share": 0.0})
    run_vit(partition(real.only(range(7)), real.only([7, 8, 9])), synthetic, config, context(tmp_path))
    assert read_embedder(tmp_path / "model", CPU) is None


def test_a_warm_start_keeps_the_embedder_unless_its_clips_have_another_length(
    real: Features, synthetic: Features, config: VitConfig, model: Path, tmp_path: Path
) -> None:
    songs, warm_start = partition(real.only(range(7)), real.only([7, 8, 9])), WarmStart(weights=model)
    run_vit(songs, synthetic, config, context(tmp_path / "same"), warm_start)
    assert (tmp_path / "same" / "model" / EMBEDDER).read_bytes() == (model / EMBEDDER).read_bytes()
    shorter = config.model_copy(update={"clip_seconds": config.clip_seconds / 2})
    run_vit(songs, synthetic, shorter, context(tmp_path / "shorter"), warm_start)
    assert read_embedder(tmp_path / "shorter" / "model", CPU) is None
    warnings = [record.get("text", "") for record in read_json_lines(tmp_path / "shorter" / "metrics.jsonl")]
    assert any("the embedder of init_from is for inputs of" in text for text in warnings)


def test_a_published_model_as_weights_may_have_seen_no_test_song_and_gives_no_embedder(
    real: Features, synthetic: Features, config: VitConfig, model: Path, tmp_path: Path
) -> None:
    trained = config.model_copy(update={"weights": str(model), "epochs": 1})
    others = write_songs(tmp_path / "others", SMALL_MEL, 4, seed=9, first=50)
    run_vit(partition(real.only(range(7)), real.only([7, 8, 9]), others), synthetic, trained, context(tmp_path / "other songs"))
    assert read_embedder(tmp_path / "other songs" / "model", CPU) is None
    assert read_seen(model) <= read_seen(tmp_path / "other songs" / "model")
    with pytest.raises(ModelError, match=r"the model that vit\.weights names has seen held-out songs.*: 8"):
        run_vit(
            partition(real.only(range(7)), real.only([9]), real.only([8])), synthetic, trained, context(tmp_path / "test song")
        )
    with pytest.raises(ModelError, match=r"the model that vit\.weights names has seen held-out songs.*: 6"):
        run_vit(partition(real.only(range(6)), real.only([6]), others), synthetic, trained, context(tmp_path / "validation"))


def test_the_regressors_learn_what_only_the_embedding_knows_and_refuse_songs_without_it(tmp_path: Path) -> None:
    # In these log-mels only arousal can be heard. The embedding has both labels, behind a rotation, among other noise.
    features = write_songs(tmp_path / "features", SMALL_MEL, 90, seed=5)
    labels = features.labels.astype(np.float64)
    mixing = np.random.default_rng(6).normal(size=(2, 5))

    def embed(songs: list[np.ndarray], _check_stop: object) -> np.ndarray:
        known = {features.stored(song).tobytes(): song for song in range(90)}
        chosen = [known[song.tobytes()] for song in songs]
        noise = np.random.default_rng(7).normal(size=(90, 5))
        return (labels @ mixing + 0.05 * noise)[chosen]

    songs = partition(features.only(range(50)), features.only(range(50, 70)))
    test = features.only(range(70, 90))
    valence = {}
    for name, given in (("with", embed), ("without", None)):
        fit_stack(
            songs,
            predict=lambda chosen, _: np.zeros((len(chosen), 2)),
            embed=given,
            seed=0,
            threads=1,
            out=tmp_path / name,
            should_stop=never,
        )
        vectors = stack_vectors(test, given, threads=1, check_stop=lambda: None)
        predicted = read_stack(tmp_path / name / "stack").predict(vectors, np.zeros((20, 2)))
        valence[name] = concordance(predicted[:, 0], test.labels[:, 0].astype(np.float64))
    assert valence["with"] > 0.7
    assert abs(valence["without"]) < 0.4
    plain = stack_vectors(test, None, threads=1, check_stop=lambda: None)
    with pytest.raises(DataError, match=r"fitted to \d+ numbers for a song, found \d+\. .*lacks embedder\.safetensors"):
        read_stack(tmp_path / "with" / "stack").predict(plain, np.zeros((20, 2)))


def test_a_damaged_embedder_is_a_fault_of_the_run(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / EMBEDDER).write_bytes((folder / EMBEDDER).read_bytes()[:-9])
    with pytest.raises(DataError, match=r"embedder\.safetensors"):
        read_embedder(folder, CPU)

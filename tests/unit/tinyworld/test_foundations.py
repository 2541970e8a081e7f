from pathlib import Path

import pytest
import torch

from minigpt4.backbone import load_backbone
from minigpt4.config import BackboneConfig, LanguageModelConfig
from minigpt4.errors import InputError
from minigpt4.language_model import load_tokenizer
from minigpt5.config import PROJECT_ROOT, DiffusionConfig, Stage, load_config
from minigpt5.diffusion import load_clip_tokenizer, load_diffusion
from minigpt5.metrics.local import load_compact_clip, load_feature_network
from minigpt5.model import build_model
from minigpt5.tinyworld.__main__ import main
from minigpt5.tinyworld.foundations import (
    CLIP_TOKEN_ROWS,
    FID_FEATURES,
    INCEPTION_CLASSES,
    QFORMER,
    VISION,
    build_foundations,
    save_foundations,
)
from minigpt5.tinyworld.scenes import seeded
from minigpt5.tinyworld.tokenizers import prompt_texts, train_clip_tokenizer, train_language_tokenizer, world_texts
from minigpt5.vokens import VokenIds

COMMITTED = PROJECT_ROOT / "minigpt5" / "tinyworld" / "weights"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models with random weights and the folder they were saved in."""
    folder = tmp_path_factory.mktemp("weights")
    train_language_tokenizer(folder / "llama", seed=0)
    clip_tokens = train_clip_tokenizer(folder / "sd" / "tokenizer", seed=0)
    models = build_foundations(len(load_tokenizer(folder / "llama")), clip_tokens, seed=1)
    save_foundations(models, folder)
    return models, folder


def backbone_config(folder: Path) -> BackboneConfig:
    return BackboneConfig(
        vision={**vars(VISION), "weights": str(folder / "eva_vit.pth")},
        qformer={**vars(QFORMER), "weights": str(folder / "blip2_qformer.pth")},
        projection_weights=str(folder / "minigpt4.pth"),
        language_model=LanguageModelConfig(weights=str(folder / "llama")),
    )


@pytest.mark.parametrize(
    "name", ["eva_vit.pth", "llama/pytorch_model.bin", "sd/vae/x.safetensors", "pretraining/vae.json"]
)
def test_models_are_not_written_over_others(tmp_path, name):
    kept = tmp_path / name
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(b"trained")
    with pytest.raises(InputError, match=f"--out .*: holds {name} already; give another or remove it"):
        main(["init", "--out", str(tmp_path)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    assert kept.read_bytes() == b"trained"


@torch.no_grad()
def test_saved_picture_encoder_loads_and_computes_the_same(saved):
    models, folder = saved
    loaded = load_backbone(backbone_config(folder)).model
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = models.projection(models.qformer.eval()(models.vision.eval()(pixels)))
    assert expected.shape == (2, QFORMER.num_queries, 128)
    torch.testing.assert_close(loaded.encode_images(pixels), expected, atol=5e-3, rtol=1e-2)


@torch.no_grad()
def test_saved_language_model_loads_and_computes_the_same(saved):
    models, folder = saved
    loaded = load_backbone(backbone_config(folder)).model.language_model
    ids = torch.arange(3, 40)[None]
    expected = models.language_model.eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected, atol=5e-3, rtol=1e-2)


def test_files_hold_the_extras_of_the_real_ones(saved):
    _, folder = saved
    eva = torch.load(folder / "eva_vit.pth", weights_only=True)
    assert "blocks.4.attn.qkv.weight" in eva
    assert "head.weight" in eva
    assert {tensor.dtype for tensor in eva.values()} == {torch.float16}
    qformer = torch.load(folder / "blip2_qformer.pth", weights_only=True)["model"]
    assert "ln_vision.weight" in qformer
    assert "Qformer.bert.encoder.layer.0.crossattention.self.key.weight" in qformer
    assert "Qformer.bert.encoder.layer.1.crossattention.self.key.weight" not in qformer


@torch.no_grad()
def test_saved_diffusion_folder_loads_and_computes_the_same(saved):
    models, folder = saved
    loaded, _ = load_diffusion(DiffusionConfig(weights=str(folder / "sd"), image_size=64))
    condition = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([10])
    expected = models.unet.eval()(latents, steps, condition).sample
    torch.testing.assert_close(loaded.unet(latents, steps, condition).sample, expected, atol=1e-2, rtol=1e-2)
    assert loaded.encode_captions(["a red star ."]).shape == (1, 77, 64)
    assert loaded.encode_pixels(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 8, 8)
    assert loaded.scheduler.config.steps_offset == 1


@torch.no_grad()
def test_scoring_networks_load(saved):
    models, folder = saved
    clip, transform, tokenizer = load_compact_clip(folder / "clip")
    tokens = tokenizer(["a red star on the snow"])
    expected = models.clip.eval().encode_text(tokens)
    torch.testing.assert_close(clip.encode_text(tokens), expected, atol=5e-3, rtol=1e-2)
    assert load_feature_network(folder / "features" / "fid_features.safetensors", "x").num_features == FID_FEATURES
    inception = load_feature_network(folder / "features" / "is_features.safetensors", "x")
    assert inception.num_features == INCEPTION_CLASSES


def test_no_two_tokens_of_the_world_share_a_row_of_the_scoring_clip(saved):
    _, folder = saved
    tokenizer = load_compact_clip(folder / "clip")[2]
    used = {token for text in world_texts(0, records=300) for token in tokenizer.encode(text)}
    assert len(used) > 100
    assert len({token % CLIP_TOKEN_ROWS for token in used}) == len(used)


def test_building_is_seeded_and_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    first = build_foundations(300, 520, seed=3)
    drawn = torch.rand(1)
    second = build_foundations(300, 520, seed=3)
    other = build_foundations(300, 520, seed=4)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    weight = "conv_in.weight"
    assert torch.equal(first.unet.state_dict()[weight], second.unet.state_dict()[weight])
    assert not torch.equal(first.unet.state_dict()[weight], other.unet.state_dict()[weight])


@pytest.mark.parametrize("folder", [COMMITTED, None], ids=["committed", "fresh"])
def test_language_tokenizer_keeps_each_word_of_the_world_one_token(saved, folder):
    tokenizer = load_tokenizer((folder or saved[1]) / "llama")
    words = {word for text in world_texts(0, records=300) for word in text.split()}
    assert len(words) > 100
    assert [word for word in sorted(words) if len(tokenizer.encode(word)) > 1] == []
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.max_length == 1024


def test_language_tokenizer_reads_back_prompts_and_any_other_text():
    tokenizer = load_tokenizer(COMMITTED / "llama")
    texts = [*prompt_texts(seeded(0, "train")), "Ein Bär, 2 Bären!\nnew  line 日本"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) < 120
    assert tokenizer.encode("a star ###")[-1] == tokenizer.encode("###Human:")[0]
    ids = VokenIds.install(tokenizer, 8)
    assert ids.first == tokenizer.base_size


def test_diffusion_tokenizer_pads_and_cuts_as_the_real_one():
    tokenizer = load_clip_tokenizer(COMMITTED / "sd" / "tokenizer")
    encoded = tokenizer.encode_padded(["A small red star , on the grass .", "star " * 100])["input_ids"]
    assert encoded.shape == (2, 77)
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    assert encoded[:, 0].tolist() == [start, start]
    first = encoded[0].tolist()
    assert first.index(end) == 10
    assert set(first[11:]) == {0}
    assert encoded[1, -1] == end


def test_committed_weights_make_the_tiny_presets_model():
    config = load_config(PROJECT_ROOT / "config" / "tiny.yaml", {}, {})
    model = build_model(config.model, config.loss, Stage.MULTIMODAL)
    assert all(report.loaded for report in model.reports)
    files = [path for path in COMMITTED.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 25_000_000


@pytest.mark.parametrize("name", ["stage1_cc3m", "stage2_vist", "stage2_mmdialog"])
def test_vokens_of_the_committed_checkpoints_stay_among_the_words(name):
    """Farther out, where too high a rate takes them, their states differ between a caption and a dialogue."""
    config = load_config(PROJECT_ROOT / "config" / "tiny.yaml", {}, {})
    model = build_model(config.model, config.loss, Stage.ALIGNMENT)
    words_VH = model.backbone.embedding_VH.detach()
    state = torch.load(COMMITTED / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
    distances = (state["rows.embedding"] - words_VH.mean(dim=0)).norm(dim=1)
    assert distances.max() < 1.2 * words_VH.norm(dim=1).mean()

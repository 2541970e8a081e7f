"""The paper's preset builds from its values alone, without weights or memory."""

import pytest
import torch

from minigpt5.config import PROJECT_ROOT, Stage, load_config
from minigpt5.model import MiniGPT5, build_random


def build(name: str, stage: Stage) -> MiniGPT5:
    config = load_config(PROJECT_ROOT / "config" / name, {}, {})
    with torch.device("meta"):
        return build_random(config.model, config.loss, stage)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def paper() -> MiniGPT5:
    return build("minigpt5_7b.yaml", Stage.ALIGNMENT)


def test_backbone_has_the_published_sizes(paper):
    vision = paper.backbone.vision.model
    assert len(vision.encoder.layers) == 39
    assert vision.embeddings.position_embedding.shape == (1, 257, 1408)
    assert count(paper.backbone.vision) == 985_952_256
    assert len(paper.backbone.qformer.model.encoder.layer) == 12
    assert paper.backbone.qformer.query_tokens.shape == (1, 32, 768)
    assert paper.backbone.projection.weight.shape == (4096, 768)
    llama = paper.backbone.language_model
    assert len(llama.model.layers) == 32
    assert count(llama) == 6_738_415_616
    assert llama.model.embed_tokens.weight.shape == (32000, 4096)


def test_mapper_has_122_9_million_parameters(paper):
    assert round(count(paper.mapper) / 1e6, 1) == 122.9
    assert paper.mapper.queries.shape == (1, 77, 1024)
    assert paper.rows.embedding.shape == paper.rows.head.shape == (9, 4096)


def test_diffusion_is_stable_diffusion_2_1_base(paper):
    assert count(paper.diffusion.unet) == 865_910_724
    assert count(paper.diffusion.vae) == 83_653_863
    assert count(paper.diffusion.text_encoder) == 340_387_840
    assert paper.diffusion.vae_factor == 8


def test_stage_1_trains_rows_and_mapper(paper):
    names = {name.split(".")[0] for name, value in paper.named_parameters() if value.requires_grad}
    assert names == {"rows", "mapper"}


def test_stage_2_trains_rows_lora_and_the_mappers_transformer():
    model = build("stage2_vist.yaml", Stage.MULTIMODAL)
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    lora = [name for name in trainable if "lora_" in name]
    assert len(lora) == 32 * 2 * 2
    assert {name.rsplit(".", 4)[1] for name in lora} == {"q_proj", "v_proj"}
    rest = {".".join(name.split(".")[:2]) for name in trainable if "lora_" not in name}
    assert rest == {"rows.embedding", "rows.head", "mapper.transformer"}


@pytest.mark.parametrize("name", ["stage1_cc3m.yaml", "stage2_vist.yaml", "stage2_mmdialog.yaml", "tiny.yaml"])
def test_every_preset_is_valid(name):
    config = load_config(PROJECT_ROOT / "config" / name, {}, {})
    assert config.model.vokens.count == 8


def test_tiny_and_paper_presets_differ_in_values_only():
    tiny, paper = build("tiny.yaml", Stage.ALIGNMENT), build("minigpt5_7b.yaml", Stage.ALIGNMENT)

    def kinds(model: MiniGPT5) -> set[str]:
        return {type(module).__name__ for module in model.modules()}

    assert kinds(tiny.backbone) == kinds(paper.backbone)
    assert kinds(tiny.mapper) == kinds(paper.mapper)

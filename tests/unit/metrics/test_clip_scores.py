import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from minigpt4.errors import InputError
from minigpt5.metrics.clip import load_clip, resolve_name
from minigpt5.metrics.local import save_compact_clip
from tests.unit.metrics.small_store import MODELS, picture

CPU = torch.device("cpu")
CONFIG = json.loads((MODELS / "clip_tiny" / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "pretrained", "resolved"),
    [
        ("ViT-L-14", "openai", "ViT-L-14-quickgelu"),
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B-32", "laion2b_s34b_b79k", "ViT-B-32"),
    ],
)
def test_openai_weights_get_their_activation(name, pretrained, resolved):
    assert resolve_name(name, pretrained) == resolved


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.clip_model: 'ViT-Z'"):
        load_clip("ViT-Z", "openai", CPU)
    with pytest.raises(InputError, match=r"metrics\.clip_pretrained: 'nobody'.*openai"):
        load_clip("ViT-B-32", "nobody", CPU)
    with pytest.raises(InputError, match=r"open_clip_config\.json"):
        load_clip(str(tmp_path), "openai", CPU)


def test_batches_equal_single_items():
    clip = load_clip(str(MODELS / "clip_tiny"), "openai", CPU)
    pictures = [picture(1), picture(2, (80, 40)), picture(3)]
    together = clip.pictures.encode(pictures)
    for one, row in zip(pictures, together, strict=True):
        torch.testing.assert_close(clip.pictures.encode([one])[0], row)
    texts = [f"text number {index}" for index in range(70)]
    rows = clip.texts.encode(texts)
    torch.testing.assert_close(clip.texts.encode(texts[-1:])[0], rows[-1])
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(70))
    assert clip.label.startswith("local ")


def test_compact_folder_round_trip(tmp_path):
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG["model_cfg"]).eval()
    with torch.no_grad():
        rows = torch.randn(13, 64)
        model.token_embedding.weight.copy_(rows[torch.arange(49408) % 13])
    save_compact_clip(tmp_path, model, CONFIG, token_rows=13)
    tokens = open_clip.SimpleTokenizer(context_length=77)(["a red dog"])
    expected = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
    ours = load_clip(str(tmp_path), "openai", CPU).texts.encode(["a red dog"])
    torch.testing.assert_close(ours, expected.detach())
    with pytest.raises(ValueError, match="period 12"):
        save_compact_clip(tmp_path, model, CONFIG, token_rows=12)


def test_open_clip_folder(tmp_path):
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG["model_cfg"]).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = load_clip(str(tmp_path), "openai", CPU)
    tokens = open_clip.SimpleTokenizer(context_length=77)(["a red dog"])
    expected = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(clip.texts.encode(["a red dog"]), expected.detach())


@pytest.mark.parametrize("broken", ["{", '{"model_cfg": {"embed_dim": 3}}', "{}"])
def test_broken_compact_folder_is_named(tmp_path, broken):
    (tmp_path / "config.json").write_text(broken, encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json"):
        load_clip(str(tmp_path), "openai", CPU)

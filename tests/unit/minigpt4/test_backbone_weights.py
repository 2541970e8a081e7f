"""Published weight files load whole or with an error that names file and keys."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from minigpt4.backbone import load_backbone
from minigpt4.config import BackboneConfig, LanguageModelConfig
from minigpt4.errors import InputError
from minigpt4.language_model import load_language_model
from minigpt4.vision import VisionEncoder, interpolate_positions, load_vision
from minigpt4.weights import read_state, read_state_as, resolve_source
from tests.parity.model import model_config

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "model"


@pytest.fixture
def config() -> BackboneConfig:
    dims = json.loads((FIXTURE / "config.json").read_text())["dims"]
    return model_config(FIXTURE, dims, 8).backbone


def with_vision(config: BackboneConfig, **changes) -> BackboneConfig:
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


def with_qformer(config: BackboneConfig, **changes) -> BackboneConfig:
    return dataclasses.replace(config, qformer=dataclasses.replace(config.qformer, **changes))


def with_llama(config: BackboneConfig, folder: Path, **architecture) -> BackboneConfig:
    language_model = LanguageModelConfig(weights=str(folder), architecture=architecture or None)
    return dataclasses.replace(config, language_model=language_model)


def copy_llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    shutil.copytree(FIXTURE / "llama", folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def test_every_file_is_reported(config):
    loaded = load_backbone(config)
    text = "\n".join(str(report) for report in loaded.reports)
    assert "eva_vit.pth: EVA-CLIP ViT (LAVIS): 40 tensors loaded, 12 expected extras ignored" in text
    assert "blip2_qformer.pth: BLIP-2 Q-Former (LAVIS)" in text
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    loaded.model.train()
    assert not any(module.training for module in loaded.model.modules())


def test_hugging_face_blip2_folder_gives_the_same_encoder(config, tmp_path):
    lavis = load_backbone(config).model
    folder = tmp_path / "blip2"
    folder.mkdir()
    state = {f"vision_model.{key}": value for key, value in lavis.vision.model.state_dict().items()}
    state |= {f"qformer.{key}": value for key, value in lavis.qformer.model.state_dict().items()}
    state |= {"query_tokens": lavis.qformer.query_tokens.data, "language_projection.weight": torch.zeros(2, 2)}
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    changed = with_qformer(with_vision(config, weights=str(folder)), weights=str(folder))
    hugging_face = load_backbone(changed).model
    pixels = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(hugging_face.encode_images(pixels), lavis.encode_images(pixels))


def test_lavis_vit_with_a_hugging_face_qformer_takes_ln_vision_from_the_folder(config, tmp_path):
    lavis = load_backbone(config).model
    state = {f"vision_model.{key}": value for key, value in lavis.vision.model.state_dict().items()}
    state |= {f"qformer.{key}": value for key, value in lavis.qformer.model.state_dict().items()}
    state |= {"query_tokens": lavis.qformer.query_tokens.data}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    mixed = load_backbone(with_qformer(config, weights=str(tmp_path))).model
    pixels = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(mixed.encode_images(pixels), lavis.encode_images(pixels))


def test_positions_are_interpolated_to_another_picture_size(config):
    larger = with_vision(config, image_size=84).vision
    encoder = VisionEncoder(larger)
    report = load_vision(encoder, larger, torch.float32)
    assert "positions interpolated to 6x6" in str(report)
    original = VisionEncoder(config.vision)
    load_vision(original, config.vision, torch.float32)
    # transformers' own interpolation is the independent witness
    independent = original.model.embeddings.interpolate_pos_encoding(torch.zeros(1, 37, 48), 84, 84)
    torch.testing.assert_close(encoder.model.embeddings.position_embedding, independent, rtol=1e-2, atol=1e-3)
    assert encoder(torch.randn(1, 3, 84, 84)).shape == (1, 37, 48)


def test_interpolation_keeps_the_class_token():
    positions = torch.randn(1, 17, 8)
    assert torch.equal(interpolate_positions(positions, 4), positions)
    assert torch.equal(interpolate_positions(positions, 7)[:, 0], positions[:, 0])


def test_part_without_weights_keeps_random_ones(config):
    model = load_backbone(dataclasses.replace(config, projection_weights=None)).model
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.encode_images(torch.randn(1, 3, 56, 56)).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: with_vision(c, weights=str(FIXTURE / "blip2_qformer.pth")), "does not fit as EVA-CLIP"),
        (lambda c: with_qformer(c, weights=str(FIXTURE / "eva_vit.pth")), "does not fit as BLIP-2 Q-Former"),
        (lambda c: with_vision(c, weights="./nowhere.pth"), "nowhere.pth: no such file"),
        (lambda c: with_vision(c, num_layers=2), r"keys unexpected: blocks\.3"),
        (lambda c: with_vision(c, num_layers=5), r"keys missing: encoder\.layers\.4"),
        (lambda c: with_vision(c, hidden_size=64, num_heads=4), "sizes differ"),
        (lambda c: with_qformer(c, num_queries=9), r"query_tokens: file \(1, 8, 32\), model \(1, 9, 32\)"),
        (
            lambda c: dataclasses.replace(c, projection_weights=str(FIXTURE / "eva_vit.pth")),
            "MiniGPT-4 projection",
        ),
        (lambda c: with_llama(c, FIXTURE / "sd"), "config.json"),
        (lambda c: with_llama(c, FIXTURE / "bert-base-uncased"), "model_type is 'bert'"),
        (lambda c: with_llama(c, FIXTURE / "llama", hidden_size=4096), "architecture.hidden_size is 4096"),
    ],
)
def test_wrong_files_are_named(config, change, message):
    with pytest.raises(InputError, match=message):
        load_backbone(change(config))


def write_llama(folder: Path, state: dict[str, torch.Tensor], name: str, shards: int) -> None:
    """Replace a folder's weights by ``state`` in files of the given name, with an index if there are several."""
    (folder / "model.safetensors").unlink()
    stem, suffix = name.split(".")
    keys, places = sorted(state), {}
    for number in range(shards):
        file = name if shards == 1 else f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        part = {key: state[key] for key in keys[number::shards]}
        places |= dict.fromkeys(part, file)
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


LAYOUTS = [(name, shards) for name in ("model.safetensors", "pytorch_model.bin") for shards in (1, 2)]


@pytest.mark.parametrize(("name", "shards"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float16_files_of_every_layout_are_converted_exactly(tmp_path, name, shards, dtype):
    folder = copy_llama(tmp_path)
    state = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
    write_llama(folder, state, name, shards)
    model, _, _ = load_language_model(LanguageModelConfig(weights=str(folder)), dtype)
    for key, value in model.state_dict().items():
        assert value.dtype is dtype
        assert torch.equal(value, state[key].to(dtype)), key
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2) / 16)  # RoFormer, section 3.2.2
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies)


def test_too_little_memory_on_the_gpu_is_no_damaged_file(tmp_path, monkeypatch):
    def fill_up(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 172.00 MiB.\nmore")

    monkeypatch.setattr("minigpt4.language_model._load_folder", fill_up)
    with pytest.raises(InputError, match="too little free memory .* --quantization 8bit or 4bit") as told:
        load_language_model(LanguageModelConfig(weights=str(copy_llama(tmp_path))), torch.float32)
    assert "cannot be loaded" not in str(told.value)


@pytest.mark.parametrize("is_zip", [True, False], ids=["mapped", "read into memory"])
def test_keys_of_one_storage_are_all_converted(tmp_path, is_zip):
    """A converted tensor's pages are given back, and the next key needs them again."""
    shared = torch.randn(300, 64).half()
    state = {"whole": shared, "again": shared, "part": shared[100:], "turned": shared.T, "number": torch.tensor(3)}
    torch.save(state, tmp_path / "shared.bin", _use_new_zipfile_serialization=is_zip)
    read = read_state_as(tmp_path / "shared.bin", torch.bfloat16)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key].bfloat16()) for key in state if key != "number")
    assert read["number"].dtype is torch.int64


@pytest.mark.parametrize(("name", "shards"), LAYOUTS[1:])
def test_every_layout_gives_the_same_model(config, tmp_path, name, shards):
    folder = copy_llama(tmp_path)
    write_llama(folder, load_file(folder / "model.safetensors"), name, shards)
    other = load_backbone(with_llama(config, folder)).model
    whole = load_backbone(config).model
    for key, value in whole.language_model.state_dict().items():
        assert torch.equal(value, other.language_model.state_dict()[key]), key


def test_incomplete_llama_folders_are_refused(config, tmp_path):
    folder = copy_llama(tmp_path)
    write_llama(folder, load_file(folder / "model.safetensors"), "pytorch_model.bin", 2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match=r"index\.json: names files that are not there: .*-00002-of-00002\.bin"):
        load_backbone(with_llama(config, folder))
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index\.json: expected the keys' files under weight_map"):
        load_backbone(with_llama(config, folder))
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        load_backbone(with_llama(config, folder))


def test_padding_row_beyond_the_tokenizer_is_not_used(config, tmp_path):
    folder = copy_llama(tmp_path)
    state = load_file(folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        state[key] = torch.cat([state[key], torch.full((1, 64), 7.0)])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 601}))
    loaded = load_backbone(with_llama(config, folder))
    assert len(loaded.tokenizer) == 600
    assert "rows from 600 on have no token" in str(loaded.reports[0])


def test_missing_parts_of_a_llama_folder_are_named(config, tmp_path):
    folder = copy_llama(tmp_path)
    state = load_file(folder / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"keys missing: model\.norm\.weight"):
        load_backbone(with_llama(config, folder))
    (folder / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.model: no SentencePiece model"):
        load_backbone(with_llama(config, folder))


def test_damaged_and_unsafe_files_are_refused(tmp_path):
    (tmp_path / "cut.pth").write_bytes((FIXTURE / "eva_vit.pth").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 50)
    torch.save({"weight": Path("/")}, tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for name in ("cut.pth", "cut.safetensors", "code.pth", "empty.pth"):
        with pytest.raises(InputError, match=name):
            read_state(tmp_path / name)


def test_unreachable_hub_id_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"some-org/some-model.*download it and give its folder"):
        resolve_source("some-org/some-model", "model.backbone.vision.weights")


HUB = {
    "old": ("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tokenizer.model"),
    "both": ("config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "x.ckpt"),
    "diffusion": (
        *("model_index.json", "v2-1_512-ema-pruned.safetensors", "v2-1_512-ema-pruned.ckpt"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "feature_extractor/preprocessor_config.json"),
    ),
}


@pytest.mark.parametrize(
    ("name", "parts", "wanted"),
    [
        ("old", None, set(HUB["old"])),
        ("both", None, {"config.json", "model.safetensors"}),
        (
            "diffusion",
            ["model_index.json", "unet/*"],
            {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"},
        ),
    ],
)
def test_of_a_hub_repository_only_what_is_read_is_fetched(name, parts, wanted, tmp_path, monkeypatch):
    """The hub's own filter decides; what it would download is made here instead."""

    def fetch(source, *, allow_patterns, ignore_patterns):
        for file in filter_repo_objects(HUB[name], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    folder = resolve_source(f"some-org/{name}", "model.diffusion.weights", parts)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == wanted


def add_tokens_file(folder: Path, added: dict[str, int], rows: int) -> None:
    (folder / "added_tokens.json").write_text(json.dumps(added))
    state = load_file(folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        state[key] = torch.cat([state[key], torch.zeros(rows, state[key].shape[1])])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 600 + rows}))


def test_a_padding_token_of_the_folder_keeps_its_id(config, tmp_path):
    folder = copy_llama(tmp_path)
    add_tokens_file(folder, {"<s>": 1, "[PAD]": 600}, 1)
    tokenizer = load_backbone(with_llama(config, folder)).tokenizer
    assert len(tokenizer) == 601
    assert 600 in tokenizer.encode("a [PAD] b")
    assert tokenizer.add_tokens(["[IMG0]"]) == [601]


def test_a_folder_that_already_has_vokens_is_refused(config, tmp_path):
    folder = copy_llama(tmp_path)
    add_tokens_file(folder, {"[IMG0]": 600, "<ImageHere>": 601}, 2)
    with pytest.raises(InputError, match=r"added_tokens\.json: already has \[IMG0\], <ImageHere>"):
        load_backbone(with_llama(config, folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_damaged_files_of_a_llama_folder_are_named(config, tmp_path, name):
    folder = copy_llama(tmp_path)
    (folder / name).write_bytes(b"\x10{ not json")
    with pytest.raises(InputError, match="llama"):
        load_backbone(with_llama(config, folder))


def test_wrong_shapes_of_a_llama_folder_are_named(config, tmp_path):
    folder = copy_llama(tmp_path)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"][:-1].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_backbone(with_llama(config, folder))


def test_values_that_are_no_numbers_are_refused(config, tmp_path):
    state = read_state(FIXTURE / "minigpt4.pth")
    state = {key: value.clone() for key, value in state.items()}
    state["llama_proj.bias"][3] = float("nan")
    torch.save({"model": state}, tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"nan\.pth: holds NaN or infinity in bias"):
        load_backbone(dataclasses.replace(config, projection_weights=str(tmp_path / "nan.pth")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_model_is_made_on_the_device_it_is_for(config, dtype):
    """The meta device stands for a GPU: what is made there can be told from what is not."""
    elsewhere = torch.device("meta")
    loaded = load_backbone(config, dtype, elsewhere)
    places = {name: tensor.device.type for name, tensor in loaded.model.named_parameters()}
    assert {place for name, place in places.items() if name.startswith("language_model.")} == {"meta"}
    assert {place for name, place in places.items() if not name.startswith("language_model.")} == {"cpu"}
    assert {tensor.dtype for tensor in loaded.model.language_model.parameters()} == {dtype}
    here = load_backbone(config, dtype)
    assert [str(report) for report in loaded.reports] == [str(report) for report in here.reports]
    for (name, made), expected in zip(loaded.model.named_parameters(), here.model.parameters(), strict=True):
        assert made.shape == expected.shape, name

"""Precomputed features: layout, manifest, damaged files, and the command that writes them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from data_helpers import make_cc3m
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from minigpt4.errors import InputError
from minigpt5.config import validate_config
from minigpt5.data.feature_cache import MANIFEST, FeatureFolder, load_feature, split_of
from minigpt5.data.module import DataModule
from minigpt5.data.prepare.features import write_features
from minigpt5.data.types import Split
from minigpt5.images import open_picture, output_transform

KEY = output_transform(16).key


def write_manifest(folder: Path, transform: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps({"transform": transform}), encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("CC3M/train/00000/000020002.jpg", "train"),
        ("CC3M/val/x.jpg", "val"),
        ("CC3M/val_images/x.jpg", "val"),
        ("CC3M/train/val_000020002.jpg", "train"),
        ("val/train/x.jpg", "train"),
        ("CC3M/elsewhere/x.jpg", None),
    ],
)
def test_the_nearest_folder_tells_the_split(path, split):
    assert split_of(Path(path)) == split


def test_both_file_kinds_are_read_and_the_rest_is_refused(tmp_path):
    write_manifest(tmp_path, KEY)
    (tmp_path / "val").mkdir()
    value = torch.arange(8.0).reshape(8, 1, 1)
    torch.save(value, tmp_path / "val" / "a_output.pt")
    save_file({"feature": value}, tmp_path / "val" / "b_input.safetensors")
    features = FeatureFolder(tmp_path, KEY)
    assert torch.equal(features.load("output", Path("val/a.jpg")), value)
    assert torch.equal(features.load("input", Path("val/b.jpg")), value)
    with pytest.raises(InputError, match=r"val/c_output\.pt: no such feature file"):
        features.load("output", Path("val/c.jpg"))
    with pytest.raises(InputError, match=r"elsewhere/c\.jpg: no folder of its path begins with train or val"):
        features.load("output", Path("elsewhere/c.jpg"))
    (tmp_path / "val" / "d_output.pt").write_bytes(b"PK\x03\x04broken")
    torch.save({"x": value}, tmp_path / "val" / "e_output.pt")
    for name, words in (("d", "not a feature file"), ("e", "one tensor wanted, found dict")):
        with pytest.raises(InputError, match=rf"{name}_output\.pt: {words}"):
            features.load("output", Path(f"val/{name}.jpg"))


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_nothing_but_tensors_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path, KEY)
    (tmp_path / "val").mkdir()
    torch.save(Evil(), tmp_path / "val" / "a_output.pt")
    with pytest.raises(InputError, match=r"a_output\.pt: not a feature file"):
        FeatureFolder(tmp_path, KEY).load("output", Path("val/a.jpg"))
    assert not (tmp_path / "evil").exists()


def test_the_manifest_keys_the_folder(tmp_path, caplog):
    FeatureFolder(tmp_path, KEY)
    assert "features are taken as they are" in caplog.text
    write_manifest(tmp_path, output_transform(16, normalize=False).key)
    with pytest.raises(InputError, match="features of another transform .*unit range.* this run needs"):
        FeatureFolder(tmp_path, KEY)
    (tmp_path / MANIFEST).write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not JSON"):
        FeatureFolder(tmp_path, KEY)
    with pytest.raises(InputError, match=r"no such feature folder"):
        FeatureFolder(tmp_path / "none", KEY)


@pytest.fixture
def config(tmp_path):
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        latent_channels=2,
        norm_num_groups=2,
        sample_size=16,
    )
    vae.save_pretrained(tmp_path / "sd" / "vae")
    values = {
        "model": {
            "backbone": {"vision": {"image_size": 8}},
            "diffusion": {"image_size": 16, "weights": str(tmp_path / "sd")},
        },
        "data": {
            "folder": str(tmp_path / "CC3M"),
            "train": str(make_cc3m(tmp_path / "CC3M", 4)),
            "feature_folder": str(tmp_path / "features"),
            "num_workers": 0,
        },
        "training": {"batch_size": 5},
    }
    return validate_config(values, "test")


def test_written_features_replace_pictures_in_the_batch(config, tmp_path, tokenizer, vokens):
    table, out = config.data.train, config.data.feature_folder
    (config.data.folder / "train/00003.jpg").write_bytes(b"broken")
    assert write_features(config, table, out, batch_size=2, device="cpu") == 3
    assert write_features(config, table, out, batch_size=2, device="cpu") == 0
    module = DataModule(config, tokenizer, vokens)
    (batch,) = module.train_dataloader()
    assert batch.output_pixels_O3HW is None and batch.output_moments_OCHW.shape == (4, 4, 16, 16)
    assert [p.source.split(": ")[1] for p in module.index(Split.TRAIN).problems] == ["cc3m_3"]
    vae = AutoencoderKL.from_pretrained(config.model.diffusion.weights, subfolder="vae").eval()
    for sample, moments in zip(batch.samples, batch.output_moments_OCHW, strict=True):
        pixels = output_transform(16)(open_picture(sample.output_images[0]))
        with torch.inference_mode():
            expected = vae.encode(pixels[None]).latent_dist.parameters[0]
        torch.testing.assert_close(moments.float(), expected, rtol=1e-2, atol=1e-2)
    assert all(path.stat().st_size < 5000 for path in out.rglob("*.pt"))


def test_pictures_of_the_same_name_are_not_given_one_feature_file(config):
    folder = config.data.folder
    for name in ("a", "b"):
        (folder / "train" / name).mkdir()
        shutil.copy(folder / "train/00000.jpg", folder / "train" / name / "1.jpg")
    (folder / "twice.tsv").write_text("caption\timage_path\n" + "a dog\ttrain/a/1.jpg\na cat\ttrain/b/1.jpg\n")
    with pytest.raises(InputError, match=r"train/b/1\.jpg: would have the same feature file as .*train/a/1\.jpg"):
        write_features(config, Path("twice.tsv"), config.data.feature_folder, batch_size=2, device="cpu")
    assert not list(config.data.feature_folder.rglob("*.pt"))


def test_a_kill_while_writing_leaves_no_half_feature(config, monkeypatch):
    out = config.data.feature_folder

    def die(value, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    save = torch.save
    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        write_features(config, config.data.train, out, batch_size=2, device="cpu")
    assert not list(out.rglob("*.pt"))
    monkeypatch.setattr(torch, "save", save)
    assert write_features(config, config.data.train, out, batch_size=2, device="cpu") == 4


def test_an_empty_feature_file_is_named(tmp_path):
    (tmp_path / "x_output.pt").touch()
    with pytest.raises(InputError, match=r"x_output\.pt: not a feature file"):
        load_feature(tmp_path / "x_output.pt")


def test_test_samples_and_other_data_sets_use_pictures(config, tokenizer, vokens):
    module = DataModule(config, tokenizer, vokens)
    assert module.encoder(Split.TEST).features is None


def test_another_size_is_refused(config, tmp_path):
    out = tmp_path / "features"
    write_manifest(out, output_transform(32).key)
    with pytest.raises(InputError, match=r"manifest\.json: the folder holds other features"):
        write_features(config, config.data.train, out, batch_size=2, device="cpu")


def test_random_weights_cannot_make_features(tmp_path):
    values = {"data": {"folder": str(tmp_path)}, "model": {"diffusion": {"architecture": {}}}}
    with pytest.raises(InputError, match=r"model\.diffusion\.weights"):
        write_features(validate_config(values, "test"), Path("x.tsv"), tmp_path, batch_size=1, device="cpu")


def test_what_features_cannot_be_made_with_is_named_and_leaves_nothing(config, tmp_path):
    table, out = config.data.train, config.data.feature_folder
    with pytest.raises(InputError, match=r"--device: 'cuda' cannot be used here"):
        write_features(config, table, out, batch_size=2, device="cuda")
    with pytest.raises(InputError, match="--batch_size 0: give at least 1"):
        write_features(config, table, out, batch_size=0, device="cpu")
    shutil.move(tmp_path / "sd" / "vae", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"model\.diffusion\.weights: .*vae: no such folder"):
        write_features(config, table, out, batch_size=2, device="cpu")
    (tmp_path / "sd" / "vae").mkdir()
    with pytest.raises(InputError, match=r"model\.diffusion\.weights: .*vae: cannot be loaded as"):
        write_features(config, table, out, batch_size=2, device="cpu")
    assert not out.exists()

"""Checkpoints load whole or not at all, and convert both ways without loss."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.errors import InputError
from minigpt4.weights import read_state
from minigpt5.checkpoint import (
    FORMAT_KEY,
    checkpoint_mark,
    convert,
    find_checkpoint,
    load_checkpoint,
    main,
    read_checkpoint,
    trainable_state,
)
from minigpt5.config import (
    PROJECT_ROOT,
    AdapterConfig,
    LossConfig,
    ModelConfig,
    PathsConfig,
    Stage,
    VokenConfig,
    load_config,
)
from minigpt5.model import MiniGPT5, build_model
from tests.parity.model import model_config

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "model"


def config(**changes) -> ModelConfig:
    dims = json.loads((FIXTURE / "config.json").read_text())["dims"]
    base = model_config(FIXTURE, dims, 8)
    return ModelConfig(**{**{name: getattr(base, name) for name in base.__dataclass_fields__}, **changes})


def build(stage: Stage, **changes) -> MiniGPT5:
    return build_model(config(**changes), LossConfig(), stage)


@pytest.mark.parametrize("number", [1, 2])
def test_round_trip_is_exact(tmp_path, number):
    source = FIXTURE / f"stage{number}.ckpt"
    convert(source, tmp_path / "ours", to="ours", new_tokens=9)
    convert(tmp_path / "ours", tmp_path / "back.ckpt", to="published", new_tokens=9)
    before, after = read_state(source), read_state(tmp_path / "back.ckpt")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    recorded = json.loads((FIXTURE / f"keys_stage{number}.json").read_text())
    content = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert sorted(content) == sorted(recorded["ckpt_keys"])
    assert content["hyper_parameters"] == recorded["hyper_parameters"]


def test_frozen_rows_are_left_out_where_the_language_model_has_them(tmp_path):
    convert(FIXTURE / "stage1.ckpt", tmp_path / "small", to="ours", new_tokens=9, language_model=FIXTURE / "llama")
    tensors = load_file(tmp_path / "small" / "trainable.safetensors")
    assert "rows.embedding" in tensors
    assert "base.embedding" not in tensors
    with pytest.raises(InputError, match="--language_model FOLDER"):
        convert(tmp_path / "small", tmp_path / "x.ckpt", to="published", new_tokens=9)
    convert(
        tmp_path / "small", tmp_path / "x.ckpt", to="published", new_tokens=9, language_model=FIXTURE / "llama"
    )
    before, after = read_state(FIXTURE / "stage1.ckpt"), read_state(tmp_path / "x.ckpt")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_rows_that_only_fill_up_the_language_models_matrices_are_not_published(tmp_path):
    llama = tmp_path / "llama"
    shutil.copytree(FIXTURE / "llama", llama)
    (file,) = llama.glob("*.safetensors")
    tensors = load_file(file)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], torch.zeros_like(tensors[key][:3])])
    save_file(tensors, file, {"format": "pt"})
    convert(FIXTURE / "stage1.ckpt", tmp_path / "small", to="ours", new_tokens=9, language_model=FIXTURE / "llama")
    convert(tmp_path / "small", tmp_path / "x.ckpt", to="published", new_tokens=9, language_model=llama)
    before, after = read_state(FIXTURE / "stage1.ckpt"), read_state(tmp_path / "x.ckpt")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_converted_folder_loads_to_the_same_parameters(tmp_path):
    convert(FIXTURE / "stage1.ckpt", tmp_path / "ours", to="ours", new_tokens=9)
    published, ours = build(Stage.ALIGNMENT), build(Stage.ALIGNMENT)
    load_checkpoint(published, FIXTURE / "stage1.ckpt", Stage.ALIGNMENT, "--test_weight")
    report = load_checkpoint(ours, tmp_path / "ours", Stage.ALIGNMENT, "--test_weight")
    assert "ours alignment checkpoint" in str(report)
    for (name, one), (_, other) in zip(published.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_own_lightning_file_round_trips(tmp_path):
    model = build(Stage.ALIGNMENT)
    path = tmp_path / "own.ckpt"
    torch.save({"state_dict": trainable_state(model), FORMAT_KEY: checkpoint_mark(Stage.ALIGNMENT)}, path)
    other = build(Stage.ALIGNMENT)
    load_checkpoint(other, path, Stage.ALIGNMENT, "--test_weight")
    assert torch.equal(other.mapper.queries, model.mapper.queries)


def test_stripping_keeps_the_weights_alone(tmp_path):
    model = build(Stage.ALIGNMENT)
    content = {"state_dict": trainable_state(model), FORMAT_KEY: checkpoint_mark(Stage.ALIGNMENT)}
    torch.save({**content, "optimizer_states": [1], "hyper_parameters": {"path": "/home"}}, tmp_path / "own.ckpt")
    main(["strip", str(tmp_path / "own.ckpt"), str(tmp_path / "small.ckpt")])
    stripped = torch.load(tmp_path / "small.ckpt", weights_only=True)
    assert stripped.keys() == {"state_dict", FORMAT_KEY}
    load_checkpoint(build(Stage.ALIGNMENT), tmp_path / "small.ckpt", Stage.ALIGNMENT, "--test_weight")
    with pytest.raises(InputError, match="convert --to ours"):
        main(["strip", str(FIXTURE / "stage1.ckpt"), str(tmp_path / "x.ckpt")])


def test_drifted_frozen_rows_are_restored_whole(tmp_path):
    content = torch.load(FIXTURE / "stage1.ckpt", weights_only=True)
    key = "model.llama_model.model.embed_tokens.weight"
    content["state_dict"][key][:-9] *= 0.99
    torch.save(content, tmp_path / "drifted.ckpt")
    model = build(Stage.ALIGNMENT)
    report = load_checkpoint(model, tmp_path / "drifted.ckpt", Stage.ALIGNMENT, "--test_weight")
    assert torch.equal(model.backbone.embedding_VH, content["state_dict"][key][:-9])
    assert "base.embedding restored whole" in str(report)


def broken(tmp_path: Path, number: int, change) -> Path:
    content = torch.load(FIXTURE / f"stage{number}.ckpt", weights_only=True)
    change(content["state_dict"])
    path = tmp_path / "broken.ckpt"
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.0.bias"), "keys missing: mapper.mlp.0.bias"),
        (lambda state: state.update(surprise=torch.zeros(1)), "keys unexpected: surprise"),
        (lambda state: state.update({"fc.0.bias": torch.zeros(3)}), r"file \(3,\), model \(24,\)"),
        (lambda state: state.pop("model.llama_model.lm_head.weight"), "lm_head.weight"),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named(tmp_path, change, message):
    path = broken(tmp_path, 1, change)
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(build(Stage.ALIGNMENT), path, Stage.ALIGNMENT, "--test_weight")
    assert "broken.ckpt" in str(error.value)


def test_a_failed_load_changes_nothing(tmp_path):
    model = build(Stage.ALIGNMENT)
    before = {name: value.clone() for name, value in model.named_parameters()}
    path = broken(tmp_path, 1, lambda state: state.pop("fc.0.bias"))
    with pytest.raises(InputError):
        load_checkpoint(model, path, Stage.ALIGNMENT, "--test_weight")
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_stages_are_not_mixed_up():
    multimodal = build(Stage.MULTIMODAL)
    with pytest.raises(InputError, match="is a stage-2 checkpoint, a stage-1 one is needed here$"):
        load_checkpoint(multimodal, FIXTURE / "stage2.ckpt", Stage.ALIGNMENT, "--stage1_weight")
    with pytest.raises(InputError, match="if it is what you want, set IS_STAGE2=True"):
        load_checkpoint(build(Stage.ALIGNMENT), FIXTURE / "stage2.ckpt", Stage.ALIGNMENT, "--test_weight")
    with pytest.raises(InputError, match="--stage1_weight"):
        load_checkpoint(multimodal, FIXTURE / "stage2.ckpt", Stage.MULTIMODAL, "--test_weight")
    with pytest.raises(InputError, match="is a stage-1 checkpoint, a stage-2 one .* set IS_STAGE2=False"):
        load_checkpoint(multimodal, FIXTURE / "stage1.ckpt", Stage.MULTIMODAL, "--test_weight")


def test_stage_2_goes_on_top_of_the_stage_1_it_was_trained_on(tmp_path):
    trained = build(Stage.MULTIMODAL)
    load_checkpoint(trained, FIXTURE / "stage1.ckpt", Stage.ALIGNMENT, "--stage1_weight")
    mark = checkpoint_mark(Stage.MULTIMODAL, trained.stage1)
    own = tmp_path / "own.ckpt"
    torch.save({"state_dict": trainable_state(trained), FORMAT_KEY: mark}, own)
    main(["strip", str(own), str(tmp_path / "stripped.ckpt")])
    convert(own, tmp_path / "folder", to="ours", new_tokens=9)
    convert(FIXTURE / "stage1.ckpt", tmp_path / "stage1", to="ours", new_tokens=9)
    other = broken(tmp_path, 1, lambda state: state["t2i_decoder_prompt"].mul_(1.01))
    for stage2 in (own, tmp_path / "stripped.ckpt", tmp_path / "folder"):
        model = build(Stage.MULTIMODAL)
        load_checkpoint(model, other, Stage.ALIGNMENT, "--stage1_weight")
        with pytest.raises(InputError, match=f"--test_weight {stage2}: was trained on top of other stage-1"):
            load_checkpoint(model, stage2, Stage.MULTIMODAL, "--test_weight")
        load_checkpoint(model, tmp_path / "stage1", Stage.ALIGNMENT, "--stage1_weight")
        load_checkpoint(model, stage2, Stage.MULTIMODAL, "--test_weight")
    # A published file does not say what it goes on top of.
    load_checkpoint(model, other, Stage.ALIGNMENT, "--stage1_weight")
    load_checkpoint(model, FIXTURE / "stage2.ckpt", Stage.MULTIMODAL, "--test_weight")


@pytest.mark.parametrize("name", ["stage2_vist", "stage2_mmdialog"])
def test_checkpoints_that_ship_go_on_top_of_the_stage_1_beside_them(name):
    config = load_config(PROJECT_ROOT / "config" / "tiny.yaml", {}, {})
    folder = config.paths.bundled_checkpoints
    model = build_model(config.model, config.loss, Stage.MULTIMODAL)
    load_checkpoint(model, folder / "stage1_cc3m.ckpt", Stage.ALIGNMENT, "--stage1_weight")
    assert read_checkpoint(folder / f"{name}.ckpt", 9).meta[FORMAT_KEY]["stage1"] == model.stage1
    load_checkpoint(model, folder / f"{name}.ckpt", Stage.MULTIMODAL, "--test_weight")


def test_lora_that_would_not_be_applied_is_an_error():
    model = build(Stage.MULTIMODAL, adapter=AdapterConfig(kind="none"))
    load_checkpoint(model, FIXTURE / "stage1.ckpt", Stage.ALIGNMENT, "--stage1_weight")
    with pytest.raises(InputError, match="lora_"):
        load_checkpoint(model, FIXTURE / "stage2.ckpt", Stage.MULTIMODAL, "--test_weight")


def test_another_number_of_vokens_is_an_error():
    model = build(Stage.ALIGNMENT, vokens=VokenConfig(count=4))
    with pytest.raises(InputError, match="number of vokens"):
        load_checkpoint(model, FIXTURE / "stage1.ckpt", Stage.ALIGNMENT, "--test_weight")


def test_other_files_are_refused(tmp_path):
    for path in (FIXTURE / "eva_vit.pth", FIXTURE / "config.json", tmp_path / "nowhere.ckpt", FIXTURE / "llama"):
        with pytest.raises(InputError, match=str(path.name)):
            read_checkpoint(path, 9, "--test_weight")


def test_targets_of_the_other_kind_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="name a folder to write"):
        convert(FIXTURE / "stage1.ckpt", tmp_path / "file", to="ours", new_tokens=9)
    with pytest.raises(InputError, match="name a file to write"):
        convert(FIXTURE / "stage1.ckpt", tmp_path, to="published", new_tokens=9)
    convert(FIXTURE / "stage1.ckpt", tmp_path / "ours", to="ours", new_tokens=9)
    with pytest.raises(InputError, match="give the folder"):
        read_checkpoint(tmp_path / "ours" / "trainable.safetensors", 9)


def test_values_that_are_no_numbers_are_refused(tmp_path):
    path = broken(tmp_path, 1, lambda state: state["t2i_decoder_prompt"].fill_(float("nan")))
    with pytest.raises(InputError, match=r"NaN or infinity in mapper\.queries"):
        load_checkpoint(build(Stage.ALIGNMENT), path, Stage.ALIGNMENT, "--test_weight")


@pytest.mark.parametrize("number", [1, 2])
def test_another_number_of_vokens_than_the_files_is_noticed_at_conversion(tmp_path, number):
    source, target = FIXTURE / f"stage{number}.ckpt", tmp_path / "ours"
    words = r"--vokens {}: .*stage\d\.ckpt has 8: 609 rows are 600 of the language model, 8 vokens"
    for count in (4, 16):
        with pytest.raises(InputError, match=words.format(count)):
            main(["convert", str(source), str(target), "--to", "ours", "--vokens", str(count)])
        with pytest.raises(InputError, match=words.format(count)):
            main(["show", str(source), "--vokens", str(count)])
    # 601 tokens could be a vocabulary with one for padding; the language model's tokenizer tells.
    with pytest.raises(InputError, match=words.format(7)):
        convert(source, target, to="ours", new_tokens=8, language_model=FIXTURE / "llama")
    assert not target.exists()
    with pytest.raises(SystemExit):
        main(["show", str(source), "--vokens", "0"])


def test_an_unusual_vocabulary_is_not_taken_for_vokens(tmp_path):
    content = torch.load(FIXTURE / "stage1.ckpt", weights_only=True)
    for name in ("model.embed_tokens", "lm_head"):
        key = f"model.llama_model.{name}.weight"
        content["state_dict"][key] = content["state_dict"][key][:580].clone()
    torch.save(content, tmp_path / "odd.ckpt")
    convert(tmp_path / "odd.ckpt", tmp_path / "ours", to="ours", new_tokens=9)
    assert len(load_file(tmp_path / "ours" / "trainable.safetensors")["base.embedding"]) == 571


def test_conversion_says_that_the_optimizer_state_stays_behind(tmp_path, capsys):
    content = torch.load(FIXTURE / "stage1.ckpt", weights_only=True)
    states = [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}]
    torch.save({**content, "optimizer_states": states}, tmp_path / "trained.ckpt")
    main(["convert", str(tmp_path / "trained.ckpt"), str(tmp_path / "ours"), "--to", "ours"])
    assert f"left out of {tmp_path / 'ours'}: the optimizer state" in capsys.readouterr().out
    main(["convert", str(FIXTURE / "stage1.ckpt"), str(tmp_path / "weights"), "--to", "ours"])
    assert "optimizer" not in capsys.readouterr().out

    model = build(Stage.ALIGNMENT)
    own = {"state_dict": trainable_state(model), FORMAT_KEY: checkpoint_mark(Stage.ALIGNMENT), "epoch": 1}
    torch.save({**own, "optimizer_states": states}, tmp_path / "own.ckpt")
    target = tmp_path / "published.ckpt"
    llama = ["--language_model", str(FIXTURE / "llama")]
    main(["convert", str(tmp_path / "own.ckpt"), str(target), "--to", "published", *llama])
    assert f"left out of {target}: the optimizer state" in capsys.readouterr().out
    written = torch.load(target, weights_only=True)
    assert (written["optimizer_states"], written["epoch"]) == ([], 1)


def test_help_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "-m", "minigpt5.checkpoint", "convert", "--help"]
    finished = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert "--vokens" in finished.stdout
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "safetensors"})


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"state_dict": {"x": Path("/")}}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match="not a readable weight file"):
        read_checkpoint(tmp_path / "evil.ckpt", 9, "--test_weight")


def test_checkpoints_are_found_in_the_published_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, bundled = tmp_path / "weights", tmp_path / "bundled"
    for folder in (weights, bundled):
        folder.mkdir()
    paths = PathsConfig(weights=weights, bundled_checkpoints=bundled)
    with pytest.raises(InputError, match="looked in"):
        find_checkpoint(Path("a.ckpt"), paths, "--test_weight")
    shutil.copy(FIXTURE / "README.json", bundled / "a.ckpt")
    assert find_checkpoint(Path("a.ckpt"), paths, "--test_weight") == bundled / "a.ckpt"
    shutil.copy(FIXTURE / "README.json", weights / "a.ckpt")
    assert find_checkpoint(Path("a.ckpt"), paths, "--test_weight") == weights / "a.ckpt"


def test_command_line_converts(tmp_path, capsys):
    main(["convert", str(FIXTURE / "stage2.ckpt"), str(tmp_path / "ours"), "--to", "ours"])
    main(["show", str(tmp_path / "ours")])
    assert "multimodal stage" in capsys.readouterr().out

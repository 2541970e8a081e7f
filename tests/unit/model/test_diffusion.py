"""The frozen Stable Diffusion loads whole or not at all, and its loss follows its scheduler."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.errors import InputError
from minigpt5.config import DiffusionConfig, GenerationConfig
from minigpt5.diffusion import DiffusionDraws, load_diffusion

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "model" / "sd"
FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    target = tmp_path / "sd"
    shutil.copytree(FIXTURE, target)
    for path in target.rglob("*"):
        path.chmod(0o755)
    return target


def load(folder: Path):
    return load_diffusion(DiffusionConfig(weights=str(folder), image_size=64))


def edit(path: Path, change) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def test_every_component_is_reported(folder):
    _, reports = load(folder)
    assert [report.kind for report in reports] == [
        "Stable Diffusion AutoencoderKL",
        "Stable Diffusion UNet2DConditionModel",
        "Stable Diffusion CLIPTextModel",
    ]
    assert all(report.loaded for report in reports)


@pytest.mark.parametrize("part", FILES)
def test_a_missing_tensor_is_an_error_not_a_random_one(folder, part):
    edit(folder / part / FILES[part], lambda state: state.pop(next(iter(state))))
    with pytest.raises(InputError, match=rf"{part}: does not fit as Stable Diffusion(.|\n)*1 keys missing"):
        load(folder)


@pytest.mark.parametrize("part", FILES)
def test_an_unknown_tensor_is_an_error(folder, part):
    edit(folder / part / FILES[part], lambda state: state.update(surprise=torch.zeros(2)))
    with pytest.raises(InputError, match="1 keys unexpected: surprise"):
        load(folder)


@pytest.mark.parametrize("part", FILES)
def test_another_size_than_the_configuration_says_is_an_error(folder, part):
    def shrink(state):
        key = next(key for key, value in state.items() if value.ndim == 1)
        state[key] = state[key][:-1].clone()

    edit(folder / part / FILES[part], shrink)
    with pytest.raises(InputError, match=part):
        load(folder)


def test_missing_parts_are_named(folder):
    shutil.rmtree(folder / "unet")
    with pytest.raises(InputError, match="lacks unet"):
        load(folder)
    shutil.copytree(FIXTURE / "unet", folder / "unet")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(InputError, match="scheduler"):
        load(folder)


def test_velocity_is_the_target_where_the_scheduler_says_so(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    noise_model, _ = load(FIXTURE)
    velocity_model, _ = load(folder)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    draws = DiffusionDraws(noise, noise, torch.tensor([10, 900]))
    condition = torch.randn(2, 77, 24, generator=generator)
    noisy = noise_model.scheduler.add_noise(latents, noise, draws.timesteps_R)
    predicted = noise_model.predict(noisy, draws.timesteps_R, condition)
    alphas = noise_model.scheduler.alphas_cumprod[draws.timesteps_R].reshape(2, 1, 1, 1)
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    error = (predicted - velocity).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(velocity_model.loss(condition, latents, draws, None), error.mean())
    ratio = (alphas / (1 - alphas)).flatten()
    weights = ratio.clamp(max=5.0) / (ratio + 1)
    torch.testing.assert_close(velocity_model.loss(condition, latents, draws, 5.0), (error * weights).mean())


@pytest.mark.parametrize("scheduler", ["default", "ddim", "dpm++"])
def test_every_scheduler_renders_each_picture_from_its_own_seed(scheduler):
    diffusion, _ = load(FIXTURE)
    config = dataclasses.replace(GenerationConfig(num_inference_steps=3), scheduler=scheduler)
    condition = torch.randn(2, 77, 24, generator=torch.Generator().manual_seed(1))
    negative = torch.zeros_like(condition)

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    first, second = diffusion.render(condition, negative, config, seeded(5, 6), 64)
    (alone,) = diffusion.render(condition[1:], negative[1:], config, seeded(6), 64)
    assert first.size == (64, 64)
    assert first.tobytes() != second.tobytes()
    assert max(abs(a - b) for a, b in zip(second.tobytes(), alone.tobytes(), strict=True)) <= 1

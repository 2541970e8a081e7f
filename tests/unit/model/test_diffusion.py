"""The frozen Stable Diffusion loads whole or not at all, and its loss follows its scheduler."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.errors import InputError
from minigpt5.config import DiffusionConfig, GenerationConfig
from minigpt5.diffusion import DiffusionDraws, load_diffusion
from minigpt5.schedulers import SAMPLERS

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


def use_scheduler(folder: Path, name: str) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    SAMPLERS[name].from_config(json.loads(path.read_text())).save_pretrained(folder / "scheduler")
    assert json.loads(path.read_text())["_class_name"] == name


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_folders_scheduler_samples_and_every_one_trains_alike(folder, name):
    use_scheduler(folder, name)
    published, model = load(FIXTURE)[0], load(folder)[0]
    config = GenerationConfig(num_inference_steps=3)
    assert type(model.pipeline(config).scheduler).__name__ == name

    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    draws = DiffusionDraws(noise, noise, torch.tensor([10, 900]))
    condition = torch.randn(2, 77, 24, generator=generator)
    losses = [diffusion.loss(condition, latents, draws, 5.0) for diffusion in (published, model)]
    torch.testing.assert_close(losses[0], losses[1])

    both = model.sample_pixels(condition, condition * 0, latents, config)
    alone = model.sample_pixels(condition[1:], condition[1:] * 0, latents[1:], config)
    assert both.isfinite().all()
    torch.testing.assert_close(both[1:], alone, atol=1e-3, rtol=0)


def test_the_index_names_the_scheduler_where_its_own_file_does_not(folder):
    use_scheduler(folder, "DDIMScheduler")
    path, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    values = json.loads(path.read_text())
    del values["_class_name"]
    path.write_text(json.dumps(values))
    names = json.loads(index.read_text())
    index.write_text(json.dumps({**names, "scheduler": ["diffusers", "DDIMScheduler"]}))
    assert type(load(folder)[0].scheduler).__name__ == "DDIMScheduler"
    index.unlink()
    with pytest.raises(InputError, match=r"scheduler_config\.json: scheduler _class_name None"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "InventedScheduler"}, "'InventedScheduler' cannot be used; name one of PNDMScheduler, "),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "'EulerAncestralDiscreteScheduler' cannot be used"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            r"algorithm_type sde-dpmsolver\+\+ draws noise in every step.*; use dpmsolver\+\+",
        ),
        ({"prediction_type": "sample"}, "prediction_type 'sample' cannot be trained; known are epsilon"),
        ({"beta_schedule": "invented"}, "cannot be loaded as PNDMScheduler: invented"),
    ],
)
def test_schedulers_that_cannot_be_used_are_named_with_their_file(folder, change, message):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert str(path) in str(error.value)


def test_ddim_does_not_cut_latents_off():
    """Its default would, behind a warning about a file that diffusers wants changed."""
    diffusion, _ = load(FIXTURE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = diffusion.pipeline(GenerationConfig(scheduler="ddim"))
    assert not pipeline.scheduler.config.clip_sample


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

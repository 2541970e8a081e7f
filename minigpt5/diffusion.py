"""The frozen Stable Diffusion model: latents, Min-SNR loss, caption features and sampling.

Shapes: R pictures, C latent channels, HW latent side, S picture side, Q conditioning positions, E diffusion width.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor, nn
from transformers import BatchEncoding, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from minigpt4.errors import InputError
from minigpt4.weights import KeyReport, matches, raise_for_keys, resolve_source
from minigpt5.config import DiffusionConfig, GenerationConfig
from minigpt5.schedulers import load_scheduler, make_sampler, training_schedule

FLAG = "model.diffusion.weights"
CLASSES: dict[str, Any] = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
EXPECTED_EXTRAS = (r"(text_model\.)?embeddings\.position_ids",)
"""Buffers that older files store and current classes compute."""


@dataclass(frozen=True)
class DiffusionDraws:
    """The random draws of one image loss, one entry a picture."""

    posterior_RCHW: Tensor
    """Standard normal, for sampling the VAE's posterior."""
    noise_RCHW: Tensor
    timesteps_R: Tensor


class CaptionTokenizer(CLIPTokenizer):
    """CLIP's tokenizer with captions passed through ftfy, as in CLIP and in transformers before version 5."""

    def encode_padded(self, captions: list[str]) -> BatchEncoding:
        """Return ids and mask ``[R, Q]`` padded and cut to the text encoder's length."""
        return self(
            [ftfy.fix_text(caption) for caption in captions],
            padding="max_length",
            max_length=self.model_max_length,
            truncation=True,
            return_tensors="pt",
        )


class StableDiffusion(nn.Module):
    """VAE, UNet, text encoder and noise scheduler of one diffusers folder; frozen, always in eval mode.

    Args:
        vae: autoencoder.
        unet: denoiser with cross-attention.
        text_encoder: CLIP text model.
        scheduler: what samples; its noise schedule also serves training, whatever its class.
        tokenizer: CLIP tokenizer; None where only the parameters matter.
    """

    # diffusers builds its classes' interfaces at run time
    vae: Any
    unet: Any
    text_encoder: Any
    scheduler: Any
    schedule: Any
    tokenizer: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: SchedulerMixin,
        tokenizer: CaptionTokenizer | None,
    ) -> None:
        super().__init__()
        self.vae, self.unet, self.text_encoder = vae, unet, text_encoder
        self.scheduler, self.schedule = scheduler, training_schedule(scheduler)
        self.tokenizer = tokenizer
        self._offloaded: list[UserCpuOffloadHook] = []
        self.requires_grad_(False)
        self.train(False)

    @property
    def width(self) -> int:
        """Width E of the UNet's conditioning."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def vae_factor(self) -> int:
        """Picture side over latent side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def train(self, mode: bool = True) -> "StableDiffusion":
        """Stay in eval mode."""
        return super().train(False)

    def offload(self, device: torch.device) -> None:
        """Keep the parts on the CPU; each moves to the device when it is called and back when the next one is."""
        last = None
        for part in (self.text_encoder, self.unet, self.vae):
            _, last = cpu_offload_with_hook(part.to("cpu"), device, last)
            self._offloaded.append(last)

    def draw(self, generator: torch.Generator, image_size: int) -> DiffusionDraws:
        """Draw what one picture's loss needs, on the CPU, so that it is the same on every device."""
        side = image_size // self.vae_factor
        shape = (1, self.vae.config.latent_channels, side, side)
        steps = self.schedule.config.num_train_timesteps
        return DiffusionDraws(
            posterior_RCHW=torch.randn(shape, generator=generator),
            noise_RCHW=torch.randn(shape, generator=generator),
            timesteps_R=torch.randint(0, steps, (1,), generator=generator),
        )

    @torch.no_grad()
    def encode_pixels(self, pixels_R3SS: Tensor) -> Tensor:
        """Return the VAE's posterior moments ``[R, 2C, H, W]`` of pictures in [-1, 1]."""
        return self.vae.encode(pixels_R3SS.to(self.vae.dtype)).latent_dist.parameters

    def sample_latents(self, moments_RCHW: Tensor, posterior_RCHW: Tensor) -> Tensor:
        """Sample the posterior with the given normal draws and scale to the UNet's units."""
        mean, log_variance = moments_RCHW.chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return (mean + deviation * posterior_RCHW.to(mean.dtype)) * self.vae.config.scaling_factor

    def loss(
        self, condition_RQE: Tensor, latents_RCHW: Tensor, draws: DiffusionDraws, gamma: float | None
    ) -> Tensor:
        """Latent diffusion loss (paper equation 5) with Min-SNR weights (arXiv 2303.09556).

        Args:
            condition_RQE: mapper output.
            latents_RCHW: scaled latents of the wanted pictures.
            draws: noise and timesteps.
            gamma: Min-SNR's gamma; None weighs every timestep alike.

        Returns:
            Mean over pictures of the weighted squared error.
        """
        noise = draws.noise_RCHW.to(latents_RCHW)
        timesteps = draws.timesteps_R.to(latents_RCHW.device)
        noisy = self.schedule.add_noise(latents_RCHW, noise, timesteps)
        predicted = self.predict(noisy, timesteps, condition_RQE)
        target = self.target(latents_RCHW, noise, timesteps)
        error_R = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
        return (error_R * self.snr_weights(timesteps, gamma)).mean()

    def target(self, latents_RCHW: Tensor, noise_RCHW: Tensor, timesteps_R: Tensor) -> Tensor:
        """Return what the UNet should predict: noise, or velocity, as its scheduler says."""
        if self.schedule.config.prediction_type != "v_prediction":
            return noise_RCHW
        return self.schedule.get_velocity(latents_RCHW, noise_RCHW, timesteps_R)

    def predict(self, noisy_RCHW: Tensor, timesteps_R: Tensor, condition_RQE: Tensor) -> Tensor:
        """Return the UNet's prediction: noise, or velocity, as its scheduler says."""
        return self.unet(noisy_RCHW, timesteps_R, condition_RQE.to(noisy_RCHW.dtype)).sample

    def signal_to_noise(self, timesteps_R: Tensor) -> Tensor:
        """Return the signal-to-noise ratio of each timestep."""
        return compute_snr(self.schedule, timesteps_R)

    def snr_weights(self, timesteps_R: Tensor, gamma: float | None) -> Tensor:
        """Return Min-SNR weights: min(SNR, gamma) / SNR, or / (SNR + 1) where the UNet predicts velocity."""
        if gamma is None:
            return torch.ones_like(timesteps_R, dtype=torch.float32)
        snr = self.signal_to_noise(timesteps_R)
        is_velocity = self.schedule.config.prediction_type == "v_prediction"
        return snr.clamp(max=gamma) / (snr + 1 if is_velocity else snr)

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """Return the text encoder's last states ``[R, Q, E]``, with its attention mask.

        This is the published target of the caption loss; Stable Diffusion's own prompt encoding uses no mask
        and differs at the padding.
        """
        assert self.tokenizer is not None
        inputs = self.tokenizer.encode_padded(captions).to(self.text_encoder.device)
        return self.text_encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]

    @torch.no_grad()
    def render(
        self,
        condition_RQE: Tensor,
        negative_RQE: Tensor,
        config: GenerationConfig,
        generators: list[torch.Generator],
        image_size: int,
    ) -> list[Image.Image]:
        """Sample pictures for the mapper's conditioning, all in one batch.

        Args:
            condition_RQE: conditioning, one a picture.
            negative_RQE: conditioning of the unguided half (zeroed vokens through the mapper).
            config: steps, guidance scale, scheduler.
            generators: one CPU generator a picture, for its initial latents.
            image_size: side in pixels.
        """
        latents = self.initial_latents(generators, image_size)
        pixels = self.sample_pixels(condition_RQE, negative_RQE, latents, config)
        return self.to_images(pixels)

    def initial_latents(self, generators: list[torch.Generator], image_size: int) -> Tensor:
        """Draw initial latents ``[R, C, H, W]``, each from its own generator."""
        side = image_size // self.vae_factor
        shape = (1, self.vae.config.latent_channels, side, side)
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators])

    @torch.no_grad()
    def sample_latents_from(
        self, condition_RQE: Tensor, negative_RQE: Tensor, latents_RCHW: Tensor, config: GenerationConfig
    ) -> Tensor:
        """Run the reverse process with classifier-free guidance; returns final, unscaled-by-VAE latents."""
        pipeline = self.pipeline(config)
        dtype = self.unet.dtype
        return pipeline(
            prompt_embeds=condition_RQE.to(dtype),
            negative_prompt_embeds=negative_RQE.to(dtype),
            latents=latents_RCHW.to(device=self.unet.device, dtype=dtype),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            output_type="latent",
        ).images

    @torch.no_grad()
    def decode(self, latents_RCHW: Tensor) -> Tensor:
        """Return pictures ``[R, 3, S, S]`` in [0, 1] for scaled latents."""
        decoded = self.vae.decode(latents_RCHW / self.vae.config.scaling_factor).sample
        for hook in self._offloaded:
            hook.offload()
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def sample_pixels(
        self, condition_RQE: Tensor, negative_RQE: Tensor, latents_RCHW: Tensor, config: GenerationConfig
    ) -> Tensor:
        """Sample and decode; returns pictures ``[R, 3, S, S]`` in [0, 1]."""
        return self.decode(self.sample_latents_from(condition_RQE, negative_RQE, latents_RCHW, config))

    @torch.no_grad()
    def render_captions(
        self,
        captions: list[str],
        config: GenerationConfig,
        generators: list[torch.Generator],
        image_size: int,
    ) -> list[Image.Image]:
        """Render captions with Stable Diffusion itself: the published baseline."""
        latents = self.initial_latents(generators, image_size)
        return self.to_images(self.caption_pixels(captions, latents, config))

    def caption_pixels(self, captions: list[str], latents_RCHW: Tensor, config: GenerationConfig) -> Tensor:
        """Render captions from given latents; returns pictures ``[R, 3, S, S]`` in [0, 1]."""
        final = self.pipeline(config)(
            prompt=[ftfy.fix_text(caption) for caption in captions],
            latents=latents_RCHW.to(device=self.unet.device, dtype=self.unet.dtype),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            output_type="latent",
        ).images
        return self.decode(final)

    @staticmethod
    def to_images(pixels_R3SS: Tensor) -> list[Image.Image]:
        """Return 8-bit pictures of values in [0, 1]."""
        bytes_RSS3 = (pixels_R3SS.permute(0, 2, 3, 1).cpu() * 255).round().to(torch.uint8).numpy()
        return [Image.fromarray(picture) for picture in bytes_RSS3]

    def pipeline(self, config: GenerationConfig) -> Any:
        """Return diffusers' pipeline over these components with the configured scheduler."""
        pipeline: Any = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=make_sampler(config.scheduler, self.scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def build_diffusion(config: DiffusionConfig) -> StableDiffusion:
    """Build the components with random weights from the configured architecture.

    Raises:
        InputError: no architecture is given, or a component is missing from it.
    """
    if config.architecture is None:
        raise InputError("model.diffusion: give weights (a folder or hub id) or an architecture")
    missing = {"unet", "vae", "text_encoder", "scheduler"} - config.architecture.keys()
    if missing:
        raise InputError(f"model.diffusion.architecture: lacks {', '.join(sorted(missing))}")
    parts = config.architecture
    return StableDiffusion(
        vae=AutoencoderKL(**parts["vae"]),
        unet=UNet2DConditionModel(**parts["unet"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])),
        scheduler=PNDMScheduler(**parts["scheduler"]),
        tokenizer=None,
    )


def load_diffusion(
    config: DiffusionConfig, dtype: torch.dtype = torch.float32
) -> tuple[StableDiffusion, list[KeyReport]]:
    """Load a diffusers Stable Diffusion folder or hub id, with what became of its keys.

    Raises:
        InputError: a component is missing, cannot be loaded, or has keys too many or too few.
    """
    assert config.weights is not None
    parts = ("vae", "unet", "text_encoder", "scheduler", "tokenizer")
    folder = resolve_source(config.weights, FLAG, ["model_index.json", *(f"{part}/*" for part in parts)])
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise InputError(f"{FLAG}: {folder}: lacks {', '.join(missing)}; give a Stable Diffusion diffusers folder")
    transformers_logging.disable_progress_bar()
    loaded, reports = {}, []
    for part, component in CLASSES.items():
        loaded[part], report = _load_component(component, folder / part, dtype)
        reports.append(report)
    try:
        loaded["tokenizer"] = load_clip_tokenizer(folder / "tokenizer")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{FLAG}: {folder}: tokenizer cannot be loaded: {error}") from None
    loaded["scheduler"] = load_scheduler(folder, FLAG)
    return StableDiffusion(**loaded), reports


def load_vae(weights: str) -> AutoencoderKL:
    """Load only the VAE of a diffusers Stable Diffusion folder or hub id, in float32.

    Raises:
        InputError: it is missing, cannot be loaded, or has keys too many or too few.
    """
    folder = resolve_source(weights, FLAG, ["vae/*"]) / "vae"
    if not folder.is_dir():
        raise InputError(f"{FLAG}: {folder}: no such folder; give a Stable Diffusion diffusers folder")
    vae, _ = _load_component(AutoencoderKL, folder, torch.float32)
    return vae


def _load_component(component: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, KeyReport]:
    """Load one model of the folder; a key too many or too few is an error, not a random tensor."""
    kind = f"Stable Diffusion {component.__name__}"
    argument = "dtype" if component is CLIPTextModel else "torch_dtype"
    logger = transformers_logging.get_verbosity()
    # Their own key warnings; the reports replace them.
    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()
    try:
        model, info = component.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **{argument: dtype}
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{FLAG}: {folder}: cannot be loaded as {kind}: {error}") from None
    finally:
        transformers_logging.set_verbosity(logger)
    unexpected = sorted(key for key in info["unexpected_keys"] if not matches(key, EXPECTED_EXTRAS))
    raise_for_keys(str(folder), kind, sorted(info["missing_keys"]), unexpected)
    if info["mismatched_keys"]:
        raise InputError(f"{FLAG}: {folder}: sizes differ from config.json: {info['mismatched_keys']}")
    return model, KeyReport(str(folder), kind, loaded=sorted(model.state_dict()))


def load_clip_tokenizer(folder: Path) -> CaptionTokenizer:
    """Load Stable Diffusion's CLIP tokenizer, padding with the token its ``special_tokens_map.json`` names.

    Stable Diffusion 2.1 pads with ``!`` (id 0) while ``tokenizer_config.json`` says ``<|endoftext|>``; the
    releases the checkpoints were trained with followed the former.
    """
    tokenizer = CaptionTokenizer.from_pretrained(folder, local_files_only=True)
    path = folder / "special_tokens_map.json"
    if path.is_file():
        pad = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
        if pad is not None:
            tokenizer.pad_token = pad["content"] if isinstance(pad, dict) else pad
    return tokenizer

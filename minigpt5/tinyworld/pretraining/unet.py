"""The denoiser: latent diffusion under the frozen text encoder, with dropped captions for guidance.

Shapes: N pictures of the pool, B of a batch, C latent channels, HW latent side, Q text positions, E text width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from minigpt5.diffusion import StableDiffusion
from minigpt5.tinyworld.pretraining.loop import Recipe
from minigpt5.tinyworld.pretraining.pool import Pool
from minigpt5.tinyworld.pretraining.text import caption_states

RECIPE = Recipe(steps=12_500, batch_size=32, learning_rate=1e-3, warmup_steps=300, ema_decay=0.9995)
CAPTION_DROPOUT = 0.1
"""Share of captions replaced by empty ones, for classifier-free guidance (arXiv 2207.12598)."""
GAMMA = 5.0
"""Min-SNR's gamma (arXiv 2303.09556)."""
_ENCODE_BATCH = 64


class UnetObjective:
    """Loss of one step.

    Args:
        diffusion: its UNet is trained, everything else frozen.
        pool: pictures; encoded once, here.
        recipe: batch size.
    """

    def __init__(self, diffusion: StableDiffusion, pool: Pool, recipe: Recipe) -> None:
        self.diffusion, self.pool, self.recipe = diffusion, pool, recipe
        parts = torch.arange(len(pool)).split(_ENCODE_BATCH)
        device = diffusion.unet.device
        moments = [diffusion.encode_pixels((pool.pixels(part.tolist()) * 2 - 1).to(device)) for part in parts]
        self.moments_NCHW = torch.cat(moments)

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the weighted loss and the plain squared error."""
        numbers = self.pool.draw(generator, self.recipe.batch_size)
        dropped = torch.rand(len(numbers), generator=generator) < CAPTION_DROPOUT
        captions = self.pool.captions(numbers, generator)
        kept = ["" if drop else text for text, drop in zip(captions, dropped.tolist(), strict=True)]
        masked = bool(torch.rand((), generator=generator) < 0.5)
        with torch.no_grad():
            condition_BQE = caption_states(
                self.diffusion.text_encoder, self.diffusion.tokenizer, kept, masked=masked
            )
        draws = [self.diffusion.draw(generator, self.pool.pixels_N3SS.shape[-1]) for _ in numbers]
        posterior_BCHW, noise_BCHW = (
            torch.cat([getattr(draw, name) for draw in draws]).to(condition_BQE)
            for name in ("posterior_RCHW", "noise_RCHW")
        )
        timesteps_B = torch.cat([draw.timesteps_R for draw in draws]).to(condition_BQE.device)
        latents_BCHW = self.diffusion.sample_latents(self.moments_NCHW[numbers], posterior_BCHW)
        noisy_BCHW = self.diffusion.scheduler.add_noise(latents_BCHW, noise_BCHW, timesteps_B)
        target_BCHW = self.diffusion.target(latents_BCHW, noise_BCHW, timesteps_B)
        predicted_BCHW = self.diffusion.predict(noisy_BCHW, timesteps_B, condition_BQE)
        error_B = (predicted_BCHW - target_BCHW).square().mean(dim=(1, 2, 3))
        return {"loss": (error_B * self._weights(timesteps_B)).mean(), "plain": error_B.mean()}

    def _weights(self, timesteps_B: Tensor) -> Tensor:
        """Cap the weight that velocity prediction gives the picture's own error, SNR + 1, at gamma.

        Min-SNR caps SNR itself; the one more keeps the noisiest steps, where captions decide most.
        """
        return (GAMMA / (self.diffusion.signal_to_noise(timesteps_B) + 1)).clamp(max=1)

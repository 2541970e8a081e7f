"""The autoencoder: reconstruction and a light Kullback-Leibler term, as Stable Diffusion's first stage.

Shapes: B pictures, S side in pixels.
"""

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from minigpt5.tinyworld.pretraining.loop import Recipe
from minigpt5.tinyworld.pretraining.pool import Pool

RECIPE = Recipe(steps=8000, batch_size=16, learning_rate=1.5e-3)
_SQUARE_WEIGHT = 10.0
"""Large errors are a wrong or missing thing, which must outweigh the texture of the background."""
_THING_WEIGHT = 8.0
"""Added to the weight of a thing's pixels: a small one covers a hundredth of the picture."""
_KL_WEIGHT = 1e-4


class VaeObjective:
    """Loss of one step.

    Args:
        vae: trained.
        pool: pictures.
        recipe: batch size.
    """

    def __init__(self, vae: AutoencoderKL, pool: Pool, recipe: Recipe) -> None:
        self.vae, self.pool, self.recipe = vae, pool, recipe

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return weighted absolute and squared error in [-1, 1], KL per latent value, and their weighted sum."""
        numbers = self.pool.draw(generator, self.recipe.batch_size)
        pixels_B3SS = self.pool.pixels(numbers) * 2 - 1
        pixels_B3SS = pixels_B3SS.to(self.vae.device, memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels_B3SS).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        decoded_B3SS = self.vae.decode(posterior.mean + posterior.std * noise).sample
        weights_B1SS = 1 + _THING_WEIGHT * self.pool.masks(numbers).to(pixels_B3SS)
        error_B3SS = decoded_B3SS - pixels_B3SS
        absolute = (weights_B1SS * error_B3SS.abs()).mean()
        square = (weights_B1SS * error_B3SS.square()).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = absolute + _SQUARE_WEIGHT * square + _KL_WEIGHT * kl
        return {"loss": loss, "absolute": absolute, "square": square, "kl": kl}


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, pool: Pool, count: int = 1024) -> float:
    """Return the factor that gives the latents of ``count`` pictures unit deviation (arXiv 2112.10752)."""
    pixels_B3SS = pool.pixels(range(min(count, len(pool)))) * 2 - 1
    means = [vae.encode(part.to(vae.device)).latent_dist.mean for part in pixels_B3SS.split(64)]
    return float(1 / torch.cat(means).std())

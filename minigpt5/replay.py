"""How much memory a step needs beyond its weights, found by running the real modules on tensors without storage.

The modules run on PyTorch's fake tensors, which have shapes and types but no data, while :class:`LivePeak` adds up
the storages that are alive. What autograd keeps for the backward pass, what a layer needs while it runs, and the
point at which their sum is largest come out of the modules' own code, not out of a formula that has to follow it.

A CPU's kernels are replayed. In mixed-precision training the norms are run in float32, as autocast does on a GPU;
generating, which takes the frozen parts' type throughout, knows no autocast.

Shapes: B samples, T positions, C of them run without a graph, S behind them, P input pictures, R pictures to draw,
N vokens, H language width, E diffusion width, Q conditioning positions, L queries.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache

from minigpt5.config import ModelConfig, Stage
from minigpt5.kv_cache import as_argument
from minigpt5.model import PICTURES_AT_ONCE, MiniGPT5
from minigpt5.training import recompute_activations

_FLOAT32_NORMS = (nn.LayerNorm, nn.GroupNorm)
"""Autocast runs these in float32 on a GPU."""


@dataclass(frozen=True)
class Workload:
    """What one sample looks like; every sample of a batch counts alike."""

    text_tokens: int
    """Positions of text, the response included."""
    response_tokens: int
    """Positions from the first voken on in the alignment stage, of the whole response otherwise."""
    input_pictures: int
    output_pictures: int = 1

    def positions(self, config: ModelConfig) -> int:
        """Return positions of a sample with its pictures in place."""
        return self.text_tokens + self.input_pictures * config.backbone.qformer.num_queries


class LivePeak(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make and that are still held.

    Args:
        held: tensors that are there already and do not count.
    """

    def __init__(self, held: Iterator[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.phases: dict[str, int] = {}
        """Peak by the phase it was reached in."""
        self._phase = ""
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result

    def begin(self, phase: str) -> None:
        """Count what follows under a name."""
        self._phase = phase

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            self.phases[self._phase] = max(self.phases.get(self._phase, 0), self.live)
            weakref.finalize(storage, self._free, key, size)
        return tensor

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Replay:
    """The model on fake tensors.

    Args:
        model: on the meta device; its tensors are replaced.
        frozen: type of the frozen parts.
    """

    def __init__(self, model: MiniGPT5, frozen: torch.dtype) -> None:
        self.model, self.frozen = model, frozen
        self._mode = FakeTensorMode()
        self._is_mixed = frozen != torch.float32
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        with self._mode:
            _replace_tensors(model, frozen)

    def training(self, batch: int, load: Workload, *, recompute: bool) -> dict[str, int]:
        """Return the peak bytes of one step's phases, weights and gradients not counted.

        Args:
            batch: samples B.
            load: what a sample holds.
            recompute: activations are recomputed in the backward pass (``training.gradient_checkpointing``).
        """
        model = self.model
        if recompute:
            recompute_activations(model)
        if self._is_mixed and self._autocast is nullcontext:
            with self._mode:
                _run_norms_in_float32(model.diffusion)
            self._autocast = partial(torch.autocast, "cpu", dtype=self.frozen)
        # Gradients of an earlier batch are there, as they are while gradients accumulate.
        with self._mode:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype)
        model.train()
        for layer in model.backbone.language_model.model.layers:
            layer.training = recompute  # transformers recomputes in layers that are in training mode
        with self._watched() as watch:
            self._pictures(watch, batch * load.input_pictures)
            hidden_BSH = self._language(watch, batch, load)
            watch.begin("text loss")
            labelled_XH = hidden_BSH.flatten(0, 1)[: batch * load.response_tokens]
            targets_X = torch.empty(len(labelled_XH), dtype=torch.long)
            loss = torch.nn.functional.cross_entropy(model.logits(labelled_XH).float(), targets_X)
            if load.output_pictures:
                loss = loss + self._image_loss(watch, hidden_BSH, batch * load.output_pictures)
            watch.begin("backward")
            loss.backward()
        model.eval()
        return watch.phases

    def prediction(self, batch: int, load: Workload, *, guided: bool) -> dict[str, int]:
        """Return the peak bytes of generating a batch's replies by phase, keys and values not counted.

        Not after a training: its gradients would stay.
        """
        model, pictures = self.model, min(batch * load.output_pictures, PICTURES_AT_ONCE)
        model.eval()
        with self._watched() as watch, torch.no_grad():
            self._pictures(watch, min(batch * load.input_pictures, PICTURES_AT_ONCE))
            watch.begin("language")
            positions = load.positions(model.config)
            hidden_BTH = self._decoder(self._empty(batch, positions, self._width), self._mask(batch, positions))
            model.logits(hidden_BTH[:, -1])
            del hidden_BTH
            if pictures:
                watch.begin("mapper")
                condition_RQE = model.condition(self._empty(pictures, model.config.vokens.count, self._width))
                watch.begin("unet")
                both = condition_RQE.repeat(2 if guided else 1, 1, 1).to(self.frozen)
                self._unet(both)
                watch.begin("vae")
                model.diffusion.decode(self._latents(pictures))
        return watch.phases

    @contextmanager
    def _watched(self) -> Iterator[LivePeak]:
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        with self._mode, LivePeak(iter(held)) as watch, self._autocast():
            yield watch

    @property
    def _width(self) -> int:
        return self.model.rows.embedding.shape[1]

    def _empty(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.frozen, requires_grad=grad)

    def _mask(self, batch: int, queries: int, keys: int | None = None) -> Tensor:
        # A mask that is ready spares transformers a look at values, which there are none of.
        return self._empty(batch, 1, queries, keys or queries)

    def _latents(self, pictures: int) -> Tensor:
        diffusion = self.model.diffusion
        side = self.model.config.diffusion.image_size // diffusion.vae_factor
        return self._empty(pictures, diffusion.vae.config.latent_channels, side, side)

    def _pictures(self, watch: LivePeak, pictures: int) -> None:
        watch.begin("input pictures")
        if pictures:
            side = self.model.config.backbone.vision.image_size
            self.model.backbone.encode_images(self._empty(pictures, 3, side, side))

    def _decoder(self, embeds_BTH: Tensor, mask: Tensor, **more: Any) -> Tensor:
        positions_1T = torch.empty(1, embeds_BTH.shape[1], dtype=torch.long)
        more = {"use_cache": False, "position_ids": positions_1T, **more}
        llama = self.model.backbone.language_model.model
        return llama(inputs_embeds=embeds_BTH, attention_mask=mask, **more).last_hidden_state

    def _language(self, watch: LivePeak, batch: int, load: Workload) -> Tensor:
        """Run the language model; in the alignment stage only the last positions with a graph."""
        watch.begin("language")
        model = self.model
        positions = load.positions(model.config)
        constant = positions - load.response_tokens if model.stage is Stage.ALIGNMENT else 0
        embeds_BTH = self._empty(batch, positions, self._width, dtype=torch.float32, grad=True).to(self.frozen)
        cache = DynamicCache(config=model.backbone.language_model.config)
        if model.prefix is not None:
            model.prefix.fill(cache, batch, self.frozen)
        ahead = cache.get_seq_length()
        if constant:
            with torch.no_grad():
                first = embeds_BTH[:, :constant].detach()
                self._decoder(first, self._mask(batch, constant), **as_argument(cache), use_cache=True)
        rest = positions - constant
        more = {**as_argument(cache), "use_cache": True} if constant or ahead else {}
        return self._decoder(embeds_BTH[:, constant:], self._mask(batch, rest, ahead + positions), **more)

    def _image_loss(self, watch: LivePeak, hidden_BSH: Tensor, pictures: int) -> Tensor:
        model, diffusion = self.model, self.model.diffusion
        watch.begin("mapper")
        wanted = pictures * model.config.vokens.count
        repeats = -(-wanted // (hidden_BSH.shape[0] * hidden_BSH.shape[1]))
        states_XH = hidden_BSH.flatten(0, 1).repeat(repeats, 1)[:wanted]
        condition_RQE = model.condition(states_XH.unflatten(0, (pictures, -1)))
        watch.begin("vae")
        side = model.config.diffusion.image_size
        diffusion.encode_pixels(self._empty(pictures, 3, side, side, dtype=torch.float32))
        watch.begin("unet")
        predicted = self._unet(condition_RQE)
        loss = (predicted.float() - self._latents(pictures).float()).square().mean()
        if model.stage is Stage.ALIGNMENT:
            watch.begin("text encoder")
            length = model.config.mapper.num_queries
            with torch.no_grad():
                captions = torch.empty(pictures, length, dtype=torch.long)
                features = diffusion.text_encoder(captions, attention_mask=self._mask(pictures, length))[0]
            loss = loss + torch.nn.functional.mse_loss(condition_RQE.float(), features.float())
        return loss

    def _unet(self, condition_RQE: Tensor) -> Tensor:
        pictures = len(condition_RQE)
        timesteps_R = torch.empty(pictures, dtype=torch.long)
        return self.model.diffusion.predict(self._latents(pictures), timesteps_R, condition_RQE)


def is_frozen_part(name: str) -> bool:
    """Return whether a parameter, by its name, has the frozen parts' type; adapters do not."""
    return name.startswith(("backbone.", "diffusion.")) and "lora_" not in name


def _replace_tensors(model: MiniGPT5, frozen: torch.dtype) -> None:
    """Put fake tensors in place of those on the meta device, which attention would take for another device's."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = frozen if is_frozen_part(f"{path}.{name}") else torch.float32
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)
            module._parameters[name] = fake
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _run_norms_in_float32(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, _FLOAT32_NORMS):
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
            module.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))

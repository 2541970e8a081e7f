"""MiniGPT-5: a frozen MiniGPT-4 and a frozen Stable Diffusion, joined by vokens and a mapper.

Shapes: B samples, T positions, H language width, N vokens a picture, R wanted pictures of the batch,
P input pictures, L queries a picture, Q conditioning positions, E diffusion width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minigpt4.backbone import MiniGPT4, load_backbone
from minigpt4.errors import InputError
from minigpt4.tokenizer import LlamaTokenizer
from minigpt4.weights import KeyReport
from minigpt5 import images, prompts
from minigpt5.adapters import Prefix, adapt
from minigpt5.assembly import Assembled, insert_pictures
from minigpt5.compilation import allow_many_graphs
from minigpt5.config import GenerationConfig, LossConfig, ModelConfig, Stage, TrainingConfig
from minigpt5.data.types import INPUT_PICTURE, Batch, Prompt, Reply
from minigpt5.decoding_steps import CompiledSteps, DecodingSteps, GrowingSteps
from minigpt5.diffusion import DiffusionDraws, StableDiffusion, build_diffusion, load_diffusion
from minigpt5.generation import Decoded, decode, sample_seed, stop_sequences
from minigpt5.language_states import last_states
from minigpt5.losses import Draws, LanguageStates, Losses
from minigpt5.mapper import FeatureMapper
from minigpt5.replies import make_reply
from minigpt5.vokens import IGNORE_INDEX, VokenIds, VokenRows, gather_vokens, voken_starts

PICTURES_AT_ONCE = 16
"""Prompts' pictures that the vision encoder takes at once while generating, and pictures of a diffusion batch."""


class MiniGPT5(nn.Module):
    """The whole model. Only vokens' rows, mapper and adapter are trainable; see :meth:`trainable_groups`.

    Args:
        backbone: MiniGPT-4, frozen.
        diffusion: Stable Diffusion, frozen.
        tokenizer: LLaMA tokenizer without vokens; they are added here. None builds parameters only.
        config: sizes.
        loss: loss weights.
        stage: decides what is trainable and whether the language model is adapted.
    """

    def __init__(
        self,
        backbone: MiniGPT4,
        diffusion: StableDiffusion,
        tokenizer: LlamaTokenizer | None,
        config: ModelConfig,
        loss: LossConfig,
        stage: Stage,
    ) -> None:
        super().__init__()
        self.config, self.loss_config, self.stage = config, loss, stage
        self.backbone, self.diffusion = backbone, diffusion
        embedding_VH, head_VH = backbone.embedding_VH, backbone.head_VH
        base_size = len(embedding_VH) if tokenizer is None else len(tokenizer)
        if tokenizer is not None:
            self.tokenizer = tokenizer
            self.voken_ids = VokenIds.install(tokenizer, config.vokens.count)
            self.stops = stop_sequences(tokenizer, prompts.STOP)
        self.rows = VokenRows(embedding_VH, head_VH, base_size, config.vokens.count + 1)
        self.mapper = FeatureMapper(config.mapper, config.vokens.count, embedding_VH.shape[1], diffusion.width)
        self.prefix: Prefix | None = None
        self._compiled_steps: CompiledSteps | None = None
        self.reports: list[KeyReport] = []
        self.stage1: str | None = None
        """Fingerprint of the stage-1 checkpoint that was loaded."""
        self.has_stage1 = False
        """Set once stage-1 weights are loaded; stage-2 weights only go on top of them."""
        if stage is Stage.MULTIMODAL:
            self.prefix = adapt(backbone.language_model, config.adapter)
            if config.mapper.stage2_trains == "published":
                self.mapper.freeze_aligned()

    def __getstate__(self) -> dict[str, Any]:
        """Compiled steps run this model and no copy of it."""
        return self.__dict__ | {"_compiled_steps": None}

    def train(self, mode: bool = True) -> "MiniGPT5":
        """Switch the trainable parts; frozen parts stay in eval mode, their adapters follow ``mode``."""
        super().train(mode)
        for name, module in self.backbone.language_model.named_modules():
            if name.endswith("lora_dropout"):
                module.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.rows.embedding.device

    def place(self, device: torch.device) -> "MiniGPT5":
        """Move to the device for generating; an offloaded diffusion model stays behind and comes when it runs."""
        if not self.config.diffusion.offload:
            return self.to(device)
        for part in self.children():
            if part is not self.diffusion:
                part.to(device)
        self.diffusion.offload(device)
        return self

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile the parts that do the work in a step with ``torch.compile``, in place."""
        allow_many_graphs()
        for part in (self.backbone.language_model.model, self.diffusion.unet, self.mapper):
            part.compile(backend=backend)

    def trainable_groups(self, training: TrainingConfig) -> list[dict[str, Any]]:
        """Return AdamW parameter groups: the language side, and the mapper at its own rate in stage 1."""
        mapper = [parameter for parameter in self.mapper.parameters() if parameter.requires_grad]
        in_mapper = {id(parameter) for parameter in mapper}
        language = [p for p in self.parameters() if p.requires_grad and id(p) not in in_mapper]
        factor = training.mapper_learning_rate_factor if self.stage is Stage.ALIGNMENT else 1.0
        return [
            {"name": "language", "params": language, "lr": training.learning_rate},
            {"name": "mapper", "params": mapper, "lr": training.learning_rate * factor},
        ]

    # ---- training -----------------------------------------------------------------------------------------

    def draw(self, batch: Batch, *, seed: int, epoch: int, training: bool) -> Draws:
        """Draw all randomness of a batch, each picture's from (seed, epoch, sample id, picture index) alone.

        Args:
            batch: decides how many pictures there are and whose.
            seed: the run's seed.
            epoch: draws differ between epochs.
            training: drop conditionings; otherwise none is dropped.
        """
        parts, drops = [], []
        for sample, count in zip(batch.samples, batch.output_counts, strict=True):
            for index in range(count):
                seeded = sample_seed(seed, epoch, sample.id, index)
                generator = torch.Generator().manual_seed(seeded)
                drops.append(torch.rand(1, generator=generator) < self.loss_config.condition_dropout)
                parts.append(self.diffusion.draw(generator, self.config.diffusion.image_size))
        if not parts:
            empty = torch.zeros(0)
            return Draws(empty.bool(), DiffusionDraws(empty, empty, empty.long()))
        drop_R = torch.cat(drops) if training else torch.zeros(len(parts), dtype=torch.bool)
        return Draws(
            drop_R,
            DiffusionDraws(
                torch.cat([part.posterior_RCHW for part in parts]),
                torch.cat([part.noise_RCHW for part in parts]),
                torch.cat([part.timesteps_R for part in parts]),
            ),
        )

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the training losses of a batch (paper equations 4 to 7).

        total = text_weight · text + image_weight · image + caption_weight · caption. The caption term is taken
        only where every sample has a caption and the batch wants a picture, as published.
        """
        states = self.language_states(batch)
        text = self.text_loss(states)
        starts_R2 = voken_starts(states.prompt.labels_BT, self.voken_ids)
        captions = self._captions_of(batch, starts_R2)
        if len(starts_R2) == 0:
            zero = text.new_zeros(())
            total = self.loss_config.text_weight * text + self._untouched()
            return Losses(total, text, zero, None if captions is None else zero)
        vokens_RNH = gather_vokens(states.hidden_BTH, starts_R2, self.voken_ids.count)
        condition_RQE = self.condition(vokens_RNH, draws.drop_R)
        image = self.diffusion.loss(
            condition_RQE,
            self.diffusion.sample_latents(self._moments(batch), draws.diffusion.posterior_RCHW.to(self.device)),
            draws.diffusion,
            self.loss_config.min_snr_gamma,
        )
        total = self.loss_config.text_weight * text + self.loss_config.image_weight * image
        if captions is None:
            return Losses(total, text, image, None)
        caption = self.caption_loss(condition_RQE, captions, draws.drop_R)
        return Losses(total + self.loss_config.caption_weight * caption, text, image, caption)

    def language_states(self, batch: Batch) -> LanguageStates:
        """Assemble prompts with pictures and run the language model over them."""
        features_PLH = batch.input_features_PLH
        if features_PLH is None and batch.input_pixels_P3HW is not None:
            dtype = self.backbone.projection.weight.dtype
            features_PLH = self.backbone.encode_images(batch.input_pixels_P3HW.to(dtype))
        prompt = self.assemble(batch.input_ids_BT, batch.attention_mask_BT, batch.labels_BT, features_PLH)
        hidden_BTH = last_states(self.backbone.language_model, prompt, self._language_dtype, self.prefix)
        return LanguageStates(prompt, hidden_BTH)

    def assemble(
        self, ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor, features_PLH: Tensor | None
    ) -> Assembled:
        """Embed text, put a beginning-of-sequence token first and pictures in place of their placeholders."""
        ids_BT = F.pad(ids_BT, (1, 0), value=self.tokenizer.bos_id)
        return insert_pictures(
            self.embed(ids_BT),
            F.pad(mask_BT, (1, 0), value=1),
            F.pad(labels_BT, (1, 0), value=IGNORE_INDEX),
            is_picture_BT=ids_BT == self.voken_ids.picture,
            is_trained_BT=self.rows.is_new(ids_BT) & (ids_BT != self.voken_ids.picture),
            features_PLH=features_PLH,
            num_queries=self.config.backbone.qformer.num_queries,
        )

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Embed token ids, new tokens included."""
        return self.rows.embed(ids_BT, self.backbone.embedding_VH)

    def logits(self, hidden_XH: Tensor) -> Tensor:
        """Return logits over the whole vocabulary, new tokens included."""
        return self.rows.logits(hidden_XH, self.backbone.head_VH)

    def text_loss(self, states: LanguageStates) -> Tensor:
        """Mean cross-entropy over labelled positions (paper equation 4); logits are taken only there."""
        targets_BT = states.prompt.labels_BT[:, 1:]
        labelled_BT = targets_BT != IGNORE_INDEX
        logits_XV = self.logits(states.hidden_BTH[:, :-1][labelled_BT])
        if len(logits_XV) == 0:
            return logits_XV.sum()
        return F.cross_entropy(logits_XV.float(), targets_BT[labelled_BT])

    def condition(self, vokens_RNH: Tensor, drop_R: Tensor | None = None) -> Tensor:
        """Map voken states to conditioning; dropped ones are zeroed before the mapper."""
        vokens_RNH = vokens_RNH.to(self.mapper.dtype)
        if drop_R is not None:
            vokens_RNH = vokens_RNH.masked_fill(drop_R.to(vokens_RNH.device)[:, None, None], 0.0)
        return self.mapper(vokens_RNH)

    def caption_loss(self, condition_RQE: Tensor, captions: list[str], drop_R: Tensor) -> Tensor:
        """Squared error to the caption's text features (paper equation 6); a dropped one's is empty."""
        kept = ["" if drop else caption for caption, drop in zip(captions, drop_R.tolist(), strict=True)]
        return F.mse_loss(condition_RQE.float(), self.diffusion.encode_captions(kept).float())

    def _untouched(self) -> Tensor:
        """Return 0 with a zero gradient for everything that trains.

        A batch without a picture then has the same parameters in its graph as every other process's batch, and
        gradients are exchanged without a search for those that are missing.
        """
        return 0.0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()

    def _captions_of(self, batch: Batch, starts_R2: Tensor) -> list[str] | None:
        """Return each wanted picture's caption, or None if any sample of the batch has none."""
        captions = batch.captions
        if self.loss_config.caption_weight == 0 or any(caption is None for caption in captions):
            return None
        return [captions[row] or "" for row in starts_R2[:, 0].tolist()]

    def _moments(self, batch: Batch) -> Tensor:
        if batch.output_moments_OCHW is not None:
            return batch.output_moments_OCHW.to(self.device, self.diffusion.vae.dtype)
        assert batch.output_pixels_O3HW is not None, "a response holds vokens but the batch has no picture"
        return self.diffusion.encode_pixels(batch.output_pixels_O3HW)

    @property
    def _language_dtype(self) -> torch.dtype:
        return self.backbone.projection.weight.dtype

    # ---- generation ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, requests: Sequence[Prompt], config: GenerationConfig) -> list[Reply]:
        """Reply to prompts with text and pictures.

        Each reply depends on its prompt, ``config.seed`` and its id, not on what else is in the batch.

        Raises:
            InputError: a prompt's placeholders and pictures differ in number.
        """
        decoded = self.decode_prompts(requests, config)
        states = [state for one in decoded for state in one.voken_states]
        seeds = [
            sample_seed(config.seed, request.id, "picture", index)
            for request, one in zip(requests, decoded, strict=True)
            for index in range(len(one.voken_states))
        ]
        pictures = self.render(torch.stack(states), seeds, config) if states else []
        remaining = iter(pictures)
        return [
            make_reply(request, one, [next(remaining) for _ in one.voken_states], self.tokenizer, self.voken_ids)
            for request, one in zip(requests, decoded, strict=True)
        ]

    def decode_prompts(
        self,
        requests: Sequence[Prompt],
        config: GenerationConfig,
        *,
        stops: list[tuple[int, ...]] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        trace: bool = False,
    ) -> list[Decoded]:
        """Decode replies' tokens and voken states.

        Args:
            requests: prompts.
            config: decoding settings.
            stops: replaces the tokenizer's stop sequences.
            generators: replaces each prompt's own generator, seeded from ``config.seed`` and its id.
            trace: keep every step's last state and scores.
        """
        was_training = self.training
        self.eval()
        embeds = [embed.to(self._language_dtype) for embed in self.prompt_embeds(requests)]
        generators = generators or [
            torch.Generator().manual_seed(sample_seed(config.seed, request.id, "text")) for request in requests
        ]
        decoded = decode(
            self._steps(config.compile),
            embeds,
            embed=self.embed,
            head=self.logits,
            ids=self.voken_ids,
            tokenizer=self.tokenizer,
            config=config,
            generators=generators,
            stops=self.stops if stops is None else stops,
            trace=trace,
        )
        self.train(was_training)
        return decoded

    def _steps(self, compiled: bool) -> DecodingSteps:
        """Return the language model's steps; compiled ones are kept, with their graphs."""
        if not compiled:
            return GrowingSteps(self.backbone.language_model, self.prefix)
        if self._compiled_steps is None:
            self._compiled_steps = CompiledSteps(self.backbone.language_model, self.prefix)
        return self._compiled_steps

    def fits(self, request: Prompt) -> bool:
        """Whether the tokenizer's limit (``model_max_length``) cuts off nothing of a prompt's text."""
        limit = self.tokenizer.max_length
        return limit is None or len(self.tokenizer.encode(request.text, cut=False)) <= limit

    def prompt_embeds(self, requests: Sequence[Prompt]) -> list[Tensor]:
        """Return prompts' embeddings ``[T, H]`` with the beginning-of-sequence token and their pictures.

        Raises:
            InputError: a prompt has not as many pictures as placeholders, or is too long for one of them.
        """
        pictures = iter(self._picture_features(requests))
        embeds = []
        for request in requests:
            wanted, given = request.text.count(INPUT_PICTURE), len(request.images)
            if wanted != given:
                raise InputError(
                    f"prompt {request.id}: {wanted} {INPUT_PICTURE} placeholders but {given} pictures"
                )
            ids = self.tokenizer.encode(request.text)
            if ids.count(self.voken_ids.picture) < given:
                raise InputError(
                    f"prompt {request.id}: the tokenizer's limit of {self.tokenizer.max_length} tokens "
                    "(model_max_length) cuts off a picture; shorten it"
                )
            features = [next(pictures) for _ in request.images]
            ids_1T = torch.tensor([ids], dtype=torch.long, device=self.device)
            unlabelled = torch.full_like(ids_1T, IGNORE_INDEX)
            features_PLH = torch.stack(features) if features else None
            embeds.append(self.assemble(ids_1T, torch.ones_like(ids_1T), unlabelled, features_PLH).embeds_BTH[0])
        return embeds

    def _picture_features(self, requests: Sequence[Prompt]) -> Iterator[Tensor]:
        """Yield what stands for each picture of all prompts, ``[L, H]``, in order."""
        transform = images.input_transform(self.config.backbone.vision.image_size)
        pixels = [transform(image) for request in requests for image in request.images]
        for start in range(0, len(pixels), PICTURES_AT_ONCE):
            chunk = torch.stack(pixels[start : start + PICTURES_AT_ONCE])
            yield from self.backbone.encode_images(chunk.to(self.device, self._language_dtype))

    @torch.no_grad()
    def render(self, vokens_RNH: Tensor, seeds: Sequence[int], config: GenerationConfig) -> list[Image.Image]:
        """Render one picture for each run of voken states, in diffusion batches of :data:`PICTURES_AT_ONCE`."""
        condition_RQE = self.condition(vokens_RNH)
        negative_1QE = self.condition(torch.zeros_like(vokens_RNH[:1]))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = self.config.diffusion.image_size
        rendered: list[Image.Image] = []
        for start in range(0, len(seeds), PICTURES_AT_ONCE):
            some = slice(start, start + PICTURES_AT_ONCE)
            negative_RQE = negative_1QE.expand_as(condition_RQE[some])
            rendered += self.diffusion.render(condition_RQE[some], negative_RQE, config, generators[some], size)
        return rendered

    @torch.no_grad()
    def render_captions(
        self, captions: Sequence[str], ids: Sequence[str], config: GenerationConfig
    ) -> list[Image.Image]:
        """Render captions with Stable Diffusion alone: the published baseline picture."""
        generators = [torch.Generator().manual_seed(sample_seed(config.seed, name, "baseline")) for name in ids]
        size = self.config.diffusion.image_size
        return self.diffusion.render_captions(list(captions), config, generators, size)


def build_model(
    config: ModelConfig,
    loss: LossConfig,
    stage: Stage,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> MiniGPT5:
    """Load the frozen parts and put fresh vokens and mapper (and stage 2's adapter) on them.

    Args:
        config: sizes and weight sources.
        loss: loss weights.
        stage: training stage.
        dtype: type of the frozen parts; trainable parts are float32.
        device: where the language model is made (default: the CPU); everything else is loaded to the CPU.

    Raises:
        InputError: missing or wrong weights.
    """
    if config.backbone.language_model.weights is None:
        raise InputError("model.backbone.language_model.weights: give a LLaMA folder or hub id")
    loaded = load_backbone(config.backbone, dtype, device)
    if config.diffusion.weights is None:
        raise InputError("model.diffusion.weights: give a Stable Diffusion folder or hub id")
    diffusion, diffusion_reports = load_diffusion(config.diffusion, dtype)
    model = MiniGPT5(loaded.model, diffusion, loaded.tokenizer, config, loss, stage)
    model.reports = [*loaded.reports, *diffusion_reports]
    return model


def build_random(config: ModelConfig, loss: LossConfig, stage: Stage) -> MiniGPT5:
    """Build every parameter from the configured sizes alone, without tokenizer: for sizes and the meta device."""
    backbone = MiniGPT4(config.backbone)
    return MiniGPT5(backbone, build_diffusion(config.diffusion), None, config, loss, stage)

"""The reference path: what the published code does, written plainly over the same modules.

Whole embedding and output matrices train under a gradient mask; prompts are put together sample by sample; the
language model keeps every layer's hidden states and takes logits at every position; pictures are encoded in the
step unless their features are given; attention is the plain one of the published releases; replies come one at a
time.

Shapes: B samples, T positions, H language width, V vocabulary with the new tokens, N vokens a picture,
P pictures, L queries a picture.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from benchmarks.harness import PhaseClock, Phases, mixed_precision
from minigpt5 import images
from minigpt5.config import GenerationConfig, TrainingConfig
from minigpt5.data.types import Batch, Prompt
from minigpt5.generation import sample_seed
from minigpt5.kv_cache import as_argument
from minigpt5.losses import Draws
from minigpt5.model import MiniGPT5
from minigpt5.vokens import IGNORE_INDEX


class ReferenceModel(nn.Module):
    """The published model's way of computing, with ``model``'s parts and weights.

    Args:
        model: ours.
        take: use its parts themselves, which spoils it, instead of copies: for measuring memory.
    """

    def __init__(self, model: MiniGPT5, *, take: bool = False) -> None:
        super().__init__()
        self.ids, self.tokenizer, self.config = model.voken_ids, model.tokenizer, model.config
        self.loss_config = model.loss_config
        self.backbone, self.mapper = model.backbone, model.mapper
        if not take:
            self.backbone, self.mapper = copy.deepcopy(model.backbone), copy.deepcopy(model.mapper)
        self.diffusion = model.diffusion
        for part in (self.backbone.language_model, self.backbone.vision.model, self.backbone.qformer.model):
            part.set_attn_implementation("eager")
        llama = self.backbone.language_model
        base = model.rows.base_size
        self.embedding = _whole_matrix(llama.get_input_embeddings().weight[:base], model.rows.embedding)
        self.head = _whole_matrix(llama.get_output_embeddings().weight[:base], model.rows.head)
        llama.get_input_embeddings().weight = self.embedding
        llama.get_output_embeddings().weight = self.head
        llama.get_input_embeddings().num_embeddings = llama.config.vocab_size = len(self.embedding)
        is_new = torch.arange(len(self.embedding), device=self.embedding.device)[:, None] >= base
        self.embedding_mask = is_new * torch.ones_like(self.embedding)
        self.head_mask = is_new * torch.ones_like(self.head)

    def optimizer(self, training: TrainingConfig, mapper_factor: float) -> torch.optim.Optimizer:
        """Return AdamW over everything that has a gradient, masked or not."""
        mapper = [parameter for parameter in self.mapper.parameters() if parameter.requires_grad]
        in_mapper = {id(parameter) for parameter in mapper}
        language = [p for p in self.parameters() if p.requires_grad and id(p) not in in_mapper]
        rate = training.learning_rate
        groups = [{"params": language, "lr": rate}, {"params": mapper, "lr": rate * mapper_factor}]
        return torch.optim.AdamW(groups, eps=training.adam_epsilon, weight_decay=training.weight_decay)

    def mask_gradients(self) -> None:
        """Zero the gradients of the rows that are not to change."""
        for matrix, mask in ((self.embedding, self.embedding_mask), (self.head, self.head_mask)):
            assert matrix.grad is not None
            matrix.grad *= mask

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the total training loss."""
        embeds_BTH, mask_BT, labels_BT = self.assemble(batch)
        output = self.backbone.language_model(
            inputs_embeds=embeds_BTH, attention_mask=mask_BT, use_cache=False, output_hidden_states=True
        )
        logits = output.logits[:, :-1].float().contiguous()
        targets = labels_BT[:, 1:].contiguous()
        text = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
        hidden_BTH = output.hidden_states[-1]
        states, captions = [], []
        for row in range(batch.size):
            for start in (labels_BT[row] == self.ids.first).nonzero().flatten().tolist():
                states.append(hidden_BTH[row, start - 1 : start - 1 + self.ids.count])
                captions.append(batch.captions[row] or "")
        vokens = torch.stack(states).float()
        vokens = vokens.masked_fill(draws.drop_R.to(vokens.device)[:, None, None], 0.0)
        condition = self.mapper(vokens)
        moments = batch.output_moments_OCHW
        if moments is None:
            assert batch.output_pixels_O3HW is not None
            moments = self.diffusion.encode_pixels(batch.output_pixels_O3HW)
        latents = self.diffusion.sample_latents(moments, draws.diffusion.posterior_RCHW.to(moments.device))
        image = self.diffusion.loss(condition, latents, draws.diffusion, self.loss_config.min_snr_gamma)
        weights = self.loss_config
        total = weights.text_weight * text + weights.image_weight * image
        if not weights.caption_weight:
            return total
        kept = ["" if drop else text for text, drop in zip(captions, draws.drop_R.tolist(), strict=True)]
        caption = F.mse_loss(condition, self.diffusion.encode_captions(kept).float())
        return total + weights.caption_weight * caption

    def assemble(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Put pictures into the prompts sample by sample, then pad; returns embeddings, mask and labels."""
        features_PLH = batch.input_features_PLH
        if features_PLH is None and batch.input_pixels_P3HW is not None:
            features_PLH = self.backbone.encode_images(batch.input_pixels_P3HW.to(self._dtype))
        pictures = iter(() if features_PLH is None else features_PLH)
        rows = []
        for row in range(batch.size):
            length = int(batch.attention_mask_BT[row].sum())
            ids_T, labels_T = batch.input_ids_BT[row, :length], batch.labels_BT[row, :length]
            rows.append(self._assemble_one(ids_T, labels_T, pictures))
        longest = max(len(row) for row, _ in rows)
        embeds = [F.pad(row, (0, 0, 0, longest - len(row))) for row, _ in rows]
        labels = [F.pad(wanted, (0, longest - len(wanted)), value=IGNORE_INDEX) for _, wanted in rows]
        masks = [torch.arange(longest, device=labels[0].device) < len(row) for row, _ in rows]
        return torch.stack(embeds), torch.stack(masks).long(), torch.stack(labels)

    def _assemble_one(self, ids_T: Tensor, labels_T: Tensor, pictures: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        bos = ids_T.new_tensor([self.tokenizer.bos_id])
        embeds = [self.embed(bos)]
        labels = [labels_T.new_tensor([IGNORE_INDEX])]
        start = 0
        for place in (ids_T == self.ids.picture).nonzero().flatten().tolist():
            picture_LH = next(pictures)
            embeds += [self.embed(ids_T[start:place]), picture_LH]
            labels += [labels_T[start:place], labels_T.new_full((len(picture_LH),), IGNORE_INDEX)]
            start = place + 1
        return torch.cat([*embeds, self.embed(ids_T[start:])]), torch.cat([*labels, labels_T[start:]])

    def embed(self, ids: Tensor) -> Tensor:
        """Look ids up in the whole matrix."""
        return F.embedding(ids, self.embedding).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self.backbone.projection.weight.dtype

    # ---- generation ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, request: Prompt, config: GenerationConfig) -> tuple[list[int], list[Image.Image]]:
        """Reply to one prompt; returns tokens (of every run only ``[IMG0]``) and pictures."""
        tokens, states, _ = self.decode(request, config)
        return tokens, [self.render(state, request, index, config) for index, state in enumerate(states)]

    @torch.no_grad()
    def decode(
        self, request: Prompt, config: GenerationConfig, given: Sequence[int] | None = None
    ) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """Decode one reply, keeping every step's hidden states of all layers, as ``generate`` was asked to.

        Args:
            request: the prompt.
            config: decoding settings.
            given: tokens to come to, whatever the scores say.

        Returns:
            Tokens, the N states behind each picture, and the state that each token was chosen from.
        """
        generator = torch.Generator().manual_seed(sample_seed(config.seed, request.id, "text"))
        embeds = self._prompt(request)
        cache = DynamicCache(config=self.backbone.language_model.config)
        tokens, history = [self.tokenizer.bos_id], []
        head = self.head.to(self._dtype)
        starts = []
        length = embeds.shape[1]
        while len(tokens) <= config.max_new_tokens and tokens[-1] != self.tokenizer.eos_id:
            output = self.backbone.language_model.model(
                inputs_embeds=embeds,
                attention_mask=torch.ones(1, length, dtype=torch.long, device=embeds.device),
                **as_argument(cache),
                use_cache=True,
                output_hidden_states=True,
            )
            history.append(output.hidden_states)
            logits = F.linear(output.last_hidden_state, head)
            chosen = self._choose(logits[:, -1].float(), tokens, config, generator)
            chosen = chosen if given is None else given[len(tokens)]
            tokens.append(chosen)
            inputs = [chosen]
            if chosen == self.ids.first:
                starts.append(len(history) - 1)
                inputs = list(self.ids.vokens)
            embeds = self.embed(torch.tensor([inputs], device=embeds.device))
            length += len(inputs)
        last = [states[-1][0, -1] for states in history]
        return tokens, [self._voken_states(history, start) for start in starts], last

    def _voken_states(self, history: Sequence[tuple[Tensor, ...]], start: int) -> Tensor:
        """Return the N states that predict one picture's vokens."""
        return torch.cat([history[start][-1][0, -1:], history[start + 1][-1][0, : self.ids.count - 1]])

    def _choose(
        self, logits: Tensor, tokens: list[int], config: GenerationConfig, generator: torch.Generator
    ) -> int:
        if config.images == "force" and self.ids.first not in tokens:
            scores = torch.full_like(logits, float("-inf"))
            scores[:, self.ids.first] = 0.0
        else:
            so_far = torch.tensor([tokens], device=logits.device)
            scores = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(so_far, logits)
            scores = TopPLogitsWarper(config.top_p)(so_far, TopKLogitsWarper(config.top_k)(so_far, scores))
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator))

    def _prompt(self, request: Prompt) -> Tensor:
        transform = images.input_transform(self.config.backbone.vision.image_size)
        pixels = torch.stack([transform(image) for image in request.images]).to(self.embedding.device, self._dtype)
        pictures = iter(self.backbone.encode_images(pixels))
        ids = torch.tensor(self.tokenizer.encode(request.text), device=self.embedding.device)
        return self._assemble_one(ids, ids, pictures)[0][None]

    @torch.no_grad()
    def render(self, vokens_NH: Tensor, request: Prompt, index: int, config: GenerationConfig) -> Image.Image:
        """Render one picture in a diffusion batch of its own."""
        condition = self.mapper(vokens_NH[None].float())
        negative = self.mapper(torch.zeros_like(vokens_NH[None].float()))
        seed = sample_seed(config.seed, request.id, "picture", index)
        generators = [torch.Generator().manual_seed(seed)]
        return self.diffusion.render(condition, negative, config, generators, self.config.diffusion.image_size)[0]


def _whole_matrix(base_VH: Tensor, rows_KH: Tensor) -> nn.Parameter:
    """Return the resized matrix, trainable as a whole and in float32."""
    return nn.Parameter(torch.cat([base_VH.float(), rows_KH.detach().float()]))


def training_step(
    model: ReferenceModel, batch: Batch, draws: Draws, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[float, Phases]:
    """Take one optimizer step; returns the loss and its phases' seconds."""
    clock = PhaseClock(device)
    with mixed_precision(device):
        loss = model(batch, draws)
    clock.lap("forward")
    loss.backward()
    clock.lap("backward")
    model.mask_gradients()
    optimizer.step()
    optimizer.zero_grad()
    clock.lap("optimizer")
    return float(loss.detach()), clock.phases

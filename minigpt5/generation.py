"""Decoding: sampling rules, voken forcing, stopping, and the batched loop over the language model.

Shapes: B prompts, T prompt positions, H language width, V vocabulary with the new tokens, N vokens a picture.

The published loop feeds all N vokens at once after ``[IMG0]``. Here they are fed one a step: attention is
causal, so every state is the same, and prompts of one batch need not emit their pictures together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt4.tokenizer import LlamaTokenizer
from minigpt5.config import GenerationConfig
from minigpt5.vokens import VokenIds


@dataclass
class Decoded:
    """One finished reply of the language model."""

    token_ids: list[int]
    """Starts with the beginning-of-sequence token; of every voken run only ``[IMG0]``, as published."""
    voken_states: list[Tensor] = field(default_factory=list)
    """One ``[N, H]`` a picture: the states that predict its vokens."""
    step_states: list[Tensor] = field(default_factory=list)
    """Last state ``[H]`` of every decoding step, if asked for."""
    step_scores: list[Tensor] = field(default_factory=list)
    """Scores ``[V]`` that every token was chosen from, if asked for."""


def sample_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on nothing but ``parts``, so a draw is the same in any batch."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def stop_sequences(tokenizer: LlamaTokenizer, text: str) -> list[tuple[int, ...]]:
    """Return every tokenization of a stop string that can end a reply.

    SentencePiece encodes it differently at a word's beginning and behind other text: LLaMA's vocabulary has
    ``###`` as 835 and as 2277 29937. The latter is found by encoding it behind a line break, a byte token
    that nothing merges with.
    """
    prefix = tokenizer.encode("\n")
    behind = tokenizer.encode("\n" + text)
    found = {tuple(tokenizer.encode(text))}
    if behind[: len(prefix)] == prefix:
        found.add(tuple(behind[len(prefix) :]))
    return sorted(found)


def choose_scores(
    logits_V: Tensor,
    token_ids: Sequence[int],
    config: GenerationConfig,
    *,
    forced: int | None = None,
    banned: int | None = None,
) -> Tensor:
    """Apply repetition penalty, temperature, top-k and top-p, in the published order.

    Args:
        logits_V: raw logits of one position.
        token_ids: the reply so far, with the beginning-of-sequence token; these are penalised.
        config: decoding settings.
        forced: a token that must come now, whatever the scores say.
        banned: a token that must not come.
    """
    ids = torch.tensor([list(token_ids)], device=logits_V.device)
    scores = logits_V[None].float()
    if banned is not None:
        scores = scores.clone()
        scores[:, banned] = float("-inf")
    if config.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(ids, scores)
    if config.temperature not in (0.0, 1.0):
        scores = TemperatureLogitsWarper(config.temperature)(ids, scores)
    if config.top_k:
        scores = TopKLogitsWarper(config.top_k)(ids, scores)
    if config.top_p < 1.0:
        scores = TopPLogitsWarper(config.top_p)(ids, scores)
    if forced is not None:
        only = torch.full_like(scores, float("-inf"))
        only[:, forced] = 0.0
        scores = only
    return scores[0]


def choose_token(scores_V: Tensor, config: GenerationConfig, generator: torch.Generator) -> int:
    """Sample from the scores, or take the best where the temperature is 0.

    The draw is made on the CPU, so that a seed gives the same reply on every device.
    """
    if config.temperature == 0.0:
        return int(scores_V.argmax())
    probabilities = torch.softmax(scores_V.cpu(), dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


class _Reply:
    """Decoding state of one prompt of the batch."""

    def __init__(self, bos_id: int, ids: VokenIds, config: GenerationConfig, stops: list[tuple[int, ...]]) -> None:
        self.decoded = Decoded([bos_id])
        self.pending: list[int] = []
        self.collecting: list[Tensor] = []
        self.done = False
        self._ids, self._config, self._stops = ids, config, stops

    @property
    def active(self) -> bool:
        """Whether another step is needed: also to finish the vokens of a picture that came last."""
        return not self.done or 0 < len(self.collecting) < self._ids.count

    def forced_token(self) -> int | None:
        wants = self._config.images == "force" and self._ids.first not in self.decoded.token_ids
        return self._ids.first if wants else None

    def see_state(self, state_H: Tensor) -> None:
        """Take the state of the step's last input token; N of them make a picture's voken states."""
        if self.collecting and len(self.collecting) < self._ids.count:
            self.collecting.append(state_H)
            if len(self.collecting) == self._ids.count:
                self.decoded.voken_states.append(torch.stack(self.collecting))

    def next_input(self, chosen: int | None, state_H: Tensor, eos_id: int) -> int:
        """Record the chosen token (None while vokens are pending) and return the next input token."""
        if self.pending:
            return self.pending.pop(0)
        assert chosen is not None
        tokens = self.decoded.token_ids
        tokens.append(chosen)
        if chosen == self._ids.first:
            self.collecting = [state_H]
            if len(self.collecting) == self._ids.count:
                self.decoded.voken_states.append(torch.stack(self.collecting))
            self.pending = list(self._ids.vokens[1:])
        stopped = any(tuple(tokens[-len(stop) :]) == stop for stop in self._stops)
        self.done = chosen == eos_id or stopped or len(tokens) > self._config.max_new_tokens
        return chosen


@torch.no_grad()
def decode(
    language_model: LlamaForCausalLM,
    embeds: Sequence[Tensor],
    *,
    embed: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    ids: VokenIds,
    tokenizer: LlamaTokenizer,
    config: GenerationConfig,
    generators: Sequence[torch.Generator],
    stops: list[tuple[int, ...]],
    trace: bool = False,
) -> list[Decoded]:
    """Decode replies to a batch of prompts.

    Args:
        language_model: LLaMA; only its decoder stack is called.
        embeds: prompt embeddings ``[T, H]``, one a prompt, with the beginning-of-sequence token.
        embed: token ids ``[B, 1]`` → embeddings ``[B, 1, H]``, new tokens included.
        head: states ``[B, H]`` → logits ``[B, V]``, new tokens included.
        ids: voken ids.
        tokenizer: for the control tokens.
        config: decoding settings.
        generators: one CPU generator a prompt.
        stops: token sequences that end a reply.
        trace: keep every step's last state and scores.
    """
    device = embeds[0].device
    hidden_BTH, mask_BT = _pad_left(embeds)
    cache = DynamicCache(config=language_model.config)
    replies = [_Reply(tokenizer.bos_id, ids, config, stops) for _ in embeds]
    while True:
        positions = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -hidden_BTH.shape[1] :]
        states_BH = language_model.model(
            inputs_embeds=hidden_BTH,
            attention_mask=mask_BT,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits_BV = head(states_BH)
        inputs = []
        for reply, state_H, logits_V, generator in zip(replies, states_BH, logits_BV, generators, strict=True):
            reply.see_state(state_H)
            chosen = None
            if not reply.active:
                inputs.append(tokenizer.pad_id)
                continue
            if not reply.pending and not reply.done:
                scores = choose_scores(
                    logits_V,
                    reply.decoded.token_ids,
                    config,
                    forced=reply.forced_token(),
                    banned=ids.first if config.images == "never" else None,
                )
                chosen = choose_token(scores, config, generator)
                if trace:
                    reply.decoded.step_states.append(state_H)
                    reply.decoded.step_scores.append(scores)
            inputs.append(reply.next_input(chosen, state_H, tokenizer.eos_id))
        if not any(reply.active for reply in replies):
            return [reply.decoded for reply in replies]
        hidden_BTH = embed(torch.tensor(inputs, device=device)[:, None]).to(hidden_BTH.dtype)
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(replies), 1)], dim=1)


def _pad_left(embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return padded embeddings ``[B, T, H]`` and mask ``[B, T]``."""
    longest = max(len(embed) for embed in embeds)
    hidden = embeds[0].new_zeros(len(embeds), longest, embeds[0].shape[1])
    mask = torch.zeros(len(embeds), longest, dtype=torch.long, device=hidden.device)
    for row, embed in enumerate(embeds):
        hidden[row, longest - len(embed) :] = embed
        mask[row, longest - len(embed) :] = 1
    return hidden, mask

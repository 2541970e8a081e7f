"""Decoding: sampling rules, voken forcing, stopping, and the batched loop over the language model.

Shapes: B prompts, T prompt positions, H language width, V vocabulary with the new tokens, N vokens a picture.

The published loop feeds all N vokens at once after ``[IMG0]``. Here a step feeds as many as every unfinished
prompt of the batch has to read: attention is causal, so every state is the same, and prompts need not emit their
pictures together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from minigpt4.tokenizer import LlamaTokenizer
from minigpt5.config import GenerationConfig
from minigpt5.decoding_steps import DecodingSteps
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
    logits_BV: Tensor,
    token_ids: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    forced: Sequence[int | None] = (),
    banned: int | None = None,
) -> Tensor:
    """Apply repetition penalty, temperature, top-k and top-p, in the published order; returns ``[B, V]``.

    Args:
        logits_BV: raw logits of one position.
        token_ids: each reply so far, with the beginning-of-sequence token; these are penalised.
        config: decoding settings.
        forced: for each reply a token that must come now, whatever the scores say, or None.
        banned: a token that must not come.
    """
    scores = logits_BV.float()
    if banned is not None:
        scores = scores.clone()
        scores[:, banned] = float("-inf")
    if config.repetition_penalty != 1.0:
        longest = max(len(ids) for ids in token_ids)
        # A repeated token is penalised once, so the first one fills the shorter replies up.
        padded = [[*ids, *[ids[0]] * (longest - len(ids))] for ids in token_ids]
        ids_BL = torch.tensor(padded, device=scores.device)
        scores = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(ids_BL, scores)
    if config.temperature not in (0.0, 1.0):
        scores = scores / config.temperature
    scores = _keep_likely(scores, config)
    for row, token in enumerate(forced):
        if token is not None:
            scores[row] = float("-inf")
            scores[row, token] = 0.0
    return scores


def _keep_likely(scores_BV: Tensor, config: GenerationConfig) -> Tensor:
    """Return a copy with everything outside top-k and top-p at minus infinity.

    transformers' top-p sorts the whole vocabulary. Behind top-k it is given the few scores that are left: the
    same choice at a fraction of the work. (Which of several equal scores at its boundary stay is up to the sort in
    either case; in the order of their ids, it does not depend on the batch.)
    """
    if not config.top_k:
        return scores_BV.clone() if config.top_p == 1.0 else _top_p(scores_BV, config.top_p)
    kept = min(config.top_k, scores_BV.shape[1])
    smallest_B1 = scores_BV.topk(kept).values[:, -1:]
    # Equal scores at the boundary all stay, as in transformers.
    count = int((scores_BV >= smallest_B1).sum(1).max())
    ids_BC = scores_BV.topk(count).indices.sort().values
    few_BC = scores_BV.gather(1, ids_BC)
    few_BC = few_BC.masked_fill(few_BC < smallest_B1, float("-inf"))
    if config.top_p < 1.0:
        few_BC = _top_p(few_BC, config.top_p)
    return torch.full_like(scores_BV, float("-inf")).scatter(1, ids_BC, few_BC)


def _top_p(scores_BV: Tensor, top_p: float) -> Tensor:
    return TopPLogitsWarper(top_p)(torch.empty(0), scores_BV)


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
        self.queue: list[int] = []
        """What the model is to read next: the chosen token, or what is left of a picture's vokens."""
        self.collecting: list[Tensor] = []
        self.done = False
        self._ids, self._config, self._stops = ids, config, stops

    @property
    def active(self) -> bool:
        """Whether another step is needed: also to finish the vokens of a picture that came last."""
        return not self.done or 0 < len(self.collecting) < self._ids.count

    @property
    def chooses(self) -> bool:
        """Whether the last state decides on a new token."""
        return not self.done and not self.queue

    def forced_token(self) -> int | None:
        wants = self._config.images == "force" and self._ids.first not in self.decoded.token_ids
        return self._ids.first if wants else None

    def see_states(self, states_WH: Tensor) -> None:
        """Take the states of the step's input tokens; N of them make a picture's voken states."""
        if 0 < len(self.collecting) < self._ids.count:
            self.collecting += states_WH[: self._ids.count - len(self.collecting)]
            self._finish_picture()

    def record(self, chosen: int, state_H: Tensor, eos_id: int) -> None:
        """Record the chosen token, which ``state_H`` predicted, and queue what follows from it."""
        tokens = self.decoded.token_ids
        tokens.append(chosen)
        self.queue = [chosen]
        if chosen == self._ids.first:
            self.collecting = [state_H]
            self._finish_picture()
            self.queue = list(self._ids.vokens)
        stopped = any(tuple(tokens[-len(stop) :]) == stop for stop in self._stops)
        self.done = chosen == eos_id or stopped or len(tokens) > self._config.max_new_tokens

    def take(self, count: int) -> list[int]:
        """Return the next tokens to read."""
        taken, self.queue = self.queue[:count], self.queue[count:]
        return taken

    def _finish_picture(self) -> None:
        if len(self.collecting) == self._ids.count:
            self.decoded.voken_states.append(torch.stack(self.collecting))


@torch.no_grad()
def decode(
    steps: DecodingSteps,
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
        steps: the language model.
        embeds: prompt embeddings ``[T, H]``, one a prompt, with the beginning-of-sequence token.
        embed: token ids ``[B, W]`` → embeddings ``[B, W, H]``, new tokens included.
        head: states ``[B, H]`` → logits ``[B, V]``, new tokens included.
        ids: voken ids.
        tokenizer: for the control tokens.
        config: decoding settings.
        generators: one CPU generator a prompt.
        stops: token sequences that end a reply.
        trace: keep every step's last state and scores.
    """
    hidden_BTH, mask_BT = _pad_left(embeds)
    states_BWH = steps.begin(hidden_BTH, mask_BT, config.max_new_tokens + ids.count)
    replies = [_Reply(tokenizer.bos_id, ids, config, stops) for _ in embeds]
    while True:
        for reply, states_WH in zip(replies, states_BWH, strict=True):
            reply.see_states(states_WH)
        choosing = [row for row, reply in enumerate(replies) if reply.chooses]
        if choosing:
            states_CH = states_BWH[choosing, -1]
            banned = ids.first if config.images == "never" else None
            chosen, drawn = [replies[row] for row in choosing], [generators[row] for row in choosing]
            _choose_tokens(chosen, states_CH, head(states_CH), drawn, config, banned, tokenizer.eos_id, trace)
        active = [reply for reply in replies if reply.active]
        if not active:
            return [reply.decoded for reply in replies]
        # Vokens enter together where every reply has some to read, else one by one: causal attention gives the
        # same states.
        width = min(len(reply.queue) for reply in active)
        inputs = [reply.take(width) if reply.active else [tokenizer.pad_id] * width for reply in replies]
        hidden_BWH = embed(torch.tensor(inputs, device=hidden_BTH.device)).to(hidden_BTH.dtype)
        states_BWH = steps.go_on(hidden_BWH)


def _choose_tokens(
    replies: Sequence[_Reply],
    states_CH: Tensor,
    logits_CV: Tensor,
    generators: Sequence[torch.Generator],
    config: GenerationConfig,
    banned: int | None,
    eos_id: int,
    trace: bool,
) -> None:
    """Choose the next token of each of these replies."""
    scores_CV = choose_scores(
        logits_CV,
        [reply.decoded.token_ids for reply in replies],
        config,
        forced=[reply.forced_token() for reply in replies],
        banned=banned,
    )
    if config.temperature > 0:
        scores_CV = scores_CV.cpu()  # where tokens are drawn: one transfer for all replies
    for reply, state_H, scores_V, generator in zip(replies, states_CH, scores_CV, generators, strict=True):
        if trace:
            reply.decoded.step_states.append(state_H)
            reply.decoded.step_scores.append(scores_V)
        reply.record(choose_token(scores_V, config, generator), state_H, eos_id)


def _pad_left(embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return padded embeddings ``[B, T, H]`` and mask ``[B, T]``."""
    longest = max(len(embed) for embed in embeds)
    hidden = embeds[0].new_zeros(len(embeds), longest, embeds[0].shape[1])
    mask = torch.zeros(len(embeds), longest, dtype=torch.long, device=hidden.device)
    for row, embed in enumerate(embeds):
        hidden[row, longest - len(embed) :] = embed
        mask[row, longest - len(embed) :] = 1
    return hidden, mask

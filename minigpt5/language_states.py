"""The language model's last hidden states of a training batch, with a backward pass no longer than it has to be.

In the alignment stage the language model is frozen and attention is causal, so a position's state depends on a
trainable parameter only if a trained token stands at it or before it. The positions before each sample's first
voken, nearly all of them, are constants: they run without a graph, and the rest attends to their keys and values.

Shapes: B samples, T positions, H language width, C positions run without a graph, S positions run with one.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from minigpt5.adapters import Prefix
from minigpt5.assembly import Assembled
from minigpt5.kv_cache import as_argument


def last_states(
    language_model: LlamaForCausalLM, prompt: Assembled, dtype: torch.dtype, prefix: Prefix | None = None
) -> Tensor:
    """Return the last hidden states ``[B, T, H]``; those of padding mean nothing.

    Args:
        language_model: LLaMA, adapted or not; only its decoder stack is called.
        prompt: a batch with its pictures in place.
        dtype: what the language model computes in.
        prefix: trained keys and values in front of the text.
    """
    embeds_BTH = prompt.embeds_BTH.to(dtype)
    model = language_model.model
    if prefix is not None:
        return _states_behind_prefix(language_model, embeds_BTH, prompt, prefix)
    if torch.is_grad_enabled() and not any(parameter.requires_grad for parameter in model.parameters()):
        return _states_behind_constants(language_model, embeds_BTH, prompt)
    return model(inputs_embeds=embeds_BTH, attention_mask=prompt.mask_BT, use_cache=False).last_hidden_state


def _states_behind_prefix(
    language_model: LlamaForCausalLM, embeds_BTH: Tensor, prompt: Assembled, prefix: Prefix
) -> Tensor:
    """Run the whole batch with a graph: the prefix reaches every position."""
    cache = DynamicCache(config=language_model.config)
    prefix.fill(cache, len(embeds_BTH), embeds_BTH.dtype)
    return language_model.model(
        inputs_embeds=embeds_BTH,
        attention_mask=torch.nn.functional.pad(prompt.mask_BT, (cache.get_seq_length(), 0), value=1),
        position_ids=torch.arange(embeds_BTH.shape[1], device=embeds_BTH.device)[None],
        **as_argument(cache),
        use_cache=True,
    ).last_hidden_state


def _states_behind_constants(language_model: LlamaForCausalLM, embeds_BTH: Tensor, prompt: Assembled) -> Tensor:
    """Run each sample's constant positions without a graph, then the others with one."""
    constant_B, length = prompt.constant_B, embeds_BTH.shape[1]
    longest = int(constant_B.max())
    cache = DynamicCache(config=language_model.config)
    with torch.no_grad():
        hidden_BCH = language_model.model(
            inputs_embeds=embeds_BTH.detach()[:, :longest],
            attention_mask=prompt.mask_BT[:, :longest],
            **as_argument(cache),
            use_cache=True,
        ).last_hidden_state
    # At least one, so that each process runs the layers equally often, forwards and backwards (--strategy fsdp).
    count = max(1, int((prompt.mask_BT.sum(1) - constant_B).max()))
    positions_BS = constant_B[:, None] + torch.arange(count, device=constant_B.device)
    inside_BS = positions_BS < length
    positions_BS = positions_BS.clamp(max=length - 1)
    rows_B1 = torch.arange(len(constant_B), device=constant_B.device)[:, None]
    hidden_BSH = language_model.model(
        inputs_embeds=embeds_BTH[rows_B1, positions_BS],
        attention_mask=_suffix_mask(constant_B, longest, count, embeds_BTH.dtype),
        position_ids=positions_BS,
        **as_argument(cache),
        use_cache=True,
    ).last_hidden_state
    hidden_BTH = torch.nn.functional.pad(hidden_BCH, (0, 0, 0, length - longest))
    target = (rows_B1.expand_as(positions_BS)[inside_BS], positions_BS[inside_BS])
    return hidden_BTH.index_put(target, hidden_BSH[inside_BS])


def _suffix_mask(constant_B: Tensor, longest: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask ``[B, 1, S, C + S]``: a sample's own constants, then its own past.

    A shorter sample's further positions of the first run are seen by none: they come again in the second.
    """
    own_BC = torch.arange(longest, device=constant_B.device) < constant_B[:, None]
    past_SS = torch.ones(count, count, dtype=torch.bool, device=constant_B.device).tril()
    samples = len(constant_B)
    seen_BSX = torch.cat([own_BC[:, None].expand(-1, count, -1), past_SS.expand(samples, -1, -1)], dim=2)
    mask = torch.zeros(seen_BSX.shape, dtype=dtype, device=constant_B.device)
    return mask.masked_fill(~seen_BSX, torch.finfo(dtype).min)[:, None]

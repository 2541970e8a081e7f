"""What adapts the frozen language model in the multimodal stage: LoRA, a trained prefix, or nothing.

Shapes: B samples, K layers, A key-value heads, P prefix positions, D head width.
"""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from minigpt5.config import AdapterConfig


class Prefix(nn.Module):
    """Trained keys and values in front of every layer's own (prefix tuning, Li and Liang 2021, section 4).

    Every position reads them; they stand at no position: the text's rotary positions begin at 0 as without them,
    and the keys are kept as they are attended to, unrotated. They are trained directly, without the paper's
    reparametrisation. They start as small as the language model's own weights did (normal, its
    ``initializer_range``): attended to, but adding next to nothing.

    Args:
        config: the language model's sizes.
        length: P.
    """

    def __init__(self, config: LlamaConfig, length: int) -> None:
        super().__init__()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, config.num_key_value_heads, length, width)
        self.keys_KAPD = nn.Parameter(torch.randn(shape) * config.initializer_range)
        self.values_KAPD = nn.Parameter(torch.randn(shape) * config.initializer_range)

    def fill(self, cache: Cache, samples: int, dtype: torch.dtype) -> None:
        """Put the prefix in front of an empty cache, once for each of B samples."""
        for layer, pair in enumerate(zip(self.keys_KAPD, self.values_KAPD, strict=True)):
            keys_BAPD, values_BAPD = (part_APD.to(dtype).expand(samples, -1, -1, -1) for part_APD in pair)
            cache.update(keys_BAPD, values_BAPD, layer)


def adapt(language_model: LlamaForCausalLM, config: AdapterConfig) -> Prefix | None:
    """Adapt a frozen language model; returns the prefix, where that is the adapter.

    LoRA is injected in place; its parameters are float32 whatever the model's own are.
    """
    if config.kind == "prefix":
        return Prefix(language_model.config, config.prefix_length)
    if config.kind == "lora":
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            bias="none",
        )
        inject_adapter_in_model(lora, language_model)
        for name, parameter in language_model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    return None

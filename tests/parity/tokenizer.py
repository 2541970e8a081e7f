"""Token ids, decoding and cutting beside the published tokenizer's recordings."""

import json
from collections.abc import Iterator
from pathlib import Path

from minigpt4.tokenizer import LlamaTokenizer
from tests.parity.rows import Row, compare_exact

GROUP = "data:tokenizer"


def compare_tokenizer(folder: Path) -> Iterator[Row]:
    """Compare every case of a ``data/tokenizer/`` folder."""
    record = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    tokenizer = LlamaTokenizer(folder / "tokenizer.model")
    added = tokenizer.add_tokens(record["special_tokens"])
    yield compare_exact(GROUP, "special_tokens", added, list(record["special_tokens"].values()))
    known = {
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "unk_token_id": tokenizer.unk_id,
        "len": len(tokenizer),
        "sp_size": tokenizer.base_size,
    }
    for name, ours in known.items():
        yield compare_exact(GROUP, name, ours, record[name])
    for index, case in enumerate(record["encode"]):
        ids = tokenizer.encode(case["text"])
        yield compare_exact(GROUP, f"encode.{index}.ids", ids, case["ids"])
        tokens = [tokenizer.id_to_token(token) for token in ids]
        yield compare_exact(GROUP, f"encode.{index}.tokens", tokens, case["tokens"])
        with_bos = tokenizer.encode(case["text"], add_bos=True)
        yield compare_exact(GROUP, f"encode.{index}.ids_with_bos", with_bos, case["ids_with_bos"])
        yield from _decoded(tokenizer, f"encode.{index}", case)
    for index, case in enumerate(record["decode"]):
        yield from _decoded(tokenizer, f"decode.{index}", case)
    for name, cases in record.items():
        if name.startswith("truncated_model_max_length_"):
            short = LlamaTokenizer(folder / "tokenizer.model", max_length=int(name.rsplit("_", 1)[1]))
            short.add_tokens(record["special_tokens"])
            for index, case in enumerate(cases):
                yield compare_exact(GROUP, f"{name}.{index}", short.encode(case["text"]), case["ids"])


def _decoded(tokenizer: LlamaTokenizer, name: str, case: dict) -> Iterator[Row]:
    yield compare_exact(GROUP, f"{name}.decoded", tokenizer.decode(case["ids"]), case["decoded"])
    plain = tokenizer.decode(case["ids"], skip_special=True)
    yield compare_exact(GROUP, f"{name}.decoded_skip_special", plain, case["decoded_skip_special"])

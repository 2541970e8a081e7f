"""Runs the production model on a folder of recorded values and compares every one.

The folder holds weights in the published layouts, inputs, and what the published code made of them. Nothing is
computed here that the package does not compute: this module only feeds inputs and picks intermediate values.
"""

import dataclasses
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from minigpt4.config import BackboneConfig, LanguageModelConfig, QFormerConfig, VisionConfig
from minigpt4.language_model import load_tokenizer
from minigpt4.weights import read_state
from minigpt5.checkpoint import load_checkpoint, read_checkpoint
from minigpt5.checkpoint_layouts import find_published_name, to_published
from minigpt5.config import (
    DiffusionConfig,
    GenerationConfig,
    LossConfig,
    ModelConfig,
    Stage,
    TrainingConfig,
    VokenConfig,
)
from minigpt5.data.types import INPUT_PICTURE, Batch, Prompt, Sample, Task
from minigpt5.diffusion import DiffusionDraws, load_clip_tokenizer
from minigpt5.images import input_transform
from minigpt5.losses import Draws, Losses
from minigpt5.model import MiniGPT5, build_model
from minigpt5.training import build_optimizer
from minigpt5.vokens import gather_vokens, voken_starts, voken_tokens
from tests.parity.rows import Recorded, Row, compare_exact, compare_tensor, not_compared

TIGHT = 1e-4
PICTURE = 1e-3
PUBLISHED_STOPS = [(835,), (2277, 29937)]
"""The published code writes LLaMA's ids of ``###`` down, also where a fixture's vocabulary has others."""
STAGES = {1: Stage.ALIGNMENT, 2: Stage.MULTIMODAL}
INPUT_PICTURES = {0: (), 1: ("im4",), 2: ("im2", "im1")}
ADAM_FLOOR = 1e-6
"""After an Adam step, entries whose gradient is smaller than this are noise."""


def compare_model(folder: Path) -> list[Row]:
    """Compare both stages, tokenization and checkpoint export of a ``model/`` folder."""
    rows = list(_tokenization(folder))
    for number in STAGES:
        fixture = StageFixture(folder, number)
        rows += [*_rows_at_start(fixture), *fixture.load_rows, *_pictures(fixture), *_forward(fixture)]
        rows += [*_variants(fixture), *_gradients(fixture)]
        rows += [*_generation(fixture), *_sampled(fixture), *_export(fixture)]
        second = StageFixture(folder, number)
        rows += _optimizer(second)
        unused = set(fixture.golden.unused()) & set(second.golden.unused())
        rows += [not_compared(fixture.group, key, "no rule for this value") for key in sorted(unused)]
    return rows


class StageFixture:
    """One stage's recorded values and the production model with that stage's checkpoint."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number, self.stage = folder, number, STAGES[number]
        self.group = f"stage{number}"
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.inputs = load_file(folder / "inputs.safetensors")
        self.golden = Recorded(load_file(folder / f"golden_stage{number}.safetensors"))
        self.record = json.loads((folder / f"golden_stage{number}.json").read_text(encoding="utf-8"))
        self.model = build_model(
            model_config(folder, self.config["dims"], self.voken_count), LossConfig(), self.stage
        )
        self.fresh_rows = {
            "embed_new_rows_init": self.model.rows.embedding.detach().clone(),
            "lm_head_new_rows_init": self.model.rows.head.detach().clone(),
        }
        self.load_rows = [self._load(1)] + ([self._load(2)] if number == 2 else [])
        self.model.eval()

    def _load(self, number: int) -> Row:
        path = self.folder / f"stage{number}.ckpt"
        report = load_checkpoint(self.model, path, STAGES[number], "parity")
        recorded = json.loads((self.folder / f"keys_stage{number}.json").read_text(encoding="utf-8"))
        # each whole matrix is counted twice: its frozen rows and its new ones
        return compare_exact(self.group, f"load.stage{number}.keys", len(report.loaded), recorded["n"] + 2)

    @property
    def voken_count(self) -> int:
        return sum(token.startswith("[IMG") for token in self.record["ids"])

    @cached_property
    def batch(self) -> Batch:
        texts = self.record["batch"]
        counts = [source.count(INPUT_PICTURE) for source in texts["source"]]
        wants = [voken_tokens(1)[0] in target for target in texts["target"]]
        pictures = [self.inputs[f"batch.input_images.{row}"] for row, count in enumerate(counts) if count]
        return self._batch("batch", list(range(len(counts))), counts, wants, torch.cat(pictures))

    def _batch(
        self, prefix: str, order: list[int], counts: list[int], wants: list[bool], pixels: Tensor | None
    ) -> Batch:
        texts = self.record["batch"]
        samples = [
            Sample(
                id=texts["task_name"][row],
                task=Task.MULTIMODAL,
                prompt=texts["source"][row],
                response=texts["target"][row],
                caption=texts["caption"][row],
            )
            for row in order
        ]
        wanted = [row for row in order if wants[row]]
        return Batch(
            samples=samples,
            input_ids_BT=self.inputs[f"{prefix}.input_ids"].long(),
            attention_mask_BT=self.inputs[f"{prefix}.attention_mask"].long(),
            labels_BT=self.inputs[f"{prefix}.labels"].long(),
            input_counts=[counts[row] for row in order],
            output_counts=[int(wants[row]) for row in order],
            input_pixels_P3HW=pixels,
            output_pixels_O3HW=self.inputs["batch.output_image"][wanted] if wanted else None,
        )

    @cached_property
    def text_only(self) -> Batch:
        row = self.record["order"].index("c")
        counts = [source.count(INPUT_PICTURE) for source in self.record["batch"]["source"]]
        pixels = self.inputs[f"batch.input_images.{row}"]
        return self._batch("text_only_c", [row], counts, [False] * len(counts), pixels)

    def draws(self, dropped: list[bool] | None = None, seed: int | None = None) -> Draws:
        """The recorded draws, or for another seed those the published code makes with it."""
        runs = len(self.golden["main.timesteps"])
        drop = torch.tensor(dropped if dropped is not None else [False] * runs)
        if seed is None:
            recorded = (self.golden[f"main.{name}"] for name in ("vae_eps", "noise", "timesteps"))
            posterior, noise, timesteps = recorded
            return Draws(drop, DiffusionDraws(posterior, noise, timesteps.long()))
        return Draws(drop, self._seeded(seed, self._noise_layout))

    def _seeded(self, seed: int, layout: torch.memory_format) -> DiffusionDraws:
        generator = torch.Generator().manual_seed(seed)
        shape = self.golden["main.noise"].shape
        posterior = torch.randn(shape, generator=generator)
        noise = torch.empty(shape).contiguous(memory_format=layout).normal_(generator=generator)
        return DiffusionDraws(posterior, noise, torch.randint(0, 1000, (len(noise),), generator=generator))

    @cached_property
    def _noise_layout(self) -> torch.memory_format:
        """The published code draws noise in the latents' memory layout, which the recording machine chose."""
        for layout in (torch.contiguous_format, torch.channels_last):
            seeded = self._seeded(self.config["dims"]["seed"] + 10, layout)
            if torch.equal(seeded.noise_RCHW, self.golden["main.noise"]):
                return layout
        return torch.contiguous_format

    def tensor(
        self, name: str, ours: Tensor, tolerance: float = TIGHT, golden: str | None = None
    ) -> Iterator[Row]:
        """Compare with a recorded tensor, if the folder has it."""
        key = golden or name
        if key in self.golden:
            yield compare_tensor(self.group, name, ours, self.golden[key], tolerance)


def model_config(folder: Path, dims: dict[str, Any], vokens: int) -> ModelConfig:
    """Return the configuration of a fixture's sizes; those its record leaves out are read off the files."""
    vision, qformer = dims["vit"], dims["qf"]
    eva = read_state(folder / "eva_vit.pth")
    return ModelConfig(
        backbone=BackboneConfig(
            vision=VisionConfig(
                weights=str(folder / "eva_vit.pth"),
                image_size=dims["img_size"],
                patch_size=eva["patch_embed.proj.weight"].shape[-1],
                hidden_size=vision["dim"],
                intermediate_size=eva["blocks.0.mlp.fc1.weight"].shape[0],
                num_layers=vision["depth"],
                num_heads=vision["heads"],
            ),
            qformer=QFormerConfig(
                weights=str(folder / "blip2_qformer.pth"),
                hidden_size=qformer["hidden"],
                intermediate_size=qformer["inter"],
                num_layers=qformer["layers"],
                num_heads=qformer["heads"],
                num_queries=qformer["queries"],
            ),
            projection_weights=str(folder / "minigpt4.pth"),
            language_model=LanguageModelConfig(weights=str(folder / "llama")),
        ),
        vokens=VokenConfig(count=vokens),
        diffusion=DiffusionConfig(weights=str(folder / "sd"), image_size=dims["out_size"]),
    )


def _tokenization(folder: Path) -> Iterator[Row]:
    record = json.loads((folder / "tokenization.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(folder / "llama")
    added = tokenizer.add_tokens(record["added"])
    yield compare_exact("tokenization", "added", added, list(record["added"].values()))
    for key, ours in {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}.items():
        yield compare_exact("tokenization", key, ours, record[key])
    for index, case in enumerate(record["llama"]):
        name = f"llama.{index}"
        yield compare_exact("tokenization", f"{name}.ids", tokenizer.encode(case["text"]), case["ids"])
        with_bos = tokenizer.encode(case["text"], add_bos=True)
        yield compare_exact("tokenization", f"{name}.ids_with_special", with_bos, case["ids_with_special"])
        yield compare_exact("tokenization", f"{name}.decoded", tokenizer.decode(case["ids"]), case["decoded"])
    clip = load_clip_tokenizer(folder / "sd" / "tokenizer")
    for index, case in enumerate(record["clip"]):
        found = clip.encode_padded([case["text"]])
        yield compare_exact("tokenization", f"clip.{index}.ids", found["input_ids"][0].tolist(), case["ids"])
        mask = found["attention_mask"][0].tolist()
        yield compare_exact("tokenization", f"clip.{index}.mask", mask, case["attention_mask"])


def _rows_at_start(fixture: StageFixture) -> Iterator[Row]:
    golden = load_file(fixture.folder / "golden_init.safetensors")
    yield compare_tensor(
        fixture.group,
        "init.embed_new_rows",
        fixture.fresh_rows["embed_new_rows_init"],
        golden["embed_new_rows_init"],
        TIGHT,
    )
    if fixture.config["dims"].get("stop_id") is None:
        ours = fixture.fresh_rows["lm_head_new_rows_init"]
        yield compare_tensor(fixture.group, "init.lm_head_new_rows", ours, golden["lm_head_new_rows_init"], TIGHT)
    else:
        why = "recorded before one row of the language model's head was edited (stop_id)"
        yield not_compared(fixture.group, "init.lm_head_new_rows", why)


def _pictures(fixture: StageFixture) -> Iterator[Row]:
    """Transforms and every stage of picture encoding."""
    transform = input_transform(fixture.config["dims"]["img_size"])
    for prompt, names in INPUT_PICTURES.items():
        if names:
            pixels = torch.stack([transform(open_rgb(fixture.folder, name)) for name in names])
            yield compare_tensor(
                fixture.group,
                f"gen.{prompt}.input_images",
                pixels,
                fixture.inputs[f"gen.{prompt}.input_images"],
                TIGHT,
            )
    backbone = fixture.model.backbone
    with_pictures = [row for row, count in enumerate(fixture.batch.input_counts) if count]
    for index, row in enumerate(with_pictures):
        pixels = fixture.inputs[f"batch.input_images.{row}"]
        hidden = backbone.vision.hidden_states(pixels)
        patches = backbone.vision(pixels)
        yield from fixture.tensor(f"main.vit_out.{index}", hidden)
        yield from fixture.tensor(f"main.ln_vision.{index}", patches)
        yield from fixture.tensor(f"main.qformer_out.{index}", backbone.qformer(patches))
        yield from fixture.tensor(f"main.encode_img.{index}", backbone.encode_images(pixels))


def open_rgb(folder: Path, name: str) -> Image.Image:
    """Open one of the folder's pictures."""
    return Image.open(folder / "images" / f"{name}.png").convert("RGB")


@torch.no_grad()
def _forward(fixture: StageFixture) -> Iterator[Row]:
    """The main variant, value by value."""
    model, batch, draws = fixture.model, fixture.batch, fixture.draws()
    states = model.language_states(batch)
    lengths = [len(ids) + 1 for ids in batch.input_ids_BT]
    queries = model.config.backbone.qformer.num_queries
    for row, (length, count) in enumerate(zip(lengths, batch.input_counts, strict=True)):
        end = length + count * (queries - 1)
        yield from fixture.tensor(f"main.wrapped_embeds.{row}", states.prompt.embeds_BTH[row : row + 1, :end])
        yield from fixture.tensor(f"main.wrapped_atts.{row}", states.prompt.mask_BT[row : row + 1, :end], 0.0)
        yield from fixture.tensor(f"main.wrapped_labels.{row}", states.prompt.labels_BT[row : row + 1, :end], 0.0)
    yield from fixture.tensor("main.padded_attention_mask", states.prompt.mask_BT, 0.0)
    yield from fixture.tensor("main.padded_labels", states.prompt.labels_BT, 0.0)
    yield from fixture.tensor("main.last_hidden_state", states.hidden_BTH)
    starts = voken_starts(states.prompt.labels_BT, model.voken_ids)
    yield from fixture.tensor("main.output_token_index", starts, 0.0)
    vokens = gather_vokens(states.hidden_BTH, starts, model.voken_ids.count)
    yield from fixture.tensor("main.fc_in", vokens)
    yield from fixture.tensor("main.logits_at_voken_positions", model.logits(vokens))
    yield from fixture.tensor("main.fc_out", model.mapper.mlp(vokens))
    condition = model.condition(vokens)
    yield from fixture.tensor("main.mapping_feature", condition)
    captions = [batch.captions[row] or "" for row in starts[:, 0].tolist()]
    yield from fixture.tensor("main.encode_caption", model.diffusion.encode_captions(captions))
    yield from fixture.tensor("empty_text_feature", model.diffusion.encode_captions([""]))
    yield from _diffusion(fixture, condition, draws.diffusion)
    seeded = fixture.draws(seed=fixture.config["dims"]["seed"] + 10).diffusion
    yield from fixture.tensor("main.vae_eps", seeded.posterior_RCHW, 0.0)
    yield from fixture.tensor("main.noise", seeded.noise_RCHW, 0.0)
    yield from fixture.tensor("main.timesteps", seeded.timesteps_R, 0.0)
    text_only = voken_starts(model.language_states(fixture.text_only).prompt.labels_BT, model.voken_ids)
    yield from fixture.tensor("text_only_c.output_token_index", text_only, 0.0)


def _diffusion(fixture: StageFixture, condition: Tensor, draws: DiffusionDraws) -> Iterator[Row]:
    diffusion = fixture.model.diffusion
    assert fixture.batch.output_pixels_O3HW is not None
    moments = diffusion.encode_pixels(fixture.batch.output_pixels_O3HW)
    latents = diffusion.sample_latents(moments, draws.posterior_RCHW)
    noisy = diffusion.schedule.add_noise(latents, draws.noise_RCHW, draws.timesteps_R)
    predicted = diffusion.predict(noisy, draws.timesteps_R, condition)
    yield from fixture.tensor("main.vae_moments", moments)
    every_picture = diffusion.encode_pixels(fixture.inputs["batch.output_image"])
    yield from fixture.tensor("feat.output_image_feature", every_picture)
    yield from fixture.tensor("main.latents_scaled", latents)
    yield from fixture.tensor("main.noisy_latents", noisy)
    yield from fixture.tensor("main.unet_pred", predicted)
    weights = diffusion.snr_weights(draws.timesteps_R, 5.0)
    yield from fixture.tensor("main.snr_weight", weights)
    yield from fixture.tensor("main.snr", diffusion.signal_to_noise(draws.timesteps_R))
    error = (predicted - draws.noise_RCHW).square().mean(dim=(1, 2, 3))
    yield from fixture.tensor("main.image_loss_per_sample_unweighted", error)


def _losses(fixture: StageFixture, name: str, losses: Losses) -> Iterator[Row]:
    recorded = fixture.record["losses"][name]
    ours = losses.as_dict()
    yield compare_exact(fixture.group, f"{name}.loss_terms", sorted(ours), sorted(recorded))
    for term, value in recorded.items():
        if term in ours:
            yield compare_tensor(fixture.group, f"{name}.{term}", ours[term], value, TIGHT)


def _variants(fixture: StageFixture) -> Iterator[Row]:
    """Total loss in all recorded variants."""
    model, batch = fixture.model, fixture.batch
    runs = len(fixture.golden["main.timesteps"])
    yield from _losses(fixture, "main", model(batch, fixture.draws()))
    with torch.no_grad():
        yield from _losses(fixture, "main_nograd", model(batch, fixture.draws()))
        model.loss_config = LossConfig(min_snr_gamma=None)
        yield from _losses(fixture, "nosnr", model(batch, fixture.draws()))
        model.loss_config = LossConfig()
        yield from _losses(fixture, "dropall", model(batch, fixture.draws([True] * runs)))
        yield from _dropped(fixture, runs)
        first = [index == 0 for index in range(runs)]
        yield from _losses(fixture, "drop_first_voken_sample", model(batch, fixture.draws(first)))
        uncaptioned = dataclasses.replace(
            batch, samples=[*batch.samples[:-1], dataclasses.replace(batch.samples[-1], caption=None)]
        )
        yield from _losses(fixture, "one_caption_None", model(uncaptioned, fixture.draws()))
        yield from _losses(fixture, "text_only_c", model(fixture.text_only, fixture.draws([])))
        yield from _losses(fixture, "features", model(_with_features(fixture), fixture.draws()))


def _dropped(fixture: StageFixture, runs: int) -> Iterator[Row]:
    model = fixture.model
    zeros = torch.zeros_like(fixture.golden["dropall.fc_in"])
    yield from fixture.tensor("dropall.fc_in", zeros)
    yield from fixture.tensor("dropall.fc_out", model.mapper.mlp(zeros))
    condition = model.condition(fixture.golden["main.fc_in"], torch.ones(runs, dtype=torch.bool))
    yield from fixture.tensor("dropall.mapping_feature", condition)
    draws = fixture.draws().diffusion
    yield from fixture.tensor("dropall.noise", draws.noise_RCHW, 0.0)
    yield from fixture.tensor("dropall.timesteps", draws.timesteps_R, 0.0)
    noisy = fixture.golden["main.noisy_latents"]
    yield from fixture.tensor("dropall.unet_pred", model.diffusion.predict(noisy, draws.timesteps_R, condition))


def _with_features(fixture: StageFixture) -> Batch:
    """The batch with precomputed projections and VAE moments instead of pixels."""
    batch = fixture.batch
    assert batch.input_pixels_P3HW is not None
    moments = fixture.golden.get("feat.output_image_feature")
    wanted = [row for row, count in enumerate(batch.output_counts) if count]
    return dataclasses.replace(
        batch,
        input_features_PLH=fixture.model.backbone.encode_images(batch.input_pixels_P3HW),
        input_pixels_P3HW=None,
        output_moments_OCHW=moments[wanted] if moments is not None else None,
        output_pixels_O3HW=None if moments is not None else batch.output_pixels_O3HW,
    )


def _published_parameters(fixture: StageFixture) -> dict[str, Tensor]:
    """Trainable parameters under their recorded names; the two matrices are represented by their new rows."""
    model = fixture.model
    named = {"embed_new_rows": model.rows.embedding, "lm_head_new_rows": model.rows.head}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("rows."):
            named[find_published_name(name, fixture.stage)] = parameter
    return named


def _gradients(fixture: StageFixture) -> Iterator[Row]:
    model = fixture.model
    model.zero_grad()
    model(fixture.batch, fixture.draws()).total.backward()
    named = _published_parameters(fixture)
    matrices = {"embed_tokens": "embed_new_rows", "lm_head": "lm_head_new_rows"}
    recorded = fixture.record["grad_norm_after_reset"]
    ours = {name: parameter.grad for name, parameter in named.items()}
    for name, norm in recorded.items():
        key = next((rows for matrix, rows in matrices.items() if matrix in name), name)
        gradient = ours.get(key)
        value = float("nan") if gradient is None else gradient.norm()
        yield compare_tensor(fixture.group, f"grad_norm.{name}", value, norm, TIGHT)
    yield compare_exact(fixture.group, "grad.number_of_tensors", len(named), len(recorded))
    total = torch.stack([gradient.norm() for gradient in ours.values() if gradient is not None]).norm()
    yield compare_tensor(
        fixture.group, "grad.total_norm", total, fixture.record["grad_total_norm_after_reset"], TIGHT
    )
    for key in fixture.golden:
        if key.startswith("grad."):
            gradient = ours.get(key.removeprefix("grad."))
            found = torch.full_like(fixture.golden[key], float("nan")) if gradient is None else gradient
            yield compare_tensor(fixture.group, key, found, fixture.golden[key], TIGHT)


def _optimizer(fixture: StageFixture) -> list[Row]:
    """Two AdamW steps with the recorded schedule; frozen rows must not move at all (a decided difference)."""
    model, group = fixture.model, fixture.group
    rows: list[Row] = []
    record = fixture.record["optimizer"]
    optimizer = build_optimizer(model, TrainingConfig())
    settings = {(group["weight_decay"], group["eps"], tuple(group["betas"])) for group in optimizer.param_groups}
    recorded = {(entry["weight_decay"], entry["eps"], tuple(entry["betas"])) for entry in record["groups"]}
    rows.append(compare_exact(group, "opt.settings", settings, recorded))
    rates = sorted({entry["lr"] for entry in record["groups"]})
    ours = sorted({entry["lr"] for entry in optimizer.param_groups})
    rows.append(compare_tensor(group, "opt.learning_rates", ours, rates, TIGHT))
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 1000)
    backbone = model.backbone
    frozen = {"embed": backbone.embedding_VH.clone(), "lm_head": backbone.head_VH.clone()}
    small: dict[str, Tensor] = {}
    for index, step in enumerate(record["steps"], start=1):
        optimizer.zero_grad()
        loss = model(fixture.batch, fixture.draws(seed=step["seed"])).total
        loss.backward()
        rows.append(compare_tensor(group, f"opt.step{index}.loss", loss, step["loss"], TIGHT))
        named = _published_parameters(fixture)
        for name, parameter in named.items():
            assert parameter.grad is not None
            noise = parameter.grad.abs() <= ADAM_FLOOR
            small[name] = small.get(name, torch.zeros_like(noise)) | noise
        optimizer.step()
        schedule.step()
        for key in fixture.golden:
            name = key.removeprefix(f"opt.step{index}.")
            if name != key and name in named:
                golden = fixture.golden[key]
                ours = torch.where(small[name], golden, named[name].detach())
                note = f"{int(small[name].sum())} of {golden.numel()} below the gradient floor"
                rows.append(dataclasses.replace(compare_tensor(group, key, ours, golden, TIGHT), note=note))
        rows += _published_decay(fixture, index)
    after = {"embed": backbone.embedding_VH, "lm_head": backbone.head_VH}
    for name, before in frozen.items():
        unmoved = torch.equal(after[name], before)
        rows.append(compare_exact(group, f"opt.{name}_frozen_rows_unmoved", unmoved, True))
    return rows


def _published_decay(fixture: StageFixture, steps: int) -> Iterator[Row]:
    """The published frozen rows differ from ours by AdamW's decay and nothing else."""
    weights = {"embed": fixture.model.backbone.embedding_VH, "lm_head": fixture.model.backbone.head_VH}
    for name, weight in weights.items():
        key = f"opt.step{steps}.{name}_rows_0_3"
        for step in fixture.record["optimizer"]["steps"][:steps]:
            weight = weight * (1 - step["lr_used"][0] * TrainingConfig().weight_decay)
        for row in fixture.tensor(f"{key} (decayed)", weight[:3], golden=key):
            yield dataclasses.replace(row, note="ours, which do not move, times the published decay")


def _prompts(fixture: StageFixture) -> list[Prompt]:
    return [
        Prompt(
            str(index),
            fixture.record["gen"][f"gen.{index}.free"]["utterance"],
            tuple(open_rgb(fixture.folder, name) for name in names),
        )
        for index, names in INPUT_PICTURES.items()
    ]


def _generation(fixture: StageFixture) -> Iterator[Row]:
    """Greedy decoding one by one and batched, conditioning, latents and pictures."""
    model, requests = fixture.model, _prompts(fixture)
    settings = GenerationConfig(temperature=0.0, max_new_tokens=32, num_inference_steps=8)
    for mode, policy in (("free", "auto"), ("force", "force")):
        config = dataclasses.replace(settings, images=policy)
        batched = model.decode_prompts(requests, config, stops=PUBLISHED_STOPS, trace=True)
        for index, request in enumerate(requests):
            name = f"gen.{index}.{mode}"
            record = fixture.record["gen"][name]
            (alone,) = model.decode_prompts([request], config, stops=PUBLISHED_STOPS, trace=True)
            yield compare_exact(fixture.group, f"{name}.sequences", alone.token_ids, record["sequences"])
            yield from _sequence(fixture, name, alone.token_ids)
            together = batched[index].token_ids
            yield compare_exact(fixture.group, f"{name}.sequences_batched", together, record["sequences"])
            text = model.tokenizer.decode(alone.token_ids)
            yield compare_exact(fixture.group, f"{name}.text", text, record["text"])
            states = torch.stack(alone.step_states)
            yield from fixture.tensor(f"{name}.step_hidden", states)
            yield from _top_logits(fixture, name, states)
            yield compare_exact(fixture.group, f"{name}.has_image", bool(alone.voken_states), record["has_image"])
            if alone.voken_states:
                yield from _picture(fixture, name, alone.voken_states[0], config)
                both = torch.stack([alone.voken_states[0], batched[index].voken_states[0]])
                yield compare_tensor(fixture.group, f"{name}.vokens_batched", both[1], both[0], TIGHT)
    pixels = model.diffusion.caption_pixels(
        [fixture.record["gen_caption_prompt"]], fixture.inputs["gen.latents"], settings
    )
    yield from fixture.tensor("gen.image_from_caption", pixels[0].permute(1, 2, 0), PICTURE)


def _sequence(fixture: StageFixture, name: str, token_ids: list[int]) -> Iterator[Row]:
    """The ids as the tensors' file records them, beside the JSON record's."""
    key = f"{name}.sequences"
    if key in fixture.golden:
        yield compare_exact(fixture.group, f"{key} (tensor)", torch.tensor(token_ids), fixture.golden[key])


def _top_logits(fixture: StageFixture, name: str, states: Tensor) -> Iterator[Row]:
    top = fixture.model.logits(states).topk(5)
    yield from fixture.tensor(f"{name}.step_top5_logits", top.values)
    yield from fixture.tensor(f"{name}.step_top5_ids", top.indices, 0.0)


def _picture(fixture: StageFixture, name: str, vokens_NH: Tensor, config: GenerationConfig) -> Iterator[Row]:
    model = fixture.model
    vokens = vokens_NH[None]
    yield from fixture.tensor(f"{name}.t2i_input_embedding", vokens)
    condition, empty = model.condition(vokens), model.condition(torch.zeros_like(vokens))
    yield from fixture.tensor(f"{name}.mapping_feature", condition)
    yield from fixture.tensor(f"{name}.empty_feature", empty, golden="gen.empty_feature")
    latents = model.diffusion.sample_latents_from(condition, empty, fixture.inputs["gen.latents"], config)
    unscaled = latents / model.diffusion.vae.config.scaling_factor
    yield from fixture.tensor(f"{name}.final_latents_unscaled", unscaled)
    yield from fixture.tensor(f"{name}.image", model.diffusion.decode(latents)[0].permute(1, 2, 0), PICTURE)


def _sampled(fixture: StageFixture) -> Iterator[Row]:
    """Sampling at temperature 1: with the recorded seed the same tokens, from the same probabilities."""
    for name, record in fixture.record["gen"].items():
        if "sampled" not in name:
            continue
        request = _prompts(fixture)[int(name.split(".")[1])]
        config = GenerationConfig(temperature=1.0, max_new_tokens=32)
        generator = torch.Generator().manual_seed(record["seed"])
        (decoded,) = fixture.model.decode_prompts(
            [request], config, stops=PUBLISHED_STOPS, trace=True, generators=[generator]
        )
        yield compare_exact(fixture.group, f"{name}.sequences", decoded.token_ids, record["sequences"])
        yield from _sequence(fixture, name, decoded.token_ids)
        yield from fixture.tensor(f"{name}.step_hidden", torch.stack(decoded.step_states))
        yield from _top_logits(fixture, name, torch.stack(decoded.step_states))
        probabilities = torch.stack(decoded.step_scores).softmax(-1)
        sizes = (probabilities > 0).sum(-1).tolist()
        yield compare_exact(fixture.group, f"{name}.nucleus_sizes", sizes, record["nucleus_sizes"])
        ids = fixture.golden[f"{name}.probs_top20_ids"].long()
        yield from fixture.tensor(f"{name}.probs_top20", probabilities.gather(1, ids))
        top = probabilities.topk(ids.shape[1])
        positive = top.values > 0
        yield compare_exact(fixture.group, f"{name}.probs_top20_ids", top.indices[positive], ids[positive])


def _export(fixture: StageFixture) -> Iterator[Row]:
    """The exported file has the published keys, shapes, types and values."""
    path = fixture.folder / f"stage{fixture.number}.ckpt"
    recorded = json.loads((fixture.folder / f"keys_stage{fixture.number}.json").read_text(encoding="utf-8"))
    checkpoint = read_checkpoint(path, fixture.model.config.vokens.count + 1)
    content = to_published(checkpoint, {})
    state = content["state_dict"]
    shapes = {key: [list(value.shape), str(value.dtype)] for key, value in state.items()}
    yield compare_exact(fixture.group, "export.keys_and_shapes", shapes, recorded["state_dict"])
    yield compare_exact(fixture.group, "export.top_level", sorted(content), sorted(recorded["ckpt_keys"]))
    yield compare_exact(
        fixture.group, "export.hyper_parameters", content["hyper_parameters"], recorded["hyper_parameters"]
    )
    original = read_state(path)
    same = all(torch.equal(state[key], original[key]) for key in original)
    yield compare_exact(fixture.group, "export.values", same, True)


__all__ = ["MiniGPT5", "compare_model"]

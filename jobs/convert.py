"""Convert an NVIDIA checkpoint (Audio Flamingo 2 or AF-CLAP) into our folder, or our folder back; strict, to the bit.

python jobs/convert.py CHECKPOINT OUT --lm Qwen2.5-3B     # safetensors file or shards, or a training .pt
python jobs/convert.py OUT checkpoint.safetensors --back
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from af2_ray import console
from af2_ray.storage.files import check_digests, write_digests
from af2_ray.storage.places import is_local, locate, shown

EXTRAS_FILE = "reference_extras.safetensors"


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print where to."""
    args = _arguments(argv)
    try:
        (to_reference if args.back else to_ours)(args)
    except OSError as error:  # a file that is not there, or no checkpoint
        raise ValueError(str(error)) from error
    console.console.print(str(args.out), markup=False)


def to_ours(args: argparse.Namespace) -> None:
    """Write the model, its processor where `--lm` has a tokenizer, and the tensors that only the way back needs."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from af2_ray.models import convert
    from af2_ray.models.afclap import AfClapModel
    from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
    from af2_ray.models.processing_afclap import AfClapProcessor

    weights = convert.clean_names(read_weights(_there(args.source)))
    settings = json.loads(_there(args.config).read_text()) if args.config else {}
    if args.lm is not None and not _there(args.lm).is_dir():
        raise ValueError(f"--lm {shown(str(args.lm))}: name the LM's folder")
    model: Any
    processor: Any = None
    if any(name.startswith("audio_branch.") for name in weights):
        model = AfClapModel(convert.infer_afclap_config(weights, **settings))
        state, extras = convert.afclap_from_reference(weights)
        if args.lm is not None:
            processor = AfClapProcessor.of(model.config, AutoTokenizer.from_pretrained(args.lm))
    else:
        config = convert.infer_af2_config(weights, _text_config(args.lm, settings), **settings)
        model = AudioFlamingo2ForConditionalGeneration(config)
        state, extras = convert.af2_from_reference(weights, config)
        if args.lm is not None:
            processor = _processor(args.lm, config)
    constants = {name: value for name, value in model.state_dict().items() if convert.OURS_REDUNDANT.fullmatch(name)}
    model.load_state_dict(constants | state)
    model.save_pretrained(args.out)
    if processor is not None:
        processor.save_pretrained(args.out)
    else:
        lacking = "no tokenizer is beside the model, which the other jobs and the server need"
        console.console.print(f"{lacking}: give --lm DIR to add it")
    save_file({name: value.contiguous() for name, value in extras.items()}, args.out / EXTRAS_FILE)
    write_digests(args.out)


def _there(path: Path) -> Path:
    """A path that was given, if it is that of a file or a folder of this machine."""
    fs, place = locate(path)
    if not is_local(fs) or not fs.exists(place):
        raise ValueError(f"{shown(str(path))}: no such file or folder on this machine")
    return path


def _processor(lm: Path, config: Any) -> Any:
    """The processor with the LM's tokenizer, which must number the model's own tokens as the checkpoint does."""
    from transformers import AutoTokenizer

    from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
    from af2_ray.text import AUDIO, add_special_tokens

    tokenizer = AutoTokenizer.from_pretrained(lm)
    if (found := add_special_tokens(tokenizer)) != config.audio_token_id:
        raise ValueError(
            f"{lm}: its tokenizer gives {AUDIO} the id {found}, the checkpoint {config.audio_token_id}: name the "
            "folder of the LM that the checkpoint was trained with"
        )
    return AudioFlamingo2Processor(AudioFlamingo2FeatureExtractor(config.max_windows), tokenizer)


def to_reference(args: argparse.Namespace) -> None:
    """Write one safetensors file with the reference's names."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    from af2_ray.models import convert
    from af2_ray.models.afclap import AfClapConfig, AfClapModel
    from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration

    if not (_there(args.source) / "config.json").is_file():
        raise ValueError(f"{shown(str(args.source))}: no model there: name the folder that has config.json")
    check_digests(args.source)
    config = AutoConfig.from_pretrained(args.source)
    extras_file = args.source / EXTRAS_FILE
    extras = load_file(extras_file) if extras_file.is_file() else {}
    if isinstance(config, AfClapConfig):
        weights = convert.afclap_to_reference(AfClapModel.from_pretrained(args.source).state_dict(), extras)
    else:
        model = AudioFlamingo2ForConditionalGeneration.from_pretrained(args.source)
        weights = convert.af2_to_reference(model.state_dict(), config, extras)
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, args.out)


def read_weights(source: Path) -> dict[str, Any]:
    """All tensors of a safetensors file, a folder of shards, or a `.pt` (no pickled objects), floats as float32."""
    import torch
    from safetensors.torch import load_file

    if source.is_dir():
        shards = sorted(source.glob("*.safetensors"))
        if not shards:
            raise ValueError(f"{source} has no *.safetensors: name the folder of shards, or the .pt file itself")
        weights = {name: value for shard in shards for name, value in load_file(shard).items()}
    elif source.suffix == ".safetensors":
        weights = load_file(source)
    else:
        try:
            weights = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # what it raises depends on where a stranger's bytes stop making sense
            raise ValueError(f"{shown(str(source))}: no weights that can be read: {error}") from error
        for key in ("model_state_dict", "state_dict"):
            weights = weights.get(key, weights)
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _text_config(lm: Path | None, settings: dict[str, Any]) -> Any:
    """The LM's configuration, from its folder or from `text_config` in the settings (taken out of them)."""
    from transformers import AutoConfig

    given = settings.pop("text_config", None)
    if lm is not None:
        return AutoConfig.from_pretrained(lm)
    if given is None:
        raise ValueError(
            "the LM's heads and rotary base are not in the weights: give --lm DIR, or text_config in --config"
        )
    return AutoConfig.for_model(**given)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint file or folder (with --back: our folder)")
    parser.add_argument("out", metavar="OUT", type=Path, help="our folder (with --back: a .safetensors file)")
    parser.add_argument(
        "--lm", type=Path, help="folder of the LM (AF-CLAP: of its text encoder): configuration, tokenizer"
    )
    parser.add_argument(
        "--config", type=Path, help="JSON of what weights cannot tell: text_config, transform_heads ..."
    )
    parser.add_argument("--back", action="store_true", help="from our folder to a reference checkpoint")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.main(main)

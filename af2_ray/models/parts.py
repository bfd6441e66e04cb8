"""Small parts of models: what a fine-tuning changed, written beside its export, merged with its base, or served on it.

What is kept is what differs: each tensor of a trained model is compared, bit by bit, with the base's in the same type.
So a part is right whatever trained, over several stages too, and all else is the base's by construction. Adapters are
kept as they are, before they are merged. `merge` does what the export did, in the same order, and gives the same files.

Sizes at the paper's 3B (36 LM layers of width 2048, audio of width 2048), in fp32: adapters of rank 16 on q, k, v and o
are 7.4 million weights, 29 MB; the cross-attention of all layers is 1.4 billion, 5.4 GB, and with one before every
third layer 1.8 GB; the audio transformer is 75 million, 0.3 GB. The whole is 4.7 billion, 19 GB. So adapters alone, or
with the audio transformer, are what a hundred fine-tunings should train.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.groups import group_of
from af2_ray.models.lora import adapted, load_adapter, merge_lora, read_tensors, save_adapter
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.storage.files import DIGESTS, Damaged
from af2_ray.storage.parts import PartFacts, check_base, read_facts
from af2_ray.storage.places import locate, shown
from af2_ray.storage.stores import PART, local_model, model_folder, replacing
from af2_ray.storage.weights import weight_files, weights_digest

TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class Base:
    """A model that parts share: where it was loaded from, and its tensors."""

    folder: str
    model: Model


# --- Writing -----------------------------------------------------------------------------------------------------


def write_tensors(folder: Path, model: Model, base: str | Path, trained: Mapping[str, Any]) -> PartFacts:
    """Write what a model has of its own beside a base: whole tensors, and adapters that are not merged yet.

    Args:
        trained: what the model was trained as, for whoever reads of it.

    Returns:
        What is known of the part so far, for `complete`.
    """
    dtype = model.get_input_embeddings().weight.dtype
    own = {}
    with _stored(base) as stored:
        for name, value in _whole_tensors(model):
            value = value.detach().cpu().contiguous()
            if not _is_same(value, _rounded(stored(name), dtype)):
                own[name] = value
    groups = {group_of(name) for name in own}
    if own:
        save_file(own, folder / TRAINED, metadata={"format": "pt"})
    if any(True for _ in adapted(model)):
        save_adapter(model.language_model, folder)
        groups.add("lora")
    name = str(dtype).removeprefix("torch.")
    return PartFacts(weights_digest(base), str(base), name, tuple(sorted(groups)), (), trained)


def complete(folder: Path, facts: PartFacts, export: Path) -> None:
    """Add the small files in which the whole model's folder `export` differs from its base's, and say what is there."""
    there = model_folder(facts.base_name)
    found = (path for path in export.iterdir() if path.is_file() and path.name != DIGESTS)
    files = sorted(path.name for path in found if path.suffix not in (".safetensors", ".md"))
    for name in files:
        if not (there / name).is_file() or (there / name).read_bytes() != (export / name).read_bytes():
            shutil.copy2(export / name, folder / name)
    (folder / PART).write_text(replace(facts, files=tuple(files)).to_json())


def _whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that are kept, by their names without adapters; a tied one under its first name."""
    every = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: value for name, value in model.state_dict().items() if name not in every}
    for name, value in chain(model.named_parameters(), buffers.items()):
        if group_of(name) != "lora":
            yield name.replace(".base_layer.", "."), value


@contextmanager
def _stored(base: str | Path) -> Iterator[Callable[[str], Tensor | None]]:
    """Gives a tensor of a model's files by its name, read when it is asked for; none where there is none."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in weight_files(local_model(base))]
        places = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        yield lambda name: places[name].get_tensor(name) if name in places else None


def _rounded(stored: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A base's tensor as a whole model has it whose numbers are of `dtype`."""
    return stored.to(dtype) if stored is not None and stored.is_floating_point() else stored


def _is_same(value: Tensor, like: Tensor | None) -> bool:
    """Whether two tensors have the same bits."""
    if like is None or (like.dtype, like.shape) != (value.dtype, value.shape):
        return False
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (like, value)))


# --- Making whole ------------------------------------------------------------------------------------------------


def merge(base: str | Path, part: str | Path, out: str | Path) -> None:
    """Write the whole model of a base and its part: the export that the part was written beside, file by file.

    Args:
        out: folder or address, which must not be there or be empty.

    Raises:
        ValueError: the part is of another base, a file is missing or (`files.Damaged`) damaged, or there is something
            in `out`.
    """
    fs, place = locate(out)
    if fs.exists(place) and fs.ls(place):
        raise ValueError(f"{shown(str(out))} is there already: name a new folder, or remove this one")
    facts = read_facts(part)
    check_base(part, facts, base)
    folder, dtype = local_model(part, PART), getattr(torch, facts.dtype)
    with _small_files(folder, facts, base) as files, replacing(out) as temporary:
        with torch.device("meta"):
            model = Model(AudioFlamingo2Config.from_pretrained(files))
        own = _own(folder, facts, _every(model))
        with _stored(base) as stored:
            for name, _ in list(_whole_tensors(model)):
                value = own[name] if name in own else _rounded(stored(name), dtype)
                if value is None:
                    raise ValueError(f"{shown(str(base))} has no {name}, nor has {shown(str(part))}: take another copy")
                _put(model, name, value)
        model.tie_weights()
        if "lora" in facts.groups:
            load_adapter(model.language_model, folder)
        merge_lora(model)
        model.save_pretrained(temporary)
        for file in facts.files:
            shutil.copy2(files / file, temporary / file)


# --- Sharing a base ----------------------------------------------------------------------------------------------


@contextmanager
def opened(part: str | Path, base: Base) -> Iterator[tuple[Model, Path]]:
    """A part's model on its base, and a folder of the whole model's small files for as long as the block lasts.

    Every tensor that the part has not is the base's own, and the audio tower, with what it keeps, is the base's if
    nothing of it trained. Adapters are not merged, for that would take a copy of each matrix. All is in the base's
    type: where training was in bf16 and the base answers in fp32, its numbers are not rounded as the export's are.

    Raises:
        ValueError: the part is of another base, or a file is missing or (`files.Damaged`) damaged.
    """
    facts = read_facts(part)
    check_base(part, facts, base.folder)
    folder, given = local_model(part, PART), _every(base.model)
    own = {name: value.to(given[name]) for name, value in _own(folder, facts, given).items()}
    own = {name: value for name, value in own.items() if not _is_same(value, given[name])}  # in the base's type
    with _small_files(folder, facts, base.folder) as files:
        with torch.device("meta"):
            model = Model(AudioFlamingo2Config.from_pretrained(files))
        for name in _every(model):
            _put(model, name, own[name] if name in own else given[name].detach())
        model.tie_weights()
        if not any(name.startswith("audio_tower.") for name in own):
            model.audio_tower = base.model.audio_tower
        if "lora" in facts.groups:
            load_adapter(model.language_model, folder)
        yield model.eval(), files


def own_bytes(model: Model, base: Base) -> int:
    """Bytes of a part's tensors that it does not share with its base."""
    shared = {tensor.untyped_storage().data_ptr() for tensor in _every(base.model).values()}
    storages = (tensor.untyped_storage() for tensor in _every(model).values())
    return sum({one.data_ptr(): one.nbytes() for one in storages if one.data_ptr() not in shared}.values())


@contextmanager
def _small_files(part: Path, facts: PartFacts, base: str | Path) -> Iterator[Path]:
    """A folder of the whole model's files but its weights, each the part's own or the base's."""
    there = model_folder(base)
    with tempfile.TemporaryDirectory(prefix="af2_ray_") as name:
        for file in facts.files:
            source = next((folder / file for folder in (part, there) if (folder / file).is_file()), None)
            if source is None:
                raise Damaged(f"{file} is neither in {part} nor in {there}, and the model has it: put back a copy")
            (Path(name) / file).symlink_to(source.absolute())
        yield Path(name)


def _own(folder: Path, facts: PartFacts, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of a part, which replace some of a base's."""
    if set(facts.groups) <= {"lora"}:
        return {}
    own = read_tensors(folder / TRAINED)
    for name, value in own.items():
        if name not in given or given[name].shape != value.shape:
            raise ValueError(
                f"{folder / TRAINED} has {name} of shape {list(value.shape)}, which the base has not: take the part as "
                "it was written"
            )
    return own


def _every(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that no file has; a tied one under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Let a tensor take the place of a parameter or buffer; it is not copied."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))

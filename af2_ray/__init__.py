"""Audio Flamingo 2 as a Ray system: data, training, sweeps, evaluation and serving of an audio-language model.

What is public is named here (docs/api.md) and imported when it is first used: torch and Ray are slow to load, and not
all of this needs them.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AfClapConfig": "models",
    "AfClapModel": "models",
    "AfClapProcessor": "models",
    "AudioFlamingo2Config": "models",
    "AudioFlamingo2ForConditionalGeneration": "models",
    "AudioFlamingo2Processor": "models",
    "Recipe": "config",
    "load_recipe": "config",
    "Run": "runs.run",
    "Engine": "engine.engine",
    "Clip": "engine.request",
    "Message": "text",
    "Request": "engine.request",
    "decode": "audio.decode",
    "to_windows": "audio.windows",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'af2_ray' has no attribute {name!r}; docs/api.md names what is public")
    return getattr(import_module(f"af2_ray.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

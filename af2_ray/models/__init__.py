"""Models in Hugging Face manner: the HTSAT tower, AF-CLAP and Audio Flamingo 2; Ray and DeepSpeed are unknown here.

Importing this package registers configurations, models, feature extractors and processors with transformers' Auto
classes.
"""

from af2_ray.models.afclap import AfClapConfig, AfClapModel
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.models.processing_afclap import AfClapFeatureExtractor, AfClapProcessor

__all__ = [
    "AfClapConfig",
    "AfClapFeatureExtractor",
    "AfClapModel",
    "AfClapProcessor",
    "AudioFlamingo2Config",
    "AudioFlamingo2FeatureExtractor",
    "AudioFlamingo2ForConditionalGeneration",
    "AudioFlamingo2Processor",
]

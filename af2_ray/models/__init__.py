"""Models in Hugging Face manner: the HTSAT tower, AF-CLAP and Audio Flamingo 2; Ray and DeepSpeed are unknown here."""

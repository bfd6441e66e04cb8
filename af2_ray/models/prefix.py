"""Audio as a prefix of the text: the fusion that cross-attention is compared with (docs/paper.md, "Prefix").

Audio states, projected to the LM's width, stand before the text and go through every layer with it. It needs no new
layers, and its self-attention grows with the square of the audio: 5 minutes are 1920 positions before the first word,
where cross-attention has 1920 keys beside it. In the paper it scores 16 MMAU points less.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from af2_ray.models.audio_states import Heard
from af2_ray.models.cross_attention import AudioCache


class PrefixFusion(nn.Module):
    """Projects audio states to LM embeddings and puts them before the text.

    Every text token hears all of its row, recordings that come with later questions too.
    """

    def __init__(self, audio_width: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(audio_width)
        self.fc1 = nn.Linear(audio_width, text_width)
        self.fc2 = nn.Linear(text_width, text_width)

    def forward(
        self, heard: Heard, text: Tensor, attention_mask: Tensor | None, cache: AudioCache | None
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Put each row's audios before its text [B, T, D]; a row without any is the bare LM's.

        Args:
            attention_mask: mask [B, text so far], 1 (or a text's number) where text is real; none: all of it.

        Returns:
            Embeddings [B, P + T, D] of P prefix positions (none while decoding: they are in the cache) and the text,
            the mask over all positions so far, positions [B, P + T], and P.
        """
        real = heard.tokens.flatten(1).long()  # [B, P]
        if attention_mask is None:
            num_text = text.shape[1] + (0 if cache is None or heard.first else cache.get_seq_length() - real.shape[1])
            attention_mask = real.new_ones(len(real), num_text)
        attention_mask = attention_mask.long()
        positions = (attention_mask.clamp(max=1).cumsum(dim=1) - 1).clamp(min=0) + real.sum(dim=1, keepdim=True)
        positions, whole = positions[:, -text.shape[1] :], torch.cat((real, attention_mask), dim=1)
        if not heard.first:
            return text, whole, positions, 0
        before = (real.cumsum(dim=1) - 1).clamp(min=0)
        embeds = torch.cat((self._before(heard).to(text.dtype), text), dim=1)
        return embeds, whole, torch.cat((before, positions), dim=1), real.shape[1]

    def project(self, states: Tensor) -> Tensor:
        """Embeddings [N, D of the LM] of audio states [N, D]."""
        return self.fc2(nnf.gelu(self.fc1(self.norm(states))))

    def _before(self, heard: Heard) -> Tensor:
        """Embeddings [B, P, D] of each row's audios."""
        assert heard.states is not None, "audio states are needed where the cache holds no prefix"
        packed, rectangle = heard.states.pack()
        embeds = rectangle.fill(self.project(packed))
        return embeds if heard.audio_index is None else embeds[heard.audio_index.clamp(min=0)].flatten(1, 2)

"""Audio on its way to tensors: decode any uri, cut 10 s windows, log-mel spectrograms."""

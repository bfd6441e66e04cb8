"""Answering questions of audio: the engine, the shape of requests and their limits. Knows nothing of Ray or HTTP."""

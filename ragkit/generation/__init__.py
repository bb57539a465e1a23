"""The engine: prompts, decoder, prefill strategies, decoding."""

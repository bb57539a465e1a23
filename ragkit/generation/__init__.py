"""The engine: decoder, prefill strategies, decoding, prompts."""

"""From retrieved chunks to cited sentences, and whether an answer is there at all."""

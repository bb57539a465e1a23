"""Document to chunks, by character offsets."""

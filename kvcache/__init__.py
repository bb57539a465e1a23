"""KV layout, the paged pool, and (chunk) KV storage."""

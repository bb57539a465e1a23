"""Measuring ragkit on the user's own model, machine and collection: what `ragkit bench` runs."""

"""The catalogue and its segment files: the only place that writes to a store folder."""

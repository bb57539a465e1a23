"""Sources to documents: sniffing, parsing in a killable child, page spans."""

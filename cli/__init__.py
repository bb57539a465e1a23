"""The command line: `ragkit`. One file a command group; `app` puts them together."""

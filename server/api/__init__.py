"""The HTTP API: one file per endpoint family. Knows the engine by submit, abort and stats."""

"""Commands that measure, each printing a peer or a ceiling beside its own numbers."""

"""The engine: schedule, run, commit. Knows nothing of HTTP."""

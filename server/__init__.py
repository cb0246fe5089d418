"""The service: an engine that runs variants together, and the HTTP API in front of it."""

__version__ = "0.1.0"

"""`attndrop gateway`: the same API in front of other servers, one pool of them per variant.

A front like the server's own (`server.api.front`), with OpenAI-compatible upstreams where that
has an engine. Bodies pass through: tokens, templates and sampling are the upstreams' business.
"""

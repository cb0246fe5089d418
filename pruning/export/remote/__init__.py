"""Code that exported checkpoints bring along, for `trust_remote_code`.

It imports torch and transformers only.
"""

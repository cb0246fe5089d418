"""The science of attention dropping, usable as a library and knowing nothing of serving."""

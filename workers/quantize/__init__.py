"""The quantize stage: the pass over a model."""

"""The quantize stage: one pass over a model."""

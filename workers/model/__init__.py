"""Streams a model layer by layer, and observes it."""

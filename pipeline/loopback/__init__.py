"""Serve the loopback Hub: the Hugging Face Hub's HTTP API for models, on 127.0.0.1, with files on disk."""

from pipeline.loopback.app import Limits
from pipeline.loopback.faults import Fault, FaultRequest
from pipeline.loopback.server import LoopbackHub, serve

__all__ = ["Fault", "FaultRequest", "Limits", "LoopbackHub", "serve"]

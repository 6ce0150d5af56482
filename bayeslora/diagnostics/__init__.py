"""How far a posterior can be trusted, by arviz."""

from __future__ import annotations

from bayeslora.diagnostics.guide import khat, khat_by_block, layer_blocks
from bayeslora.diagnostics.inference_data import to_inference_data
from bayeslora.diagnostics.loo import loo
from bayeslora.diagnostics.versions import read, write

__all__ = ["khat", "khat_by_block", "layer_blocks", "loo", "read", "to_inference_data", "write"]

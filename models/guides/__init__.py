"""Guides: families of posteriors over the weights, one file a family."""

from __future__ import annotations

from bayeslora.models.guides.auto import GUIDES, make_guide
from bayeslora.models.guides.base import Guide, GuideList, PointGuide

__all__ = ["GUIDES", "Guide", "GuideList", "PointGuide", "make_guide"]

"""Guides: families of posteriors over the weights, one file a family."""

from __future__ import annotations

from bayeslora.models.guides.auto import GUIDES, AutoGuide, check_kind, make_guide
from bayeslora.models.guides.base import Guide, GuideList, PointGuide, decoded, encoded

__all__ = ["GUIDES", "AutoGuide", "Guide", "GuideList", "PointGuide", "check_kind", "decoded", "encoded", "make_guide"]

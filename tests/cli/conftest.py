"""Servers as processes."""

from __future__ import annotations

from tests.server.processes import refused, refused_here, serve

__all__ = ["refused", "refused_here", "serve"]

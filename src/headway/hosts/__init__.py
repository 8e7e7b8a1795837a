"""Where models and texts come from: embedded defaults, local folders, the hub; and the text a look runs on."""

from __future__ import annotations

from headway.hosts.loading import load
from headway.hosts.registry import EmbeddedHost, HostStatus, embedded_hosts, status
from headway.hosts.text import Text, default_text, positions_of, read_text, starts_with_special, tokenize

__all__ = [
    "EmbeddedHost",
    "HostStatus",
    "Text",
    "default_text",
    "embedded_hosts",
    "load",
    "positions_of",
    "read_text",
    "starts_with_special",
    "status",
    "tokenize",
]

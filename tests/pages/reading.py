"""A page as its tests read it."""

from __future__ import annotations

import json
from html.parser import HTMLParser


class Page(HTMLParser):
    """The parts of a page that tests ask for: scripts with their attributes and content, and the text outside them."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.scripts: list[tuple[dict, str]] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            attributes, content = self.scripts[-1]
            self.scripts[-1] = attributes, content + data
        elif self._inside != "style":
            self.text += data

    def data(self) -> dict:
        return json.loads(next(content for attributes, content in self.scripts if attributes.get("id") == "data"))

"""What is on an HTML page: its text, tags, links and anchors, as a parser sees them."""

from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Parses a page at once. `rows`: of tables of class `points`, the `<data>` values and links of each row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.rows: list[dict[str, Any]] = []
        self.text = ""
        self.unclosed: list[str] = []
        self._points = self._style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.attributes |= held.keys()
        if tag not in VOID:
            self.unclosed.append(tag)
        self.anchors |= {held["id"]} if "id" in held else set()
        found = [held[name] for name in ("href", "src") if name in held]
        self.links += found
        self._style = tag == "style"
        self._points = (self._points and tag != "table") or (tag == "table" and held.get("class") == "points")
        if self._points and tag == "tr":
            self.rows.append({"numbers": [], "links": []})
        if self._points and tag == "data":
            self.rows[-1]["numbers"].append(held["value"])
        if self._points and tag == "a":
            self.rows[-1]["links"] += found

    def handle_endtag(self, tag: str) -> None:
        if tag in self.unclosed:
            while self.unclosed.pop() != tag:
                pass
        if tag == "table":
            self._points = False
            self.rows = [row for row in self.rows if row["numbers"]]
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data

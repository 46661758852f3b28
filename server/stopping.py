"""Finds stop strings in growing text. Text that may be the start of one is held back until that is decided."""

from __future__ import annotations


class StopStrings:
    def __init__(self, stops: list[str], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self._longest = max(map(len, stops), default=0)
        self.found: str | None = None

    def add(self, text: str) -> str:
        """The text that is now certain. Sets `found` when a stop string is complete: nothing follows it."""
        if not self._stops:
            return text
        held = self._held + text
        hits = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return held[: at + len(self.found)] if self._include else held[:at]
        keep = self._possible_start(held)
        self._held = held[keep:]
        return held[:keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Where the longest suffix begins that a stop string could continue."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            suffix = text[at:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return at
        return len(text)

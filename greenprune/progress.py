"""Live progress of a run."""

from __future__ import annotations

from greenprune.tracking import Event


class Display:
    def __call__(self, event: Event) -> None:
        k = event["kind"]
        if k in ("epoch", "removal", "freeze"):
            print(
                {a: (round(b, 4) if isinstance(b, float) else b) for a, b in event.items() if a != "time"}, flush=True
            )

    def close(self) -> None: ...


def open_display() -> Display:
    return Display()

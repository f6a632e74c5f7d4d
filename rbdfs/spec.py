"""Image specs, as the `rbd` command writes them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """`pool[/namespace]/image[@snapshot]`: what a person calls an image."""

    pool: str
    image: str
    namespace: str = ""
    snapshot: str = ""

    def __str__(self) -> str:
        where = f"{self.pool}/{self.namespace}" if self.namespace else self.pool
        snapshot = f"@{self.snapshot}" if self.snapshot else ""
        return f"{where}/{self.image}{snapshot}"

"""Image specs, as the `rbd` command writes them."""

import re
from dataclasses import dataclass

from rbdfs.errors import UsageError

_SPEC = re.compile(r"(?:(?P<pool>[^/]+)/(?:(?P<namespace>[^/@]+)/)?)?(?P<image>[^@]+)(?:@(?P<snapshot>.+))?", re.DOTALL)
"""`rbd`'s own pattern for images that are there already (src/tools/rbd/Utils.cc, extract_spec with
SPEC_VALIDATION_NONE): the pool ends at the first slash, the namespace at the second, the image at the first `@`."""

DEFAULT_POOL = "rbd"
"""What `rbd_default_pool` is where nobody has set it."""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """`pool[/namespace]/image[@snapshot]`: what a person calls an image."""

    pool: str
    image: str
    namespace: str = ""
    snapshot: str = ""

    @classmethod
    def parse(cls, text: str, default_pool: str = DEFAULT_POOL) -> "ImageSpec":
        """`[pool/[namespace/]]image[@snapshot]`, as the `rbd` command takes it. Raises UsageError.

        An image with a `/` in its name can be named only with its pool and namespace before it, as with `rbd`.
        """
        found = _SPEC.fullmatch(text)
        if found is None:
            raise UsageError(f"'{text}' is no image: write POOL/IMAGE, POOL/NAMESPACE/IMAGE, or either with @SNAPSHOT")
        pool, namespace, image, snapshot = found.group("pool", "namespace", "image", "snapshot")
        return cls(pool or default_pool, image, namespace or "", snapshot or "")

    def __str__(self) -> str:
        where = f"{self.pool}/{self.namespace}" if self.namespace else self.pool
        snapshot = f"@{self.snapshot}" if self.snapshot else ""
        return f"{where}/{self.image}{snapshot}"

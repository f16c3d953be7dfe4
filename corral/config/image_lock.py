"""Which content every image has, in `images.lock.json` beside the inventory.

`images lock` writes it, people commit it. A tag can be moved to other content; with a lock the plan names images by
digest, and an engine takes nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, model_validator

from corral.config.inventory import Section
from corral.config.model_lock import Lock

IMAGE_LOCK = "images.lock.json"
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
_PINNED = re.compile(r'^\s*image: "?([^\s"@]+)@(sha256:[0-9a-f]{64})"?\s*$', re.MULTILINE)


class LockedImage(Section):
    """The content of an image: by its digest, or by ids where no registry has it."""

    digest: Digest | None = None
    """Digest of the manifest or the list of manifests, as the registry names it."""
    ids: Annotated[tuple[Digest, ...], Field(strict=False)] = ()
    """Ids in the hosts' engines, of an image that was built there or came in a bundle; one for each build."""

    @model_validator(mode="after")
    def _names_content(self) -> LockedImage:
        if bool(self.digest) == bool(self.ids):
            raise ValueError("an image has either a digest or ids")
        return self


class ImageLock(Lock):
    """The content of every known image, by name and tag."""

    file_name = IMAGE_LOCK
    remedy = "remove it and write it again: ./generate.py images lock"

    images: dict[str, LockedImage] = Field(default_factory=dict)

    def pinned(self, image: str) -> str:
        """The reference under which an engine is asked for an image: with its digest, where one is known."""
        name = image.partition("@")[0]
        known = self.images.get(name)
        if known is None:
            return image
        if known.digest is None:
            return name
        return image if "@" in image else f"{name}@{known.digest}"

    def ids(self, image: str) -> tuple[str, ...]:
        """Ids that the image of a reference may have; empty when its digest decides, or nothing is known of it."""
        known = self.images.get(image.partition("@")[0])
        return known.ids if known else ()

    def knows(self, image: str) -> bool:
        """Whether the content of a reference is fixed."""
        return "@" in image or image in self.images


def lock_in_rendering(files: Mapping[str, bytes]) -> ImageLock:
    """The digests that an earlier rendering names in its Compose files."""
    texts = [data.decode() for path, data in files.items() if path.endswith(".yaml")]
    found = {name: LockedImage(digest=digest) for text in texts for name, digest in _PINNED.findall(text)}
    return ImageLock(images=found)

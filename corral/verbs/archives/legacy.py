"""What archives of older versions have otherwise: backups of formats 1 and 2, bundles of format 1."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corral.verbs.archives.contents import Manifest
    from corral.verbs.archives.load import Bundle

# The encrypted checksum of a backup's manifest, in place of that of `SHA256SUMS`.
SEAL = "manifest.sealed"
# The last member of a backup: the checksum of its manifest.
END = "manifest.sha256"


def backup_sums(manifest: Manifest, mark: str) -> dict[str, str]:
    """The checksums of a backup whose manifest, of the checksum `mark`, lists them in place of `SHA256SUMS`."""
    listed = {name: member.sha256 for name, member in manifest.members.items()}
    return listed | {END: hashlib.sha256(f"{mark}\n".encode()).hexdigest()}


def image_archive(bundle: Bundle, files: Mapping[str, str]) -> Iterator[bytes]:
    """What `docker load` reads, put together from the files of one image, each of which lies under its checksum."""
    for name, sha256 in files.items():
        blob = f"blobs/sha256/{sha256}"
        member = tarfile.TarInfo(name)
        member.size = bundle.stored[blob].size
        yield member.tobuf()
        yield from bundle.chunks(blob)
        yield bytes(-member.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)

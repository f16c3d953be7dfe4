"""`images lock`: which content every image of the plan has now, asked of the registries, else of the hosts' engines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from corral.build import Plan, variant_images
from corral.components import components
from corral.config.image_lock import IMAGE_LOCK, ImageLock, LockedImage
from corral.errors import CorralError
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.units import grouped

ASK_LIMIT_S = 120


def lock_images(plan: Plan, out: Path, talk: Console, *, update: bool = False) -> None:
    """Write `images.lock.json` with the content of every image that the plan names without a digest.

    Args:
        plan: made without a lock, so that it names images as the inventory does.
        out: the folder of renderings.
        talk: where progress goes.
        update: accept other content for images that are locked already.

    Raises:
        CorralError: an image has other content than the lock says, or is not to be found; nothing was written.
    """
    path = ImageLock.beside(Path(plan.source_file))
    old = ImageLock.read(path)
    users = grouped((image, host) for host in compose_hosts(plan, out) for image in plan.images_of(host.name))
    new = ImageLock(images={image: _content(image, hosts) for image, hosts in users.items() if "@" not in image})
    if not update:
        _refuse_moved(old, new)
    for image, known in new.images.items():
        if known != old.images.get(image):
            talk.print(Text(f"{image}: {_shown(known)}"))
    if new != old or not path.exists():
        new.write(path)
    talk.print(Text(f"{path}: {len(new.images)} images; use them with: ./generate.py render && ./generate.py up"))


def _content(image: str, hosts: list[ComposeHost]) -> LockedImage:
    """What a registry says of an image; else the digest, or the ids, by which the engines that need it know it."""
    form = ["docker", "buildx", "imagetools", "inspect", "--format", "{{json .Manifest}}", image]
    asked = hosts[0].run(form, check=False, limit_s=ASK_LIMIT_S)
    if asked.code == 0:
        return LockedImage(digest=str(json.loads(asked.out)["digest"]))
    inspect = ["docker", "image", "inspect", "--format", "{{json .}}", image]
    held = [json.loads(done.out) for host in hosts if (done := host.run(inspect, check=False)).code == 0]
    if not held:
        reason = (asked.words.splitlines() or ["no answer"])[-1]
        raise CorralError(
            f"{hosts[0].name}: the content of {image} is not known: no engine that needs it has it, and the registry "
            f"says: {reason}\n  nothing was written; bring the image there, or name another one in images:"
        )
    repository = image.rpartition(":")[0] + "@"
    digests = {name.partition("@")[2] for facts in held for name in facts["RepoDigests"] if name.startswith(repository)}
    if len(digests) == 1:
        return LockedImage(digest=digests.pop())
    return LockedImage(ids=tuple(sorted({str(facts["Id"]) for facts in held})))


def _refuse_moved(old: ImageLock, new: ImageLock) -> None:
    moved = [
        f"{image}: is {_shown(known)} now, and {_shown(before)} in {IMAGE_LOCK}"
        for image, known in new.images.items()
        if (before := old.images.get(image)) is not None and before != known
    ]
    if moved:
        raise CorralError(
            "\n".join(moved) + "\n  a tag was moved, or an image was built again; nothing was written. Find out why, "
            "then take the new content with: ./generate.py images lock --update"
        )


def _shown(known: LockedImage) -> str:
    return known.digest or f"the engine's {', '.join(known.ids)}"


def check_ids(host: ComposeHost, plan: Plan, found: Iterable[tuple[str, str]]) -> None:
    """Raise CorralError when an image that is locked by id has another one; `found` are references with ids.

    An engine resolves a reference with a digest to that content only, so those need no check.
    """
    for image, actual in found:
        wanted = plan.image_lock.ids(image)
        if wanted and actual not in wanted:
            raise CorralError(
                f"{host.name}: nothing was changed: the image {image} is {actual}, {IMAGE_LOCK} says "
                f"{' or '.join(wanted)}\n  bring that one back (bundle load, docker load), or find out where this one "
                "comes from and take it with: ./generate.py images lock --update"
            )


def warnings(plan: Plan) -> Iterator[str]:
    """What of the images may change: tags that can be moved, and backends that are fetched at the start."""
    services = plan.contributions.services
    named = {item.image for item in services if not plan.site.is_local(item.host)}
    loose = [image for image in named if not plan.image_lock.knows(image)]
    if loose:
        yield (
            f"{len(loose)} of {len(named)} images have no digest, such as {min(loose)}: a tag can be moved to other "
            "content; fix what they are now with: ./generate.py images lock [image-lock]"
        )
    for name, found in components():
        if not hasattr(found, "complete_image"):
            continue
        mine = [item for item in services if item.component == name]
        needed = {
            (image, found.complete_image(item, image)) for item in mine for image in (item.image, *variant_images(item))
        }
        for image, remedy in sorted(needed):
            if remedy:
                yield (
                    f"{image} fetches its backend, code that is not checked, and has a network that leads out; put it "
                    f"into an image and name that in images: {remedy} [image-backend]"
                )

"""Which content the images have."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from corral.build import build_plan
from corral.cli.context import SiteOptions, shared, talk, verbs
from corral.config.image_lock import ImageLock

app = verbs("Which content the images have.")


@app.command("lock")
@shared("inventory", "out")
def images_lock(
    site: SiteOptions,
    update: Annotated[bool, typer.Option("--update", help="Take other content for images that are locked.")] = False,
) -> None:
    """Ask the registries which content the images have, and write it into images.lock.json; the plan then names it."""
    from corral.verbs.images import lock_images

    lock_images(build_plan(replace(site.loaded(), image_lock=ImageLock())), site.out, talk, update=update)

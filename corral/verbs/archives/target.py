"""Where the inventory, the locks and the rendering of an archive go, and what is there already."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from corral.build import Plan, build_plan
from corral.config.load import LOCKS, load_texts
from corral.errors import CorralError, UsageError
from corral.files import write_atomically
from corral.render.output import Action, compare, write
from corral.render.tree import refuse_other_site
from corral.verbs.archives.container import INVENTORY, explained


@dataclass(frozen=True, slots=True)
class Site:
    """What an archive has of a site."""

    plan: Plan
    # The inventory and its locks, by name.
    files: Mapping[str, bytes]
    hosts: tuple[str, ...]
    # The rendered files of these hosts by path, and the kit's manifests of them.
    tree: Mapping[str, bytes]
    manifests: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """The inventory file and the folder of renderings that an archive is brought to, and the hosts that are meant."""

    inventory: Path
    out: Path
    # Those that were named; all of the archive when absent.
    hosts: Sequence[str] | None = None

    def hosts_of(self, known: Iterable[str], kind: str) -> tuple[str, ...]:
        """The hosts of an archive that are meant; raises UsageError when it does not have one of them."""
        unknown = sorted(set(self.hosts or ()) - set(known))
        if unknown:
            raise UsageError(f'no host named "{unknown[0]}" in the {kind}; there are {", ".join(known)}')
        return tuple(name for name in known if not self.hosts or name in self.hosts)

    def plan_of(self, files: Mapping[str, bytes]) -> Plan:
        """The plan of an archive's inventory and locks."""
        if INVENTORY not in files:
            raise CorralError("the archive has no inventory")
        return build_plan(load_texts(files[INVENTORY], files, str(self.inventory)))

    def conflicts(self, site: Site, actions: Collection[Action]) -> list[str]:
        """Files that are there and that the archive has otherwise; of rendered files those with one of these actions.

        Raises:
            CorralError: the folder has the rendering of another site.
        """
        refuse_other_site(site.plan, self.out)
        found = [f"{place}, another one" for place in self._other_texts(site) if place.exists()]
        changed = [item for item in compare(site.tree, self.out, set(site.hosts)) if item.action in actions]
        if changed:
            found.append(f"{len(changed)} rendered files that differ, such as {self.out / changed[0].path}")
        return found

    def _other_texts(self, site: Site) -> dict[Path, bytes]:
        """The inventory and the locks that are not in their places, by these."""
        places = {INVENTORY: self.inventory, **{name: self.inventory.parent / name for name in LOCKS}}
        texts = {place: site.files[name] for name, place in places.items() if name in site.files}
        return {place: data for place, data in texts.items() if not place.exists() or place.read_bytes() != data}

    def fill(self, site: Site, talk: Console, *, force: bool) -> None:
        """Write the inventory, the locks and the rendering; what was edited by hand stays unless forced."""
        with explained(self.inventory, "run the same command again to go on"):
            for place, data in self._other_texts(site).items():
                put(place, data)
            write(site.tree, self.out, set(site.hosts), force=force)
            for path, data in site.manifests.items():  # so that files that were edited by hand stay known as such
                put(self.out / path, data)
        talk.print(Text(f"{self.inventory} and {len(site.tree)} rendered files are in place"))


def put(place: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file and the folders above it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, data, mode)

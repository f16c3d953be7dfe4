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
from corral.render.output import MANIFEST, Action, compare, write
from corral.render.tree import refuse_other_site
from corral.verbs.archives.container import INVENTORY, explained


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

    def _texts(self, files: Mapping[str, bytes]) -> dict[Path, bytes]:
        places = {INVENTORY: self.inventory, **{name: self.inventory.parent / name for name in LOCKS}}
        return {place: files[name] for name, place in places.items() if name in files}

    def conflicts(
        self, plan: Plan, files: Mapping[str, bytes], tree: Mapping[str, bytes], actions: Collection[Action]
    ) -> list[str]:
        """Files that are there and that the archive has otherwise.

        Args:
            plan: the site.
            files: the archive's inventory and locks, by name.
            tree: the rendered files of whole hosts, by path.
            actions: what would happen to those rendered files that are in the way.

        Raises:
            CorralError: the folder has the rendering of another site.
        """
        refuse_other_site(plan, self.out)
        texts = self._texts(files).items()
        found = [f"{place}, another one" for place, data in texts if place.exists() and place.read_bytes() != data]
        changed = [item for item in compare(without_records(tree), self.out, _hosts_in(tree)) if item.action in actions]
        if changed:
            found.append(f"{len(changed)} rendered files that differ, such as {self.out / changed[0].path}")
        return found

    def fill(self, files: Mapping[str, bytes], tree: Mapping[str, bytes], talk: Console, *, force: bool) -> None:
        """Write the inventory, the locks and the rendering; what was edited by hand stays unless forced."""
        with explained(self.inventory, "run the same command again to go on"):
            records = {self.out / path: data for path, data in tree.items() if path.endswith(f"/{MANIFEST}")}
            for place, data in self._texts(files).items():
                put(place, data)
            write(without_records(tree), self.out, _hosts_in(tree), force=force)
            for place, data in records.items():  # so that files that were edited by hand stay known as such
                put(place, data)
        talk.print(Text(f"{self.inventory} and {len(without_records(tree))} rendered files are in place"))


def put(place: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file, unless it is as it should be."""
    if not place.is_file() or place.read_bytes() != data:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, data, mode)


def _hosts_in(tree: Iterable[str]) -> set[str]:
    """The hosts of a rendered tree."""
    return {path.partition("/")[0] for path in tree}


def without_records(tree: Mapping[str, bytes]) -> dict[str, bytes]:
    """The rendered files alone, without the manifests that the kit keeps of them."""
    return {path: data for path, data in tree.items() if not path.endswith(f"/{MANIFEST}")}

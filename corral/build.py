"""The plan: everything about a site resolved and decided, frozen and printable. Pure; templates see nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from corral.checks.references import check_references
from corral.checks.rules import check_plan
from corral.components import gather
from corral.config.image_lock import ImageLock
from corral.config.inventory import Inventory
from corral.config.load import Loaded
from corral.contributions import Contributions, File, Secret, Service, distinct
from corral.errors import Finding, SiteError, in_order
from corral.plan.site import Site, resolve


@dataclass(frozen=True, slots=True)
class Plan:
    """A site, what its components add to it, and what is questionable about it."""

    site: Site
    contributions: Contributions
    warnings: tuple[Finding, ...] = ()
    source_file: str = ""
    image_lock: ImageLock = field(default_factory=ImageLock)

    @property
    def inventory(self) -> Inventory:
        """What the plan was made from."""
        return self.site.inventory

    def services_of(self, host: str) -> list[Service]:
        """The host's services, in the order in which they are rendered."""
        return [service for service in self.contributions.services if service.host == host]

    def images_of(self, host: str) -> list[str]:
        """References of all images that the host may need, sorted; also those for when it runs without its cards."""
        services = self.services_of(host)
        return sorted({image for service in services for image in (service.image, *variant_images(service))})

    def files_of(self, host: str) -> list[File]:
        """The host's configuration files."""
        return [file for file in self.contributions.files if file.host == host]

    def secrets_of(self, host: str) -> list[Secret]:
        """The host's secrets, each once."""
        return distinct(secret for secret in self.contributions.secrets if secret.host == host)

    @property
    def secrets(self) -> dict[str, list[Secret]]:
        """The secrets of every host that has some."""
        return {host: found for host in self.inventory.hosts if (found := self.secrets_of(host))}


def variant_images(service: Service) -> tuple[str, ...]:
    """The image with which a service runs on a machine without cards, where that is another one."""
    return (service.cpu_variant.image,) if service.cpu_variant else ()


def load_site(loaded: Loaded) -> Site:
    """The resolved site, whether or not it fits; raises SiteError when a name in the inventory leads nowhere."""
    wrong = check_references(loaded.inventory)
    if wrong:
        raise SiteError(map(loaded.source.locate, wrong))
    return resolve(loaded.inventory, loaded.lock)


def build_plan(loaded: Loaded) -> Plan:
    """The plan of an inventory; raises SiteError with every broken rule at once, located in the file."""
    site = load_site(loaded)
    contributions = gather(site)
    found = [loaded.source.locate(problem) for problem in check_plan(site, contributions)]
    errors = [problem for problem in found if problem.level == "error"]
    if errors:
        raise SiteError(errors)
    lock = loaded.image_lock
    contributions.services = [_pinned(service, lock) for service in contributions.services]
    return Plan(site, contributions, in_order(found), loaded.source.file, lock)


def _pinned(service: Service, lock: ImageLock) -> Service:
    """The service with its images by digest; what is judged and replaced by tag has been so before."""
    variant = service.cpu_variant
    if variant is not None:
        variant = replace(variant, image=lock.pinned(variant.image))
    return replace(service, image=lock.pinned(service.image), cpu_variant=variant)

"""Programs as their component.yaml describes them: `services` and `secrets`, with what the plan decides filled in.

A text `$name` stands for a value that the component gives; as an item of a list or as a key of a mapping it stands for
several. These are always there: `$address` and `$publish` of the host, `$loopback` and `$any` (addresses to listen on),
`$shell`, `$secrets`, `$config` and `$data` (folders, those of a container from `config_folder` and `data_folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Template
from typing import Any

from corral.contributions import ConfigMount, Health, Port, Secret, Service
from corral.declarations import declaration
from corral.plan.site import Site


def _texts(items: Iterable[object]) -> tuple[str, ...]:
    return tuple(map(str, items))


def _health(fields: dict[str, Any]) -> Health:
    if "command" not in fields:
        return Health.by_wget(**fields)
    return Health(**fields | {"command": _texts(fields["command"])})


_TYPES: Mapping[str, Callable[[Any], Any]] = {
    "args": _texts,
    "entrypoint": _texts,
    "health": _health,
    "ports": lambda items: tuple(Port(*item) for item in items),
    "configs": lambda items: tuple(ConfigMount(*item) for item in items),
}


def service(site: Site, host: str, component: str, name: str = "", /, **values: Any) -> Service:
    """The service of that name, as the component describes it.

    Args:
        site: the site.
        host: where it runs.
        component: whose component.yaml it is in.
        name: its key there, the component's own name without it; it is also the service's name and that of its image,
            unless `name` and `image_key` say otherwise.
        values: what `$name` stands for.
    """
    key = name or component
    found = described(site, host, component, key, values)
    found["image"] = site.image(found.pop("image_key", key), found["image"])
    return Service(**found)


def described(site: Site, host: str, component: str, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a service as a component describes it, by their names in `Service`."""
    fields = dict(declaration(component)["services"][name])
    folders = {key: fields.pop(f"{key}_folder", "") for key in ("config", "data")}
    own = {"host": host, "component": component, "name": name} | fields
    found = filled(own, {**_places(site, host, own["component"], folders), **values})
    return {key: _TYPES[key](value) if key in _TYPES else value for key, value in found.items()}


def _places(site: Site, host: str, component: str, folders: Mapping[str, str]) -> dict[str, Any]:
    is_local = site.is_local(host)
    return {
        "address": site.host(host).address,
        "publish": site.publish_address(host),
        "loopback": "127.0.0.1" if is_local else "",
        "any": "127.0.0.1" if is_local else "*",
        "shell": "sh" if is_local else "/bin/sh",
        "secrets": site.secret_path(host, "").rstrip("/"),
        "config": site.local_folder(component) if is_local else folders["config"],
        "data": site.data_path(host, component, folders["data"]),
    }


def secrets(component: str, host: str, **values: Any) -> Iterator[Secret]:
    """The secrets that a component describes: by name the purpose alone, or all fields."""
    for name, told in declaration(component)["secrets"].items():
        fields = {"purpose": told} if isinstance(told, str) else told
        yield Secret(name=name, host=host, **filled(fields, values))


def filled(value: Any, values: Mapping[str, Any]) -> Any:
    """Data with a value in the place of every `$name`; lists become tuples, and what is None leaves its key out."""
    if isinstance(value, str):
        whole = value[1:] if value.startswith("$") else ""
        return values[whole] if whole in values else Template(value).substitute(values)
    if isinstance(value, list):
        return tuple(part for item in value for part in _parts(item, values))
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, item in value.items():
        told = filled(item, values)
        if key.startswith("$"):
            found |= values[key[1:]]
        elif told is not None:
            found[key] = told
    return found


def _parts(item: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """An item of a list, or the several that it stands for."""
    found = filled(item, values)
    return found if isinstance(item, str) and isinstance(found, tuple) else (found,)

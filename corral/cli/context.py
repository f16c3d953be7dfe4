"""What all verbs share: options, the plan, consoles, and the exit code of an error."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from corral.build import Plan, build_plan
from corral.config.inventory import Inventory
from corral.config.load import Loaded, load_inventory
from corral.config.source import plain_yaml
from corral.errors import CorralError, SiteError, UsageError, did_you_mean
from corral.units import counted

FOREIGN: dict[str, Any] = plain_yaml(Path(__file__).with_name("foreign_words.yaml").read_bytes())
talk = Console(stderr=True, highlight=False, soft_wrap=True)

PROGRAM = "generate.py"
INVENTORY = Path("inventory.yaml")
OUT = Path("compose")
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
SHARED = {
    "inventory": (Annotated[Path, typer.Option("--inventory", "-i", help="The inventory file.")], INVENTORY),
    "out": (Annotated[Path, typer.Option("--out", "-o", help="Folder for rendered files.")], OUT),
    "host": (
        Annotated[list[str] | None, typer.Option("--host", help="Only this host; may be given several times.")],
        None,
    ),
}


@dataclass(frozen=True, slots=True)
class SiteOptions:
    """The options that most verbs have."""

    inventory: Path = INVENTORY
    out: Path = OUT
    host: list[str] | None = None

    def loaded(self) -> Loaded:
        """The inventory with its locks; raises UsageError when there is no such file."""
        if not self.inventory.exists():
            words = "name the inventory with --inventory PATH, or write one with: ./generate.py init"
            raise UsageError(f"{self.inventory}: no such file; {words}")
        return load_inventory(self.inventory)

    def plan(self) -> Plan:
        """The plan of the inventory; warnings are printed."""
        plan = build_plan(self.loaded())
        for warning in plan.warnings:
            talk.print(Text(str(warning), style="yellow"))
        return plan

    def hosts(self, found: Plan | Inventory) -> set[str] | None:
        """The hosts named by --host; None: all. Raises UsageError for an unknown one."""
        known = (found.inventory if isinstance(found, Plan) else found).hosts
        for name in self.host or []:
            if name not in known:
                raise UsageError(f'no host named "{name}"; {did_you_mean(name, known)}')
        return set(self.host) if self.host else None


def shared(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a verb these options of SHARED; it gets them as its first parameter, a SiteOptions."""

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        def run(**given: Any) -> Any:
            return verb(SiteOptions(**{name: given.pop(name) for name in names}), **given)

        own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=SHARED[name][1], annotation=SHARED[name][0])
            for name in names
        ]
        parameters = [*options, *(item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        return run

    return decorate


def refuse_on_swarm(**given: object) -> None:
    """Raises UsageError for options that mean something on Compose hosts only."""
    named = ", ".join(f"--{name.removesuffix('s')}" for name, value in given.items() if value)
    if named:
        raise UsageError(f"Docker Swarm runs this site as a whole; leave out {named}")


class Verbs(TyperGroup):
    """A group of verbs that knows what other programs call them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Like click's; raises UsageError for a word of another program, with the verb that it is here."""
        of_group = FOREIGN["verbs"].get(ctx.info_name if ctx.parent else PROGRAM, {})
        meant = next((verb for verb, words in of_group.items() if args[0] in words.split()), "")
        if meant and args[0] not in self.commands:
            group = f"{ctx.info_name} " if ctx.parent else ""
            raise UsageError(f'there is no verb "{args[0]}"; you may mean: ./{PROGRAM} {group}{meant}')
        return super().resolve_command(ctx, args)


def verbs(help_text: str, *, has_completion: bool = False) -> typer.Typer:
    """An empty group of verbs."""
    return typer.Typer(
        cls=Verbs, add_completion=has_completion, no_args_is_help=True, rich_markup_mode=None,
        pretty_exceptions_enable=False, help=help_text,
    )  # fmt: skip


def exit_code_of(application: typer.Typer, arguments: list[str] | None = None, program: str | None = None) -> int:
    """Runs these verbs, prints errors, and returns the exit code."""
    try:
        code = application(arguments, prog_name=program, standalone_mode=False)
    except SiteError as error:
        for problem in error.problems:
            talk.print(Text(str(problem)))
        talk.print(f"{counted(len(error.problems), 'problem')}; nothing was written", style="red")
        return error.exit_code
    except CorralError as error:
        talk.print(Text(f"corral: {error}"))
        return error.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        talk.print(Text(_usage_words(error.format_message())))
        return 2
    return int(code or 0)


def _usage_words(message: str) -> str:
    """What the parser of the command line says, with what to do; the help that it gives without a verb as it is."""
    if message.startswith("Usage:"):
        return message
    remedy = next((row["remedy"] for row in FOREIGN["usage"] if re.search(row["says"], message.rstrip("."))), "")
    return f"corral: {message}{remedy and '; '}{remedy} (see ./{PROGRAM} --help)"


def plain() -> Console:
    """Standard output without wrapping of lines."""
    return Console(highlight=False, soft_wrap=True)


def print_json(data: object) -> None:
    """Prints data for programs on standard output."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def show_or_print(data: Any, show: Callable[[], object], *, as_json: bool) -> None:
    """Prints data for programs (what it is, or gives when it is called), or shows it to people."""
    if as_json:
        print_json(data() if callable(data) else data)
    else:
        show()


def tell_figures(site: SiteOptions, hosts: Iterable[str] | None) -> None:
    """Refreshes the metrics files after a verb that changed them, where they exist; failure is only a warning."""
    from corral.verbs.status.figures import FOLDER, figures_hosts, write_figures

    try:
        plan = build_plan(load_inventory(site.inventory))
        chosen = [item for item in figures_hosts(plan, site.out, hosts) if (item.rendered / FOLDER).is_dir()]
    except CorralError:
        return  # this site has no metrics files
    try:
        write_figures(plan, chosen)
    except CorralError as error:
        talk.print(Text(f"metrics were not written: {error}", style="yellow"))

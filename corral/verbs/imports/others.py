"""llama-swap's configuration, Ollama's Modelfiles, and the variables of the `.env` of the predecessor."""

from __future__ import annotations

import re
from functools import partial
from pathlib import PurePath

from corral.declarations import read_yaml
from corral.verbs.imports.commands import Word, read_command, words_of
from corral.verbs.imports.compose import cards, read_variable
from corral.verbs.imports.draft import HOST, Draft, Entry, Step
from corral.verbs.imports.sources import TABLES, Document

# --- llama-swap ------------------------------------------------------------------------------------------------------


def begin_llama_swap(draft: Draft, document: Document) -> None:
    """Puts macros into commands, as llama-swap does: the model's own before those for all."""
    everywhere = {str(leaf.path[-1]): leaf.text for leaf in document.below("macros")}
    for name in document.names("models"):
        own = {str(leaf.path[-1]): leaf.text for leaf in document.below("models", name, "macros")}
        table = {**everywhere, **own, "MODEL_ID": name, "PORT": "5800"}
        for leaf in document.below("models", name, "cmd"):
            for _ in range(9):
                leaf.value = re.sub(r"\$\{([\w-]+)\}", lambda found, t=table: t.get(found[1], found[0]), leaf.text)  # type: ignore[misc]
        entry = draft.entry(name, document.below("models", name)[0])
        entry.asked, entry.engine = name, "llama"
        entry.values |= {"swap": True, "folder": document.folder}


def cmd(at: Step) -> None:
    """The command that starts a model: llama-server or vLLM, by itself or in a container."""
    words = words_of([at.leaf])
    program = " ".join(word.text for word in words)
    if words and PurePath(words[0].text).name in ("docker", "podman"):
        words = _container(at.entry, words)
    if re.search(r"vllm", program):
        at.entry.engine = "vllm"
        at.entry.values.pop("swap", None)
    elif not re.search(r"llama-server|llama\.cpp", program):
        at.entry.dropped = (
            "the kit starts llama-server and vLLM; run this program yourself, and write it as one of nodes:"
        )
        at.leaf.tell("left", at.entry.dropped)
        return
    read_command(at.entry, words)


def _container(entry: Entry, words: list[Word]) -> list[Word]:
    """Reads the options of `docker run`; returns the words after the image."""
    valued, at = read_yaml(TABLES / "llama_swap.yaml")["docker"].split(), 2
    while at < len(words) and words[at].text.startswith("-"):
        flag, sign, value = words[at].text.partition("=")
        if not sign and flag in valued:
            at, value = at + 1, words[at + 1].text if at + 1 < len(words) else ""
        if flag in ("-v", "--volume"):
            host, _, inside = value.partition(":")
            entry.folders[inside.split(":")[0]] = host
            words[0].leaf.told.append(partial(entry.folder_told, host))
        elif flag in ("-e", "--env"):
            name, _, said = value.partition("=")
            read_variable(entry, words[0].leaf, name, said)
        elif flag == "--gpus":
            found = re.search(r"device=([\w,-]+)", value)
            cards(entry, words[0].leaf, found[1].split(",") if found else ["all"])
        else:
            words[0].leaf.tell("kit", f"{flag}: the kit starts containers its own way")
        at += 1
    return words[at + 1 :]


def other_name(at: Step) -> None:
    """Another name of a model."""
    at.draft.aliases.append((at.leaf.text, at.entry.name, at.leaf))


def env(at: Step) -> None:
    """A variable of a model's command."""
    name, _, value = at.leaf.text.partition("=")
    read_variable(at.entry, at.leaf, name, value)


def api_key(at: Step) -> None:
    """A key of a client."""
    number = 1 + sum(to.startswith("consumers.") for to in at.draft.site.values)
    at.draft.site.put(f"consumers.client-{number}", {}, at.leaf)
    at.leaf.tell(
        "look",
        f"`keys sync` makes a new key; to keep this one, write it into compose/{HOST}/keys/client-{number} before",
    )


def member(at: Step) -> None:
    """A model of a group."""
    found = next((item for item in at.draft.entries if item.name == at.leaf.text), None)
    if found is None:
        at.leaf.tell("never", "there is no model of this name")
        return
    document = at.draft.documents[at.leaf.file]
    if document.value("groups", at.leaf.path[1], "swap") is False:
        found.values.pop("swap", None)
        found.put("place.", "", at.leaf)
    else:
        found.values["swap"] = str(at.leaf.path[1])
        found.put("place.shared", None, at.leaf)


def matrix(at: Step) -> None:
    """Models that may be loaded together."""
    together = max(part.count("&") + 1 for part in at.leaf.text.split("|"))
    at.draft.site.values["shared.loaded"] = max(together, at.draft.site.get("shared.loaded", 1))
    at.leaf.tell("becomes", f"hosts.{HOST}.shared.swap.loaded: {together}")
    at.leaf.tell("look", "any models may be loaded together, not only these; the plan checks that the largest fit")


def peer(at: Step) -> None:
    """Another server with models."""
    for model in at.draft.documents[at.leaf.file].below("peers", at.leaf.path[1], "models"):
        item = at.draft.entry(model.text, model)
        item.asked, item.values["peer"] = model.text, at.leaf.path[1]
        item.values["provider"] = "openai"
        item.put("node.url", at.leaf.text, at.leaf)
        item.put("node.model", model.text, model)


def peer_key(at: Step) -> None:
    """The key of another server."""
    name = re.sub(r"[^A-Z0-9]+", "_", f"{at.leaf.path[1]}_API_KEY".upper()).lstrip("_0123456789")
    for item in at.draft.entries:
        if item.get("peer") == at.leaf.path[1]:
            item.put("node.api_key", name, at.leaf)


# --- Modelfiles ------------------------------------------------------------------------------------------------------


def begin_modelfile(draft: Draft, document: Document) -> None:
    """One model, called like its file."""
    path = PurePath(document.file)
    words = [part for part in path.name.split(".") if part.lower() not in ("modelfile", "txt")]
    entry = draft.entry(words[0] if words else "", document.leaves[0])
    entry.asked, entry.engine = entry.name, "llama"
    entry.values |= {"folder": document.folder, "from_ollama": True}


def base_model(at: Step) -> None:
    """The file or the model of Ollama's that a Modelfile begins from."""
    hub = re.fullmatch(r"(?:https?://)?(?:hf\.co|huggingface\.co)/([\w.-]+/[\w.-]+?)(?::([\w.-]+))?", at.leaf.text)
    if hub:
        at.entry.put("model.repository", f"{hub[1]}:{hub[2] or 'Q4_K_M'}", at.leaf)
    elif re.search(r"(^[./~])|\.gguf$", at.leaf.text):
        at.entry.put("model.path", at.leaf.text, at.leaf)
    else:
        at.entry.put("model.source", f"ollama:{at.leaf.text}", at.leaf)
        at.draft.site.values["store.ollama"] = "/usr/share/ollama/.ollama/models"
        at.leaf.tell(
            "look",
            f"read from Ollama's folder (hosts.{HOST}.model_stores.ollama); correct it if they are elsewhere",
        )


# --- variables -------------------------------------------------------------------------------------------------------


def begin_dotenv(draft: Draft, document: Document) -> None:
    """A server for every GPU_n_MODEL_PATH; what has no number is for all of them."""
    shared = {leaf.path[0]: leaf for leaf in document.leaves}
    wrapper = read_yaml(TABLES / "llama.yaml")["wrapper"]
    names = sorted({found[1] for key in shared if (found := re.fullmatch(r"GPU_(\d+)_MODEL_PATH", str(key)))}, key=int)
    if any(other.kind == "compose" for other in draft.documents.values()):
        names = []
    for number in names:
        own = {key: leaf for key, leaf in shared.items() if str(key).startswith(f"GPU_{number}_MODEL_")}
        entry = draft.entry(f"gpu-{number}", own[f"GPU_{number}_MODEL_PATH"])
        entry.engine, entry.folders = "llama", {"/models": "models"}
        for key, leaf in own.items():
            part = str(key).removeprefix(f"GPU_{number}_MODEL_")
            if part == "TYPE":
                entry.asked = leaf.text
                entry.put("pool.", leaf.text, leaf)
            elif part == "PATH":
                entry.put("model.path", leaf.text, leaf)
            else:
                leaf.tell("left", "a note; the pool and the file have names")
        entry.values["place.cards"], entry.cards_leaf = [str(int(number) - 1)], entry.leaf
        for key, leaf in shared.items():
            if key in wrapper or key == "EXTRA_ARGS" or str(key).startswith("LLAMA_ARG_"):
                read_variable(entry, leaf, str(key), leaf.text)
    for leaf in document.leaves:
        if not leaf.told and leaf.path[0] not in read_yaml(TABLES / "dotenv.yaml"):
            words = "used" if leaf.path[0] in draft.named else "other"
            leaf.tell("kit" if words == "used" else "left", read_yaml(TABLES / "dotenv.yaml")[words])

"""An installed package adds an inference server (tests/components/toy): no file of corral knows its name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from corral.components.declared import filled
from tests.components.installed import INVENTORY, corral
from tests.trees import ROOT


def changed(folder: Path, old: str, new: str) -> Path:
    text = INVENTORY.read_text()
    assert old in text
    path = folder / "inventory.yaml"
    path.write_text(text.replace(old, new))
    return path


def problems(path: Path) -> str:
    done = corral("check", "--inventory", str(path))
    assert done.returncode == 1
    return done.stdout + done.stderr


def test_it_is_planned_with_its_own_settings() -> None:
    done = corral("plan", "--json", "--inventory", str(INVENTORY))
    services = {item["name"]: item for item in json.loads(done.stdout)["hosts"]["tb"]["services"]}
    server = services["play-1"]
    found = (server["component"], server["ports"][0]["number"], server["slots"], server["memory_mib"])
    assert found == ("toy", 21910, 2, 128)


def test_it_is_rendered_with_its_template_and_its_program(tmp_path: Path) -> None:
    done = corral("render", "--inventory", str(INVENTORY), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tb" / "toy"
    settings = folder.joinpath("play-1.ini").read_text()
    assert "# Change the inventory or toy/settings.ini.j2, then run: ./generate.py render" in settings
    assert settings.endswith("[toy]\nmodel = play\nslots = 2\nfolder = fun\n")
    assert (
        folder.joinpath("server.py").read_text().endswith(ROOT.joinpath("tests/components/toy/server.py").read_text())
    )
    assert "example.org/toy-server:1.0" in folder.joinpath("compose.yaml").read_text()
    assert "TOY_API_KEY" in tmp_path.joinpath("tb", ".env.example").read_text()
    assert "play-1:21910" in tmp_path.joinpath("tb", "haproxy", "haproxy.cfg").read_text()


def test_its_rules_its_flags_and_its_settings_are_checked(tmp_path: Path) -> None:
    many = problems(changed(tmp_path, "extra_args: [--wound-up]", "slots: 9"))
    assert "pools.play.engine.slots: a toy has at most 4 slots, not 9; set slots: 4 or less [toy-slots]" in many
    words = problems(changed(tmp_path, "--wound-up", "--faster"))
    assert "extra_args[0]: the toy has no flag --faster; use --wound-up [server-flag]" in words
    keys = problems(changed(tmp_path, "extra_args: [--wound-up]", "gpu_layers: 3"))
    assert "pools.play.engine.gpu_layers: Toy has no gpu_layers" in keys
    local = problems(changed(tmp_path, "{address: 127.0.0.1}", "{address: 127.0.0.1, runtime: local}"))
    assert "Toy needs Docker" in local


def test_its_image_may_be_replaced_by_name(tmp_path: Path) -> None:
    path = changed(tmp_path, "gateway:", "images: {toy: 'example.org/toy-server:2.0'}\ngateway:")
    assert corral("check", "--inventory", str(path)).returncode == 0


def test_without_the_package_its_name_is_refused() -> None:
    command = [sys.executable, str(ROOT / "generate.py"), "check", "--inventory", str(INVENTORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert 'models.fun.server: must be one of llama.cpp, speaches, vllm, not "toy"' in done.stdout + done.stderr


def test_values_are_put_in_as_they_are_and_not_looked_at_again() -> None:
    told = {
        "$more": "several",
        "args": ["--port", "$port", "$words", "$gone"],
        "url": "http://$name:$port",
        "no": "$gone",
    }
    values = {"more": {"a": "$port"}, "port": 80, "words": ("$port", "$b"), "name": "$port", "gone": None}
    assert filled(told, values) == {"a": "$port", "args": ("--port", 80, "$port", "$b", None), "url": "http://$port:80"}


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(KeyError, match="port"):
        filled({"port": "$port"}, {})

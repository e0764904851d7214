"""Every part is found by its name, imported when it is asked for, and never silently replaced."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from t2i_experts.registry import BUILT_IN, LazyCommand, Registry


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, named in BUILT_IN.items() if kind != "command" for name in named])
def test_every_built_in_part_exists_and_is_what_its_target_says(kind: str, name: str) -> None:
    part = Registry().get(kind, name)
    assert callable(part)
    assert f"{part.__module__}:{part.__qualname__}" == BUILT_IN[kind][name]


def test_a_part_is_imported_when_it_is_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    registry.add("sampler", "late", "a_module_that_comes_later:sample")
    assert "late" in registry.names("sampler")
    module = ModuleType("a_module_that_comes_later")
    vars(module)["sample"] = first = object()
    monkeypatch.setitem(sys.modules, "a_module_that_comes_later", module)
    assert registry.get("sampler", "late") is first
    vars(module)["sample"] = object()
    assert registry.get("sampler", "late") is first


def test_an_added_object_is_the_part_itself_and_belongs_to_one_registry() -> None:
    registry = Registry()
    registry.add("source", "mine", dict)
    assert registry.get("source", "mine") is dict
    assert registry.names("source") == sorted([*BUILT_IN["source"], "mine"])
    assert "mine" not in Registry().names("source")
    assert "mine" not in BUILT_IN["source"]


def test_an_unknown_name_names_the_nearest_and_all_there_are() -> None:
    with pytest.raises(ValueError) as caught:
        Registry().get("sampler", "dpmp_2m")
    assert str(caught.value) == "unknown sampler 'dpmp_2m'; did you mean 'dpmpp_2m'? allowed: dpmpp_2m, euler, heun"
    with pytest.raises(ValueError) as caught:
        Registry().get("sampler", "zzz")
    assert str(caught.value) == "unknown sampler 'zzz'; allowed: dpmpp_2m, euler, heun"
    with pytest.raises(ValueError) as again:
        Registry().check("sampler", "zzz")
    assert str(again.value) == str(caught.value)


def test_a_name_is_checked_without_importing_its_part() -> None:
    known = Registry({"sampler": {"lost": "no_such_module:part"}}, plugins=())
    known.check("sampler", "lost")
    with pytest.raises(ModuleNotFoundError):
        known.get("sampler", "lost")


def test_an_unknown_kind_is_refused_by_every_door() -> None:
    registry = Registry()
    for door in (lambda: registry.add("smapler", "x", dict), lambda: registry.get("smapler", "x"), lambda: registry.names("smapler")):
        with pytest.raises(
            ValueError, match=r"kind of part 'smapler'; allowed: backbone, codec, command, encoder, features, metric, sampler, source"
        ):
            door()


def test_a_taken_name_cannot_be_replaced() -> None:
    registry = Registry()
    registry.add("sampler", "mine", dict)
    for name in ("euler", "mine"):
        before = registry.get("sampler", name)
        with pytest.raises(ValueError, match=f"sampler '{name}' exists already"):
            registry.add("sampler", name, list)
        assert registry.get("sampler", name) is before


def test_the_commands_are_the_command_lines_own_table() -> None:
    from t2i_experts.cli.app import COMMANDS, load

    assert Registry().names("command") == sorted(COMMANDS)
    for name in COMMANDS:
        assert load(name, Registry().get("command", name)).name == name
    with pytest.raises(ValueError, match="command 'generate' exists already"):
        Registry().add("command", "generate", LazyCommand("a:b", ""))


@pytest.mark.parametrize(
    ("kind", "name", "part", "said"),
    [
        ("sampler", "", dict, "the name '' of a sampler must be letters"),
        ("sampler", "--x", dict, "the name '--x' of a sampler"),
        ("sampler", "a b", dict, "the name 'a b' of a sampler"),
        ("sampler", 3, dict, "the name 3 of a sampler"),
        ("sampler", "x", "module.attribute", "'module.attribute'; a string must be of the form module:attribute"),
        ("sampler", "x", 3, "sampler 'x' is 3; it must be a function, a class or"),
        ("sampler", "x", LazyCommand("a:b", ""), "it must be a function, a class or"),
        ("command", "x", print, "it must be a LazyCommand or 'module:attribute', imported when it is run"),
        ("command", "x", LazyCommand("a", ""), "'a'; a string must be of the form module:attribute"),
    ],
)
def test_what_cannot_be_a_name_or_a_part_is_refused(kind: str, name: str, part: Any, said: str) -> None:
    registry = Registry()
    with pytest.raises(ValueError) as caught:
        registry.add(kind, name, part)
    assert said in str(caught.value)
    assert registry.names(kind) == Registry().names(kind)

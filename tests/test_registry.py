"""Every part is found by its name, imported when it is asked for, and never silently replaced."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from t2i_experts.registry import BUILT_IN, Registry


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, named in BUILT_IN.items() for name in named])
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


def test_an_unknown_kind_is_refused_by_every_door() -> None:
    registry = Registry()
    for door in (lambda: registry.add("smapler", "x", dict), lambda: registry.get("smapler", "x"), lambda: registry.names("smapler")):
        with pytest.raises(ValueError, match=r"kind of part 'smapler'; allowed: encoder, sampler, source"):
            door()


def test_a_taken_name_cannot_be_replaced() -> None:
    registry = Registry()
    registry.add("sampler", "mine", dict)
    for name in ("euler", "mine"):
        before = registry.get("sampler", name)
        with pytest.raises(ValueError, match=f"sampler '{name}' exists already"):
            registry.add("sampler", name, list)
        assert registry.get("sampler", name) is before

"""Plugins as they go wrong: each is reported by name, takes back what it added, and leaves the rest as it was.

They are packages on the path, as pip leaves them: a module and a .dist-info folder. `tests/test_plugin_packages.py` installs real ones.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from t2i_experts.cli.app import COMMANDS, main
from t2i_experts.registry import BUILT_IN, Registry

Install = Callable[..., None]

GOOD = """
def sample(): ...

def register(registry):
    registry.add("sampler", "NAME_sampler", sample)
    registry.add("source", "NAME_source", "NAME_of_another_module:source")
"""


def write_package(path: Path, name: str, source: str, version: str, target: str | None) -> None:
    """A module, and beside it what an installer leaves of the package that it came with."""
    path.mkdir(exist_ok=True)
    (path / f"{name}.py").write_text(source.replace("NAME", name), encoding="utf-8")
    facts = path / f"t2i_{name}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: t2i-{name}\nVersion: {version}\n")
    (facts / "entry_points.txt").write_text(f"[t2i_experts.plugins]\n{name} = {target or name}\n")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages, on the path; plugins are on."""
    before = set(sys.modules)
    monkeypatch.setenv("T2I_PLUGINS", "1")
    monkeypatch.delenv("T2I_PLUGIN_TIMEOUT", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.fixture
def install(path: Path) -> Install:
    """install(name, source=GOOD): the plugin `name` in the package t2i-`name`; NAME in the source is its name."""

    def install(name: str, source: str = GOOD, *, version: str = "1.0", target: str | None = None, into: Path = path) -> None:
        write_package(into, name, source, version, target)

    return install


def everything(registry: Registry) -> dict[str, list[str]]:
    return {kind: registry.names(kind) for kind in registry.kinds()}


def test_a_plugin_adds_parts_and_is_named_as_their_origin(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("good")
    registry = Registry()
    assert registry.names("sampler") == sorted([*BUILT_IN["sampler"], "good_sampler"])
    assert registry.get("sampler", "good_sampler") is sys.modules["good"].sample
    (plugin,) = registry.plugins()
    assert (plugin.name, plugin.target, plugin.distribution, plugin.version) == ("good", "good", "t2i-good", "1.0")
    assert plugin.error is None
    assert plugin.added == (("sampler", "good_sampler"), ("source", "good_source"))
    assert registry.origin("sampler", "good_sampler") is plugin
    assert registry.origin("sampler", "euler") is None
    assert "good_sampler" not in BUILT_IN["sampler"]
    assert capsys.readouterr() == ("", "")


def test_plugins_are_loaded_when_one_may_be_needed_and_once(install: Install, path: Path) -> None:
    install("good", GOOD + "\nwith open(__file__ + '.loads', 'a') as file:\n    file.write('x')\n")
    registry = Registry()
    registry.get("sampler", "euler")
    registry.add("sampler", "of_a_script", dict)
    assert registry.get("sampler", "of_a_script") is dict
    with pytest.raises(ValueError, match="kind of part"):
        registry.names("smapler")
    assert "good" not in sys.modules
    registry.get("sampler", "good_sampler")
    everything(registry)
    registry.plugins()
    with pytest.raises(ValueError, match="unknown sampler 'x'"):
        registry.get("sampler", "x")
    assert (path / "good.py.loads").read_text() == "x"


def test_an_object_of_a_module_can_be_the_plugin(install: Install) -> None:
    source = "class Plugin:\n    def register(self, registry):\n        registry.add('sampler', 'by_object', print)\nplugin = Plugin()"
    install("thing", source, target="thing:plugin")
    assert Registry().get("sampler", "by_object") is print


REGISTER = "def register(registry):\n    registry.add('sampler', 'half', print)\n    registry.add('source', 'half', print)\n    "


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no\\nlibrary')", "RuntimeError: no library"),
        ("import a_module_that_is_not_installed", "ModuleNotFoundError: No module named 'a_module_that_is_not_installed'"),
        ("def register(registry:", "SyntaxError: "),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def regster(registry): ...", "TypeError: middle has no register(registry)"),
        ("register = 3", "TypeError: middle has no register(registry)"),
        ("def register(): ...", "TypeError: register() takes 0 positional arguments"),
        (REGISTER + "1 / 0", "ZeroDivisionError: division by zero"),
        (REGISTER + "raise SystemExit", "SystemExit: "),
        (REGISTER + "registry.add('sampler', 'euler', print)", "ValueError: the sampler 'euler' exists already"),
        (REGISTER + "registry.add('sampler', 'a_good_sampler', print)", "ValueError: the sampler 'a_good_sampler' exists already"),
        (REGISTER + "registry.add('sampler', 'half', print)", "ValueError: the sampler 'half' exists already"),
        (REGISTER + "registry.add('command', 'generate', 'middle:register')", "ValueError: the command 'generate' exists already"),
        (
            REGISTER + "registry.add('router', 'x', print)",
            "ValueError: unknown kind of part 'router'; allowed: backbone, codec, command",
        ),
        (REGISTER + "registry.add('sampler', 'x', 'middle.x')", "must be of the form module:attribute"),
        (
            REGISTER + "import t2i_experts.registry as r; r.registry.add('sampler', 'behind_its_back', print)",
            "ValueError: a plugin adds its parts to the registry that its register(registry) is given",
        ),
    ],
)
def test_a_plugin_that_fails_is_reported_once_taken_back_and_harms_nobody(
    install: Install, capsys: pytest.CaptureFixture[str], source: str, said: str
) -> None:
    install("a_good")
    install("z_good")
    without = everything(Registry())
    install("middle", source)
    registry = Registry()
    assert everything(registry) == without
    registry.get("sampler", "a_good_sampler")
    registry.get("sampler", "z_good_sampler")
    first, middle, last = registry.plugins()
    assert (first.error, last.error, middle.added) == (None, None, ())
    assert middle.error is not None
    assert said in middle.error
    assert "Traceback" in middle.details
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"warning: the plugin 'middle' (t2i-middle 1.0) was skipped: {middle.error}\n")
    assert "behind_its_back" not in Registry().names("sampler")


def test_of_two_plugins_that_want_one_name_the_first_by_name_has_it_wherever_they_are_on_the_path(
    install: Install, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def part(): ...\ndef register(registry):\n    registry.add('sampler', 'wanted', part)"
    for name, folder in (("b", path), ("a", path.with_name("later"))):
        install(name, source, into=folder)
    for order in (["packages", "later"], ["later", "packages"]):
        monkeypatch.setattr(sys, "path", [*(str(path.with_name(name)) for name in order), *sys.path])
        registry = Registry()
        assert registry.get("sampler", "wanted").__module__ == "a"
        assert [plugin.error is None for plugin in registry.plugins()] == [True, False]


def test_of_two_versions_of_one_package_the_first_on_the_path_counts(install: Install, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("twice", version="2.0")
    install("twice", version="1.0", into=path.with_name("later"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(path.with_name("later"))])
    (plugin,) = Registry().plugins()
    assert (plugin.version, plugin.error) == ("2.0", None)


def test_a_package_with_unreadable_entry_points_is_no_plugin_and_no_harm(install: Install, path: Path) -> None:
    install("good")
    install("odd")
    (path / "t2i_odd-1.0.dist-info" / "entry_points.txt").write_text("[t2i_experts.plugins]\nnonsense\n")
    assert [plugin.name for plugin in Registry().plugins()] == ["good"]


HANGING = """
import os, time
def wait():
    while not os.path.exists(__file__ + ".free"):
        time.sleep(0.01)
{at_import}
def register(registry):
    registry.add("sampler", "early", print)
    wait()
    registry.add("sampler", "late", print)
"""


@pytest.mark.parametrize("at_import", ["wait()", ""])
def test_a_plugin_that_hangs_is_left_behind_and_what_it_adds_later_counts_for_nothing(
    install: Install, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_import: str
) -> None:
    install("hanging", HANGING.format(at_import=at_import))
    install("well")
    monkeypatch.setenv("T2I_PLUGIN_TIMEOUT", "0.2")
    registry = Registry()
    started = time.monotonic()
    names = registry.names("sampler")
    assert time.monotonic() - started < 5
    assert "well_sampler" in names
    assert not {"early", "late"} & set(names)
    hanging, _ = registry.plugins()
    assert hanging.error == "it was not ready after 0.2 s (T2I_PLUGIN_TIMEOUT)"
    assert "in wait" in hanging.details
    assert capsys.readouterr().err.count("'hanging' (t2i-hanging 1.0)") == 1
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "plugin hanging")
    assert thread.daemon
    (path / "hanging.py.free").touch()
    thread.join(5)
    assert not thread.is_alive()
    assert registry.names("sampler") == names


def test_a_plugin_that_uses_the_registry_while_it_is_loaded_does_not_wait_for_itself(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2I_PLUGIN_TIMEOUT", "5")
    monkeypatch.setattr("t2i_experts.registry.registry", registry := Registry())
    install(
        "curious",
        """
from t2i_experts import registry as room
seen = room.registry.names("sampler")
def register(registry):
    registry.add("sampler", "mine", registry.get("source", "folder"))
    seen.append(registry.get("sampler", "mine"))
""",
    )
    assert "mine" in registry.names("sampler")
    seen = sys.modules["curious"].seen
    assert seen[:-1] == sorted(BUILT_IN["sampler"])
    assert seen[-1] is registry.get("sampler", "mine")


def test_what_a_plugin_prints_does_not_reach_stdout(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("chatty", "print('hello')\ndef register(registry):\n    print('again')")
    assert Registry().plugins()[0].error is None
    assert capsys.readouterr() == ("", "hello\nagain\n")


def test_of_the_processes_on_a_host_one_reports(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("broken", "1 / 0")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert Registry().plugins()[0].error
        assert capsys.readouterr().err.count("\n") == lines


def test_an_unknown_name_recalls_the_plugins_that_were_skipped(install: Install) -> None:
    install("broken", "1 / 0")
    with pytest.raises(ValueError) as caught:
        Registry().get("sampler", "broken_sampler")
    assert str(caught.value).endswith("euler, heun; the plugin 'broken' (t2i-broken 1.0) was skipped: ZeroDivisionError: division by zero")


def test_a_part_that_cannot_be_imported_names_its_plugin(install: Install) -> None:
    install("good")
    with pytest.raises(RuntimeError, match=r"the source 'good_source' of the plugin 'good' \(t2i-good 1.0\): ModuleNotFoundError"):
        Registry().get("source", "good_source")


def test_plugins_can_be_turned_off(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("good")
    monkeypatch.setenv("T2I_PLUGINS", "0")
    assert Registry().plugins() == ()
    assert "good_sampler" not in Registry().names("sampler")
    assert "good" not in sys.modules


@pytest.mark.parametrize(
    ("variable", "value"),
    [("T2I_PLUGINS", "off"), *(("T2I_PLUGIN_TIMEOUT", value) for value in ("0", "-1", "soon", "nan", "inf", "1e300"))],
)
def test_variables_that_make_no_sense_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}='{value}' in the environment"):
        Registry().names("sampler")
    Registry().get("sampler", "euler")


# On the command line

COMMAND = """
from t2i_experts.registry import LazyCommand
def register(registry):
    registry.add("command", "greet", LazyCommand("NAME_command:greet", "Greet somebody."))
    registry.add("command", "plain", "NAME_command:greet")
"""


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """run(*argv) -> exit code, stdout, stderr, with a registry that has not looked for plugins yet."""
    monkeypatch.delenv("T2I_DEBUG", raising=False)

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr("t2i_experts.registry.registry", Registry())
        with pytest.raises(SystemExit) as exit:
            main(argv)
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


Run = Callable[..., tuple[int, str, str]]


def test_a_plugins_command_is_listed_without_being_imported_and_runs(install: Install, path: Path, run: Run) -> None:
    install("polite", COMMAND)
    (path / "polite_command.py").write_text(
        "def greet(name: str, times: int = 1):\n    'Greets.'\n    print(('hello ' + name + ' ') * times)"
    )
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert re.search(r"\n  greet +Greet somebody\.\n  plain +\(a plugin's command\)\n", out)
    assert out.index("generate") < out.index("greet")
    code, _, err = run("gret")
    assert code == 2
    assert "Did you mean 'greet'?" in err
    assert "polite_command" not in sys.modules
    assert run("greet", "you", "--times", "2") == (0, "hello you hello you \n", "")
    assert run("plain", "you") == (0, "hello you \n", "")
    assert run("greet", "--help")[1].startswith("Usage: t2i-experts greet ")


def test_built_in_commands_do_not_wait_for_plugins(install: Install, run: Run) -> None:
    install("broken", "1 / 0")
    assert run("train", "--help")[2] == ""
    assert "broken" not in sys.modules
    code, out, err = run("--help")
    assert code == 0
    assert "generate" in out
    assert err.count("'broken' (t2i-broken 1.0) was skipped") == 1


def test_plugins_lists_all_in_words(install: Install, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("plugins")[1].startswith("no plugins are installed")
    install("good")
    install("broken", "1 / 0")
    install("idle", "def register(registry): ...")
    code, out, err = run("plugins")
    assert code == 0
    assert out.splitlines()[:3] == [
        "'broken' (t2i-broken 1.0): failed: ZeroDivisionError: division by zero",
        "'good' (t2i-good 1.0): ok, adds sampler good_sampler, source good_source",
        "'idle' (t2i-idle 1.0): ok, adds nothing",
    ]
    assert "sampler: dpmpp_2m, euler, good_sampler (plugin good), heun\n" in out
    assert f"command: {', '.join(sorted(COMMANDS))}\n" in out
    assert err.count("\n") == 1
    assert "Traceback" not in out
    assert "broken.py" in run("--debug", "plugins")[1]
    monkeypatch.setenv("T2I_PLUGINS", "0")
    assert run("plugins")[1].startswith("plugins are turned off: T2I_PLUGINS=0\n")


def test_plugins_as_json(install: Install, run: Run) -> None:
    install("good", "print('hello')\n" + GOOD)
    install("broken", "1 / 0")
    code, out, _ = run("plugins", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["enabled"] is True
    broken, good = document["plugins"]
    assert (broken["name"], broken["state"], broken["error"]) == ("broken", "failed", "ZeroDivisionError: division by zero")
    assert (good["distribution"], good["version"], good["state"], good["error"]) == ("t2i-good", "1.0", "ok", None)
    assert good["added"] == [{"kind": "sampler", "name": "good_sampler"}, {"kind": "source", "name": "good_source"}]
    samplers = {part["name"]: part["from"] for part in document["parts"]["sampler"]}
    assert samplers == {"dpmpp_2m": None, "euler": None, "heun": None, "good_sampler": {"plugin": "good", "distribution": "t2i-good"}}
    assert {part["name"] for part in document["parts"]["command"]} == set(COMMANDS)

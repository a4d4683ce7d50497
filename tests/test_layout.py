"""The shape of the package: one way through its rooms, and no circle among its files.

A room is a module or a subpackage of `memcontrol_hf`. It imports only rooms above it in `ROOMS`; deferred imports and
those for type checkers count, too.
"""

import ast
import re
import sys
import tomllib
from dataclasses import fields
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from memcontrol_hf.flags import ScriptArguments

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "memcontrol_hf"
ROOMS = [
    "progress",
    "error_lines",
    "whole_files",
    "randomness",
    "images",
    "masks",
    "adapter_folder",
    "tracking",
    "demo",
    "tuners",
    "search_space",
    "families",
    "metrics",
    "data",
    "encoders",
    "sampling",
    "adapter_checks",
    "adapters",
    "checkpoints",
    "mitigations",
    "evaluation",
    "training_loss",
    "model_walks",
    "screening",
    "search",
    "report",
    "audit",
    "publish",
    "training_arguments",
    "trainer",
    "workflow",
    "dry_run",
    "command_line",
    "flags",
    "public_facts",
    "flag_parser",
    "from_flags",
    "train",
    "screen",
    "audit_command",
    "cli",
]
"""Every room, each after all that it may import. Only the lazy `memcontrol_hf/__init__.py` stands outside."""


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted names below the package, with their files; a subpackage's `__init__` has the name of the subpackage."""
    files = (file for file in package.rglob("*.py") if file != package / "__init__.py")
    return {
        ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): file for file in files
    }


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules below the package that a file imports, anywhere in it."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name.removeprefix("memcontrol_hf.") for alias in node.names if "." in alias.name]
            found |= {target for target in targets if target in known}
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif (node.module or "").split(".")[0] == "memcontrol_hf":
            base, node.module = [], node.module.partition(".")[2]
        else:
            continue
        target = ".".join([*base, *filter(None, [node.module])])
        names = {f"{target}.{alias.name}".lstrip(".") for alias in node.names}
        found |= {name if name in known else target for name in names}
    return {target for target in found if target in known and target != name}


def back_arrows(package: Path = PACKAGE) -> list[str]:
    """Imports of a room that does not stand above the importing one."""
    known = modules(package)
    arrows = ((name, target) for name, file in known.items() for target in imports(name, file, known))
    rooms = {(name, target): (name.split(".")[0], target.split(".")[0]) for name, target in arrows}
    return sorted(
        f"{name} imports {target}"
        for (name, target), (room, imported) in rooms.items()
        if room != imported and ROOMS.index(imported) >= ROOMS.index(room)
    )


def test_every_module_is_in_a_room_and_every_room_is_there():
    assert sorted({name.split(".")[0] for name in modules()}) == sorted(ROOMS)


def test_a_room_imports_only_rooms_above_it():
    assert back_arrows() == []


def test_every_library_that_is_imported_is_declared():
    nodes = [node for file in modules().values() for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    libraries = {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "memcontrol_hf"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    declared = {canonicalize_name(Requirement(text).name) for text in asked}
    of_module = packages_distributions()
    missing = [
        name
        for name in sorted(libraries)
        if not declared & {canonicalize_name(found) for found in of_module.get(name, [name])}
    ]
    assert len(libraries) > 20 and missing == []


def test_no_files_import_each_other_in_a_circle():
    known = modules()
    try:
        TopologicalSorter({name: imports(name, file, known) for name, file in known.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("file", "line", "arrow"),
    [
        ("data/splits.py", "from ..trainer import MemControlTrainer", "data.splits imports trainer"),
        ("metrics/quality.py", "def f():\n    from ..data import EncodedImages", "metrics.quality imports data"),
        ("tracking.py", "if TYPE_CHECKING:\n    from .report import MemorizationReport", "tracking imports report"),
        ("images.py", "import memcontrol_hf.metrics", "images imports metrics"),
    ],
)
def test_a_back_arrow_is_seen(tmp_path, file, line, arrow):
    for source in modules().values():
        target = tmp_path / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8") + (f"\n{line}\n" if target == tmp_path / file else ""))
    assert back_arrows(tmp_path) == [arrow]


def test_the_picture_of_the_package_is_this_list():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.S | re.M)
    assert ROOMS in [re.findall(r"^(\w+)  +\S", block, re.M) for block in blocks]


def test_a_long_file_says_why_it_is_one_file():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "training_scripts").rglob("*.py")]
    texts = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    long = {name: text for name, text in texts.items() if len(text.splitlines()) > 500}
    assert [name for name, text in long.items() if "one file" not in ast.get_docstring(ast.parse(text))] == []


def test_every_flag_says_whether_a_study_depends_on_it_and_what_is_published():
    for flag in fields(ScriptArguments):
        study, publish = flag.metadata.get("study"), flag.metadata.get("publish")
        known = study in (True, False) or study in {other.name for other in fields(ScriptArguments)}
        assert known, f"--{flag.name}: does a study depend on it? See _flag in flags.py"
        assert publish in ("yes", "unless_path", "placeholder", "never"), f"--{flag.name}: may it be published?"

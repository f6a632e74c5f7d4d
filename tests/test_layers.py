"""Imports run down the list of rooms only, so that the folders show the path of a byte."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "rbdfs"

NOUNS = {"errors", "spec", "catalog", "tasks", "threads"}
MAY_IMPORT = {
    "cli": {"cli", "commands", "fuse", "ceph", "devcluster", *NOUNS},
    "commands": {"commands", "fuse", "image", "target", "ceph", "devcluster", *NOUNS},
    "fuse": {"fuse", "image", *NOUNS},
    "image": {"image", *NOUNS},
    "target": {"target", *NOUNS},
    "ceph": {"ceph", *NOUNS},
    "devcluster": {"devcluster", *NOUNS},
    "catalog": set(),
    "spec": {"errors"},
    "tasks": set(),
    "threads": set(),
    "errors": set(),
}
ONLY_IN = {"pyfuse3": {"fuse"}, "rados": {"ceph"}, "rbd": {"ceph"}, "argparse": {"cli"}}
PURE = (
    "ceph/kept.py",
    "fuse/mount_options.py",
    "fuse/protocol.py",
    "fuse/troubles.py",
    "image/holes.py",
    "image/striper.py",
    "image/readahead.py",
    "image/throttle.py",
)
IMPURE = {"trio", "os", "socket", "subprocess", "threading", "time"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, with their dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "rbdfs")
    return found


def rooms() -> dict[Path, str]:
    """Each file with its room: the folder, or the module beside the folders."""
    files = {path: path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    return {path: name.parts[0].removesuffix(".py") for path, name in files.items()}


def test_imports_run_down_the_list_only() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, room in rooms().items()
        if room in MAY_IMPORT
        for name in imports(path)
        if name.startswith("rbdfs.") and name.split(".")[1] not in MAY_IMPORT[room] | {"__version__"}
    ]
    assert not wrong


def test_foreign_modules_stay_in_their_room() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, room in rooms().items()
        for name in imports(path)
        if room not in ONLY_IN.get(name.split(".")[0], {room})
    ]
    assert not wrong


def test_policy_is_pure() -> None:
    wrong = [f"{name} imports {module}" for name in PURE for module in imports(PACKAGE / name) & IMPURE]
    assert not wrong

"""Imports run down the list of rooms only, so that the folders show the path of a byte."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent.parent / "rbdfs"

NOUNS = {"errors", "spec", "catalog", "tasks", "threads"}
CEPH = {"ceph", "ceph/errors", "ceph/bindings", "ceph/metadata", "ceph/connection", "ceph/image"}
MAY_IMPORT = {
    "cli": {"cli", "commands", "fuse", "devcluster", *CEPH, *NOUNS},
    "commands": {"commands", "fuse", "image", "export", "devcluster", *CEPH, *NOUNS},
    "fuse": {"fuse", "image", *NOUNS},
    "export": {"export", "image", *NOUNS},
    "image": {"image", *NOUNS},
    "ceph": {*CEPH, *NOUNS},
    "ceph/image": {"ceph/image", "ceph/metadata", "ceph/bindings", "ceph/errors", *NOUNS},
    "ceph/connection": {"ceph/connection", "ceph/metadata", "ceph/bindings", "ceph/errors", *NOUNS},
    "ceph/metadata": {"ceph/metadata", "ceph/bindings", "ceph/errors", *NOUNS},
    "ceph/bindings": {"ceph/bindings", "ceph/errors", *NOUNS},
    "devcluster": {"devcluster", *NOUNS},
    "catalog": set(),
    "spec": {"errors"},
    "tasks": set(),
    "threads": set(),
    "errors": set(),
}
ONLY_IN = {"pyfuse3": {"fuse"}, "rados": {"ceph"}, "rbd": {"ceph"}, "argparse": {"cli"}}
PURE = (
    "ceph/metadata/versioned.py",
    "fuse/mount_options.py",
    "fuse/protocol.py",
    "fuse/requests.py",
    "fuse/timeouts.py",
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
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists()}
            found |= modules or {node.module}
    return found


def room(module: str) -> str:
    """Where a module of ours stands: the folder in ceph/, or the folder, or the module beside the folders."""
    parts = module.split(".")[1:]
    if parts[0] == "ceph":
        return "/".join(parts[:2]) if len(parts) > 2 or parts[1:] == ["errors"] else "ceph"
    return parts[0]


def files() -> dict[Path, str]:
    """Each file with its room."""
    names = {path: path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")}
    return {path: room(".".join(name.parts)) for path, name in names.items() if name.name != "__init__"}


def test_imports_run_down_the_list_only() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, here in files().items()
        if here in MAY_IMPORT
        for name in imports(path)
        if name.startswith("rbdfs.") and room(name) not in MAY_IMPORT[here]
    ]
    assert not wrong


def test_every_room_is_on_the_list() -> None:
    assert set(files().values()) - {"__main__", "ceph/errors"} == set(MAY_IMPORT)


def test_no_module_imports_itself_by_way_of_others() -> None:
    ours = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): imports(path) for path in files()}
    while leaves := [name for name, needed in ours.items() if not needed & ours.keys()]:
        for name in leaves:
            del ours[name]
    assert not ours


def test_foreign_modules_stay_in_their_room() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, here in files().items()
        for name in imports(path)
        if here.split("/")[0] not in ONLY_IN.get(name.split(".")[0], {here.split("/")[0]})
    ]
    assert not wrong


def test_policy_is_pure() -> None:
    wrong = [f"{name} imports {module}" for name in PURE for module in imports(PACKAGE / name) & IMPURE]
    assert not wrong

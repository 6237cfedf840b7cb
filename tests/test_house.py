"""What holds the house together, besides the linters: where private names of torch may stand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTERNALS = ROOT / "lightning_revlib" / "nn" / "internals.py"


def private_names(source: str) -> Iterator[str]:
    """Yield the private names of torch that a module imports, or reaches from `torch`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def of_torch(source: str) -> set[str]:
    """Return them all, in full; `torch.ops` has operators, of which some begin with an underscore."""
    names = {name for name in private_names(source) if name.startswith("torch.") and not name.startswith("torch.ops.")}
    private = {name for name in names if any(p.startswith("_") and not p.startswith("__") for p in name.split("."))}
    return {name for name in private if not any(other.startswith(f"{name}.") for other in private)}


def test_private_names_of_torch_stand_in_one_file() -> None:
    files = [*(ROOT / "lightning_revlib").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): of_torch(path.read_text()) for path in files if path != INTERNALS}
    assert not {path: names for path, names in found.items() if names}
    assert 5 < len(of_torch(INTERNALS.read_text())) <= 14


def test_the_check_finds_them() -> None:
    source = "import torch\nfrom torch.utils._pytree import tree_map\ntorch._C._cuda_init()\ntorch.__version__\n"
    assert of_torch(source) == {"torch.utils._pytree.tree_map", "torch._C._cuda_init"}

"""Every function, method and class of the library has a caller outside of the tests."""

import ast
from pathlib import Path

from vulture import Vulture

ROOT = Path(__file__).parents[1]
BY_NAME = (
    "finetune/families",
    "llm/kvcache/selectors",
    "llm/kvcache/stores",
    "llm/prefill",
    "models",
)
"""Folders whose classes are found by the name of the module or of a setting."""
CALLED = {
    "smollm2": "the README",
    "pytest_collection_finish": "pytest",
    "equals": "users of SparsePlan: plans are data and can be compared",
    # Methods of transformers' caches:
    "batch_repeat_interleave": "transformers",
    "batch_select_indices": "transformers",
    "get_mask_sizes": "transformers",
    "get_max_length": "transformers",
}
"""Names that something outside of this repository calls, and who."""


def registered(item) -> bool:
    """Return whether a decorator of the function registers it, as for operators of torch."""
    for node in ast.walk(ast.parse(Path(item.filename).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == item.name:
            return any(
                word in ast.unparse(x)
                for x in node.decorator_list
                for word in ("register", "custom_op", "triton", "operator")
            )
    return False


def test_everything_has_a_caller():
    found = Vulture()
    folders = ("dit_accel", "kernels", "pipelines", "eval", "finetune")
    found.scavenge([str(ROOT / x) for x in folders])
    unused = []
    for item in found.get_unused_code(min_confidence=60):
        path = Path(item.filename).relative_to(ROOT)
        if (
            item.typ not in ("function", "method", "class", "property")
            or path.parts[0] != "dit_accel"
        ):
            continue
        by_name = item.typ == "class" and any(
            path.is_relative_to(f"dit_accel/{x}") for x in BY_NAME
        )
        if item.name not in CALLED and not by_name and not registered(item):
            unused.append(f"{path}:{item.first_lineno} {item.name}")
    assert not unused

"""Requirements of installed packages, and a machine that has only some of them."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BARE = ("torch", "triton", "jaxtyping", "numpy")
"""Packages that a machine with a GPU has in any case."""


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(roots):
    """The installed packages that `roots` cannot do without, themselves among them."""
    found, left = set(), [canonical(x) for x in roots]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(canonical(requirement.name))
    return found


def run_with(roots, folder, *arguments, **environment):
    """Run Python with the packages `roots`, what they need, and nothing else that is installed."""
    folder.mkdir()
    tops = {
        (top, metadata.distribution(name).locate_file(top))
        for name in needed(roots)
        for top in (x.parts[0] for x in metadata.files(name))
    }
    for top, place in tops:
        if top not in ("..", "__pycache__"):
            (folder / top).symlink_to(place)
    # -S: without the folder where packages are installed.
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        cwd=ROOT,
        timeout=600,
        check=False,
    )

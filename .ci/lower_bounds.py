"""The lowest versions that pyproject.toml admits, as a constraints file for pip.

With --installed instead: the versions that stand in this environment, of the same packages. Needs `packaging`.
"""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


def requirements(project: dict) -> list[Requirement]:
    """What the package and its test extra ask for, in pyproject.toml's order."""
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["test"]]


def lowest(requirement: Requirement) -> str:
    """`torch>=2.11,<3` becomes `torch==2.11`; a requirement that names no lowest version is refused."""
    bounds = [part.version for part in requirement.specifier if part.operator in (">=", "~=", "==")]
    bound = max(bounds, key=Version, default=None)
    if bound is None or not requirement.specifier.contains(bound, prereleases=True):
        raise ValueError(f"{requirement} names no lowest version: write one, as in {requirement.name}>=1.2")
    marker = f" ; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}=={bound}{marker}"


def main() -> None:
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    wanted = requirements(tomllib.loads(text)["project"])
    if "--installed" in sys.argv[1:]:
        print(
            f"python {sys.version.split()[0]}",
            *(f"{one.name} {version(one.name)}" for one in wanted),
            sep=", ",
        )
    else:
        print(*map(lowest, wanted), sep="\n")


if __name__ == "__main__":
    main()

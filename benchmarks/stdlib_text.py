"""Write Python's own standard library, without its tests, as one text to train and measure on:

python benchmarks/stdlib_text.py stdlib.txt

The last tenth, which training holds out, are whole modules that come late in an order by hash, so
that it is of the same kind as the rest.
"""

import argparse
import hashlib
import sysconfig
from pathlib import Path

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def sources() -> list[Path]:
    """The standard library's modules, relative to it, in an order that mixes all packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = (path.relative_to(folder) for path in folder.rglob("*.py"))
    kept = (path for path in found if LEFT_OUT.isdisjoint(path.parts))
    return sorted(kept, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())


def main(target: Path) -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    target.write_bytes(b"\n".join((folder / path).read_bytes() for path in sources()))
    print(f"{target}: {target.stat().st_size:,} bytes of {len(sources())} modules")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path)
    main(parser.parse_args().target)

"""``python -m tests.parity DIR [--json FILE]``: compare the production code with every recorded value in DIR."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.parity.data import compare_data
from tests.parity.metrics import compare_metrics
from tests.parity.model import compare_model
from tests.parity.rows import Row
from tests.parity.vision import compare_lavis

# Part of the layout → the file that shows it is there, and what compares it.
PARTS: dict[str, tuple[str, Callable[[Path], list[Row]]]] = {
    "model": ("config.json", compare_model),
    "lavis": ("golden.safetensors", compare_lavis),
    "data": ("tokenizer/cases.json", compare_data),
    "data/metrics": ("models/features.json", compare_metrics),
}


def find_parts(folder: Path) -> dict[str, Path]:
    """Return the parts that ``folder`` holds, or is itself."""
    parts = {}
    for name, (witness, _) in PARTS.items():
        for candidate in (folder / name, folder / Path(name).name, folder):
            if (candidate / witness).is_file():
                parts[name] = candidate
                break
    return parts


def main() -> int:
    """Compare, print one row a value, and return 1 on any difference, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    parts = find_parts(arguments.folder)
    if not parts:
        print(f"error: {arguments.folder}: holds none of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    rows = [row for name, path in parts.items() for row in PARTS[name][1](path)]
    print(f"{'group':14} {'name':70} {'max abs':>10} {'max rel':>10} {'tolerance':>10} verdict")
    for row in rows:
        verdict = "equal" if row.equal else "DIFFERENT"
        numbers = f"{row.max_abs:10.2e} {row.max_rel:10.2e} {row.tolerance:10.0e}"
        print(f"{row.group:14} {row.name:70} {numbers} {verdict} {row.note}".rstrip())
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return report(rows, parts)


def report(rows: list[Row], parts: dict[str, Path]) -> int:
    """Print the totals and return the exit code."""
    compared, equal = Counter(row.group for row in rows), Counter(row.group for row in rows if row.equal)
    for group, count in compared.items():
        worst = max((row for row in rows if row.group == group), key=lambda row: row.max_rel)
        print(f"{group}: {count} compared, {equal[group]} equal, worst {worst.max_rel:.1e} ({worst.name})")
    absent = [name for name in PARTS if name not in parts]
    different = len(rows) - sum(equal.values())
    print(f"total: {len(rows)} compared, {len(rows) - different} equal, {different} different", end="")
    print(f"; not there: {', '.join(absent)}" if absent else "")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.parity DIR [--json FILE]``: compare the production code with the recorded values in DIR."""

import argparse
import importlib
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.parity.rows import Row

# Part of the layout → the file that shows it is there, and what compares it (imported only when needed).
PARTS = {
    "model": ("golden_stage1.json", "tests.parity.model:compare_model"),
    "lavis": ("golden.safetensors", "tests.parity.vision:compare_lavis"),
    "data": ("tokenizer/cases.json", "tests.parity.data:compare_data"),
    "data/metrics": ("models/features.json", "tests.parity.metrics:compare_metrics"),
}


def compare_part(name: str, folder: Path) -> list[Row]:
    """Compare one part of the layout."""
    module, function = PARTS[name][1].split(":")
    rows: list[Row] = getattr(importlib.import_module(module), function)(folder)
    return rows


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
    if not arguments.folder.is_dir():
        print(f"error: {arguments.folder}: no such folder", file=sys.stderr)
        return 2
    if arguments.json and not arguments.json.parent.is_dir():
        print(f"error: --json {arguments.json}: no such folder to write to", file=sys.stderr)
        return 2
    parts = find_parts(arguments.folder)
    if not parts:
        print(f"error: {arguments.folder}: holds none of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    rows = [row for name, path in parts.items() for row in compare_part(name, path)]
    print(f"{'group':14} {'name':70} {'max abs':>10} {'max rel':>10} {'tolerance':>10} verdict")
    for row in rows:
        verdict = "equal" if row.equal else "DIFFERENT"
        verdict = verdict if row.compared else "not compared:"
        numbers = f"{row.max_abs:10.2e} {row.max_rel:10.2e} {row.tolerance:10.0e}"
        print(f"{row.group:14} {row.name:70} {numbers} {verdict} {row.note}".rstrip())
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return report(rows, parts)


def report(rows: list[Row], parts: dict[str, Path]) -> int:
    """Print the totals and return the exit code."""
    compared = [row for row in rows if row.compared]
    counts, equal = Counter(row.group for row in compared), Counter(row.group for row in compared if row.equal)
    for group, count in counts.items():
        worst = max((row for row in compared if row.group == group), key=lambda row: row.max_rel)
        print(f"{group}: {count} compared, {equal[group]} equal, worst {worst.max_rel:.1e} ({worst.name})")
    different = len(compared) - sum(equal.values())
    left = [f"{row.group} {row.name} ({row.note})" for row in rows if not row.compared]
    print(f"total: {len(compared)} compared, {len(compared) - different} equal, {different} different")
    print(f"recorded values not compared: {len(left)}" + "".join(f"\n  {name}" for name in left))
    absent = [name for name in PARTS if name not in parts]
    if absent:
        print(f"not in this folder: {', '.join(absent)}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

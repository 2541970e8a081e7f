"""Links and commands of the documents hold."""

import re
from pathlib import Path

import pytest

from minigpt5.arguments import FLAGS, build_parser
from minigpt5.config import PROJECT_ROOT

DOCUMENTS = [
    *PROJECT_ROOT.glob("*.md"),
    *PROJECT_ROOT.glob("docs/*.md"),
    *PROJECT_ROOT.glob("datasets/*/README.md"),
    PROJECT_ROOT / "minigpt5" / "tinyworld" / "weights" / "README.md",
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT_ROOT)))
def test_relative_links_lead_somewhere(document: Path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert broken == []


def test_readme_uses_flags_that_exist():
    known = {f"--{flag.name}" for flag in FLAGS} | set(build_parser()._option_string_actions)
    for line in (PROJECT_ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if "train_eval.py" in line:
            assert set(re.findall(r"--\w+", line)) <= known, line

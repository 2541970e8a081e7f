"""Links and commands of the documents hold."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import metric
from benchmarks import run
from examples import playground
from minigpt4.errors import InputError
from minigpt5 import checkpoint_command
from minigpt5.arguments import parse_arguments, resolve_config
from minigpt5.config import PROJECT_ROOT
from minigpt5.data.prepare import __main__ as prepare
from minigpt5.tinyworld import __main__ as tinyworld
from minigpt5.tinyworld.pretraining.parts import PARTS

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


def test_the_card_has_the_recipes_steps():
    card = (PROJECT_ROOT / "minigpt5" / "tinyworld" / "weights" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d ]+) × (\d+)[^|]*\|$", card, re.MULTILINE)
    assert {name: int(steps.replace(" ", "")) for name, steps, _ in rows} == {
        name: part.recipe.steps for name, part in PARTS.items()
    }


COMMANDS = [
    (document, command)
    for document in DOCUMENTS
    for block in re.findall(
        r"^ *```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    if "<<" not in block
    for command in block.replace("\\\n", " ").replace("&&", "\n").splitlines()
    if command.split("#")[0].strip()
]
LAUNCHERS = {"torchrun", "srun"}
NOT_OURS = {"export", "cd", "source", "pip", "make", "img2dataset"}


def parse_train_eval(argv: list[str], variables: dict[str, str]) -> None:
    arguments = parse_arguments(argv)
    config = resolve_config(arguments, variables)
    assert config.is_training or config.test_weight or arguments.plan is not None


def parse_metric(argv: list[str], variables: dict[str, str]) -> None:
    with pytest.raises(InputError, match="nowhere"):  # its flags are known, and there is nothing to score
        metric.main([*argv, "--set", "paths.outputs=nowhere"])


def parse_playground(argv: list[str], variables: dict[str, str]) -> None:
    _, shared = playground.parse(argv)
    resolve_config(parse_arguments(shared), variables)


def parse_web_demo(argv: list[str], variables: dict[str, str]) -> None:
    resolve_config(parse_arguments(argv), variables)


def parse_pytest(argv: list[str], variables: dict[str, str]) -> None:
    flag, marker = argv
    settings = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert flag == "-m" and marker in {line.split(":")[0] for line in settings["markers"]}


PARSERS = {
    "train_eval.py": parse_train_eval,
    "metric.py": parse_metric,
    "playground.py": parse_playground,
    "examples/web_demo.py": parse_web_demo,
    "minigpt5.checkpoint": lambda argv, _: checkpoint_command.build_parser().parse_args(argv),
    "minigpt5.data.prepare": lambda argv, _: prepare.parse(argv),
    "minigpt5.tinyworld": lambda argv, _: tinyworld.build_parser().parse_args(argv),
    "benchmarks/run.py": lambda argv, _: run.parse(argv),
    "pytest": parse_pytest,
    "tests.parity": lambda argv, _: [Path(argv[0]).resolve(strict=True)],
}


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=lambda value: getattr(value, "stem", value))
def test_commands_parse(document: Path, command: str):
    words = shlex.split(command, comments=True)
    variables = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_0-9]+=.*", word))
    words = [word for word in words if word.split("=")[0] not in variables]
    if words[0] in NOT_OURS:
        resolve_config(parse_arguments(["--is_training"]), variables)
        return
    if words[0] in LAUNCHERS:
        words = ["python", *words[words.index("train_eval.py") :]]
    assert words[0] in ("python", "python3"), command
    program, *argv = words[2:] if words[1] == "-m" else words[1:]
    PARSERS[program](argv, variables)


def test_every_document_with_commands_is_read():
    names = {document.relative_to(PROJECT_ROOT).as_posix() for document, _ in COMMANDS}
    assert {"README.md", "docs/reproduction.md", "docs/data.md", "datasets/VIST/README.md"} <= names

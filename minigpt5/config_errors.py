"""What to say of a configuration that does not validate: each key, what is wrong with it, and who set it."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError


def explain_problems(error: ValidationError, root: Any, source: str, origins: Mapping[str, str]) -> str:
    """Return a message that lists every problem.

    Args:
        error: what pydantic found.
        root: the dataclass that was validated; gives the known keys.
        source: where values without an origin come from; named only where one of them is wrong.
        origins: dotted key → the flag or variable that set it.
    """
    problems = [(problem, _setters(problem, origins)) for problem in error.errors()]
    is_from_source = any(not setters for _, setters in problems)
    heading = f"{source}: invalid configuration" if is_from_source else "invalid configuration"
    return "\n".join([heading, *(f"  {_describe(problem, setters, root)}" for problem, setters in problems)])


def _setters(problem: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, str]:
    """Return the origins whose key is the problem's, or stands above or below it."""
    key = f"{_dotted(problem['loc'])}."
    return {
        name: origin
        for name, origin in origins.items()
        if key.startswith(f"{name}.") or f"{name}.".startswith(key)
    }


def _describe(problem: Mapping[str, Any], setters: Mapping[str, str], root: Any) -> str:
    *parents, _ = problem["loc"]
    named = ", ".join(f"{origin} ({name})" for name, origin in setters.items()) or _dotted(problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{named}: unknown key; known here: {', '.join(_known_keys(parents, root))}"
    return f"{named}: {problem['msg'][0].lower()}{problem['msg'][1:]}, found {problem['input']!r}"


def _known_keys(parts: Iterable[Any], root: Any) -> list[str]:
    node = root
    for part in parts:
        node = node.__dataclass_fields__[part].type
    return sorted(node.__dataclass_fields__)


def _dotted(parts: Iterable[Any]) -> str:
    return ".".join(str(part) for part in parts)

"""What ``torch.compile`` needs and how much of it there may be."""

import torch

_MOST_GRAPHS = 64


def cpp_compiler() -> str | None:
    """Return the C++ compiler that ``torch.compile`` takes, if it finds one; on a GPU, too, it needs one."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return None


def allow_many_graphs() -> None:
    """Let torch keep compiling a function; after 8 graphs it would run it as it is, without a word."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)

"""One thread a process, also in those that tests start: the models are tiny, and workers share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402  the variables are read when torch is imported
import torch  # noqa: E402


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none")
    if item.get_closest_marker("compiler"):
        from minigpt5.compilation import cpp_compiler

        if cpp_compiler() is None:
            pytest.skip("needs a C++ compiler (g++ or clang++), and there is none")


@pytest.fixture(autouse=True)
def no_gpu_but_in_tests_of_one(request, monkeypatch):
    """Hide GPUs, which runs would take by themselves: what is compared to the bit is compared on the CPU."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

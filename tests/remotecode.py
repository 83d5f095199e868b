"""What a model of the tier code must do where this toolkit is missing. Run as a script, it needs torch, transformers
and safetensors alone:

    python remotecode.py RESULTS FOLDER...

It writes {folder: {check: number or text}} as JSON. In a process that also has the toolkit, importing it is refused."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch


def measure(folder: str) -> dict[str, object]:
    """Load a model, and use it as people use models of transformers."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    load = dict(trust_remote_code=True, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (2, 11))
    results: dict[str, object] = {}
    with torch.no_grad():
        plain = model(ids).logits
        results["scale"] = float(plain.abs().max())
        prompt = ids[:, :5]
        arguments = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6, pad_token_id=0)
        arguments |= dict(eos_token_id=None)
        cached, slow = (model.generate(prompt, use_cache=use, **arguments) for use in (True, False))
        results["cached tokens differ"] = int((cached != slow).sum())
        padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), prompt), dim=1)
        mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(prompt)), dim=1)
        from_padded = model.generate(padded, **arguments | dict(attention_mask=mask))[:, 3:]
        results["padded tokens differ"] = int((from_padded != slow).sum())
        beams = model.generate(prompt, num_beams=2, **arguments)
        results["beams"] = list(beams.shape)
        compiled = torch.compile(model, backend="aot_eager")
        results["compiled"] = float((compiled(ids).logits - plain).abs().max())
    with tempfile.TemporaryDirectory() as copy:
        model.save_pretrained(copy)
        again = AutoModelForCausalLM.from_pretrained(copy, **load).eval()
        with torch.no_grad():
            results["saved again"] = float((again(ids).logits - plain).abs().max())
        tensors = again.state_dict()
        results["tensors differ"] = [n for n, t in model.state_dict().items() if not torch.equal(t, tensors[n])]
    results |= _train(model, ids)
    return results


def _train(model, ids):
    """The loss as Trainer asks for it: of two micro-batches, the sum over all labels of both."""
    labels = ids.clone()
    labels[0, 3:] = -100
    with torch.no_grad():
        whole = model(ids, labels=labels).loss
        items = (labels[:, 1:] != -100).sum()
        rows = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(2)]
    model.train()
    model(ids, labels=labels).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    return {"micro-batches": float(abs(sum(rows) - whole)), "without gradient": without}


def main() -> None:
    """Measure the folders of the command line, and write the results."""
    for name in ("toolkit", "components"):
        sys.modules[name] = None
    target, *folders = sys.argv[1:]
    Path(target).write_text(json.dumps({folder: measure(folder) for folder in folders}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as copies:
        os.environ |= {"HF_MODULES_CACHE": copies, "HF_HUB_OFFLINE": "1"}
        main()

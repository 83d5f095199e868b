"""What a model of the tier code must do where this toolkit is missing. Run as a script, it needs torch, transformers
and safetensors alone; "inductor" also needs a C++ compiler, and "trainer" the package accelerate:

    python remotecode.py everything|inductor|trainer RESULTS FOLDER...

It writes {folder: {check: number or text}} as JSON. In a process that also has the toolkit, importing it is refused."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

LOAD = dict(trust_remote_code=True, dtype="float32")
STEPS, ROWS, LENGTH = 3, 4, 12  # of the texts on which Trainer trains; two micro-batches a step


def measure(folder: str) -> dict[str, object]:
    """Load a model, and use it as people use models of transformers."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, **LOAD).eval()
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
        beams, slow = (model.generate(prompt, num_beams=2, use_cache=use, **arguments) for use in (True, False))
        results["beams"], results["beams differ"] = list(beams.shape), int((beams != slow).sum())
        compiled = torch.compile(model, backend="aot_eager")
        results["compiled"] = float((compiled(ids).logits - plain).abs().max())
    with tempfile.TemporaryDirectory() as copy:
        model.save_pretrained(copy)
        again = AutoModelForCausalLM.from_pretrained(copy, **LOAD).eval()
        with torch.no_grad():
            results["saved again"] = float((again(ids).logits - plain).abs().max())
        tensors = again.state_dict()
        results["tensors differ"] = [n for n, t in model.state_dict().items() if not torch.equal(t, tensors[n])]
    return results | _padding(model, ids) | _train(model, ids) | _recompute(model, ids)


@torch.no_grad()
def _padding(model, ids):
    """Logits and loss of rows of 11 and 7 tokens in one batch, and of each row alone; the padding is a token like any
    other."""
    lengths, results = (11, 7), {}
    alone = [model(row[None, :length], labels=row[None, :length]) for row, length in zip(ids, lengths, strict=True)]
    nats = sum(float(each.loss) * (length - 1) for each, length in zip(alone, lengths, strict=True))
    for side in ("right", "left"):
        padded, mask = torch.full_like(ids, 5), torch.zeros_like(ids)
        for i, length in enumerate(lengths):
            kept = slice(None, length) if side == "right" else slice(ids.shape[1] - length, None)
            padded[i, kept], mask[i, kept] = ids[i, :length], 1
        out = model(padded, attention_mask=mask, labels=padded.where(mask.bool(), -100))
        results[f"{side} padding"] = max(
            float((out.logits[i, mask[i].bool()] - each.logits[0]).abs().max()) for i, each in enumerate(alone)
        )
        results[f"{side} padding, loss"] = abs(float(out.loss) - nats / sum(length - 1 for length in lengths))
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


def _recompute(model, ids):
    """Loss and gradients with gradient checkpointing, and without it; and how many calls of modules it adds."""
    kept, again, calls = {}, {}, {}
    leaves = [module for module in model.modules() if not list(module.children())]
    for gradients in (kept, again):
        if gradients is again:
            model.gradient_checkpointing_enable()
        count = []
        hooks = [module.register_forward_hook(lambda *_, count=count: count.append(1)) for module in leaves]
        model.zero_grad()
        torch.manual_seed(1)  # of dropout
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        gradients["loss"] = loss.detach()
        calls[id(gradients)] = len(count)
        for hook in hooks:
            hook.remove()
    model.gradient_checkpointing_disable()
    largest = max(float(gradient.abs().max()) for gradient in kept.values())
    assert kept.keys() == again.keys()
    return {
        "recomputed": max(float((kept[name] - again[name]).abs().max()) for name in kept) / largest,
        "calls again": calls[id(again)] - calls[id(kept)],
    }


def inductor(folder: str) -> dict[str, object]:
    """Logits of a model that torch's own compiler has compiled."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, **LOAD).eval()
    ids = torch.randint(model.config.vocab_size, (2, 11))
    with torch.no_grad():
        plain = model(ids).logits
        compiled = torch.compile(model)(ids).logits
    return {"scale": float(plain.abs().max()), "inductor": float((compiled - plain).abs().max())}


def texts(vocabulary: int) -> torch.Tensor:
    """The ids of all steps, (STEPS * ROWS, LENGTH)."""
    return torch.randint(vocabulary, (STEPS * ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def trainer(folder: str) -> dict[str, object]:
    """The losses of three steps of the library's Trainer, with plain SGD, two micro-batches a step, gradient
    checkpointing and a clipped gradient; the loss of its evaluation, and what it saved, loaded again."""
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **LOAD)
    rows = [dict(input_ids=row, labels=row) for row in texts(model.config.vocab_size)]
    with tempfile.TemporaryDirectory() as out:
        settings = transformers.TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=ROWS // 2,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=ROWS,
            max_steps=STEPS,
            learning_rate=0.5,
            lr_scheduler_type="constant",
            optim="sgd",
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        run = InOrder(model=model, args=settings, train_dataset=rows, eval_dataset=rows[:ROWS])
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        evaluated = run.evaluate()["eval_loss"]
        run.save_model(out)
        again = transformers.AutoModelForCausalLM.from_pretrained(out, **LOAD).eval()
        ids = torch.stack([row["input_ids"] for row in rows[:ROWS]])
        with torch.no_grad():
            saved = abs(float(again(ids, labels=ids).loss) - evaluated)
    return {"losses": losses, "evaluated": evaluated, "saved again": saved}


CHECKS = {"everything": measure, "inductor": inductor, "trainer": trainer}


def main() -> None:
    """Measure the folders of the command line, and write the results."""
    for name in ("toolkit", "components"):
        sys.modules[name] = None
    check, target, *folders = sys.argv[1:]
    Path(target).write_text(json.dumps({folder: CHECKS[check](folder) for folder in folders}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as copies:
        os.environ |= {"HF_MODULES_CACHE": copies, "HF_HUB_OFFLINE": "1"}
        main()

"""Load an exported model and answer questions with it, in a process that cannot see the rest of this project.

Run by path in an isolated interpreter (``python -I fresh_process.py REQUEST``), possibly one of another environment:
it imports torch and transformers (or optimum-intel), and refuses to import anything of ours.
"""

from __future__ import annotations

import gc
import json
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from pathlib import Path
from runpy import run_path
from typing import Any

OURS = frozenset({"optimizer", "storage", "workers"})


class _Refuse(MetaPathFinder):
    """Makes our packages impossible to import, even where they are installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Refuse our names; leave all others to the finders that follow."""
        if fullname.partition(".")[0] in OURS:
            raise ImportError(f"{fullname} must not be needed to run an export")


def main(request_file: str) -> None:
    """Answer the request: ``answers``, ``versions`` to ``result.json``, logits to ``logits.safetensors``, beside it."""
    sys.meta_path.insert(0, _Refuse())
    folder = Path(request_file).resolve().parent
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    processors = run_path(request["processors"])  # a file that needs nothing else of ours
    sys.meta_path.insert(0, processors["BeforeTransformers"]())

    gc.disable()  # what imports make stays: going through it again and again takes a fifth of their time
    import torch
    import transformers
    from safetensors.torch import save_file

    gc.enable()
    torch.set_num_threads(request["threads"])
    model = _load(request["loader"], request["directory"], request["dtype"])
    answering, options = model, {}
    if request["loader"] == "speculation":
        answering = _speculation(model, request["drafter"])
    elif request["drafter"]:
        options = _assistance(request["drafter"], request["dtype"])
    passes: list[None] = []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    processor = processors["load_auto_processor"](request["directory"])
    answers, logits, generated = [], {}, 0
    for number, question in enumerate(request["questions"]):
        inputs = _inputs(processor, question, request["chat"], request["template"])
        answer, tokens, steps = generate_with_logits(answering, processor, inputs, request["max_new_tokens"], **options)
        answers.append(answer)
        generated += len(tokens)
        logits[str(number)] = steps
    save_file(logits, str(folder / "logits.safetensors"))
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    seen = sorted(name for name in sys.modules if name.partition(".")[0] in OURS)
    result: dict[str, Any] = {
        "answers": answers,
        "versions": versions,
        "model_class": type(model).__name__,
        "ours": seen,
    }
    result = result | {"passes": len(passes), "tokens": generated}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _load(loader: str, directory: str, dtype: str) -> Any:
    from transformers import AutoModelForImageTextToText

    remote = loader == "transformers-remote-code"
    model, report = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=dtype, trust_remote_code=remote, output_loading_info=True
    )
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise SystemExit(f"the weights do not fit the configuration: {problems}")
    if remote:
        model.guard = None  # the plan itself is compared, whichever prompts it is asked
    return model.eval()


def _assistance(drafter: str, dtype: str) -> dict[str, Any]:
    """Load an export's drafter by its own code."""
    loaded = run_path(str(Path(drafter, "drafter.py")))["load_drafter"](drafter, dtype=dtype)
    return {"assistant_model": loaded}


def _speculation(model: Any, drafter: str) -> Any:
    """Let an export's own code draft for the model."""
    sys.path.insert(0, drafter)
    runtime = import_module("skipplan_runtime")
    return runtime.speculate_from(
        model, drafter, draft_length=3
    )  # lengths that adapt may draft nothing of short answers


def _inputs(processor: Any, question: dict[str, str], chat: bool, template: dict[str, str]) -> Any:
    from PIL import Image

    with Image.open(question["image"]) as opened:
        image = opened.convert("RGB")
    if not chat:
        return processor(text=[question["text"]], images=[[image]], return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": question["text"]}]
    return processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **template,
    )


def generate_with_logits(
    model: Any, processor: Any, inputs: Any, max_new_tokens: int, **options: Any
) -> tuple[str, list[int], Any]:
    """Generate the answer, its tokens, and the logits of every step, ``[steps, vocabulary]`` in float32."""
    import torch

    dtype = getattr(model, "dtype", torch.float32)
    moved = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        out = model.generate(
            **moved,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=processor.tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    tokens, length = out.sequences, moved["input_ids"].shape[1]
    new = tokens[:, length:] if torch.equal(tokens[:, :length], moved["input_ids"]) else tokens
    answer = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    return answer, new[0].tolist(), torch.stack(tuple(out.logits))[:, 0].float().contiguous()


if __name__ == "__main__":
    main(sys.argv[1])

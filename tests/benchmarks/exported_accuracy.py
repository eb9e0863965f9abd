"""Recompute a checkpoint's accuracy with plain transformers; imports nothing of this project.

    python tests/benchmarks/held_out_samples.py configs/quickstart.yaml held_out/
    python -I tests/benchmarks/exported_accuracy.py exports/quickstart held_out/samples.jsonl

Prints a JSON line: n, correct, accuracy (exact match of the lower-case text), and with ``--logits`` writes the
logits after the prompt of the first samples to a file.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def build_inputs(processor, samples, images):
    if getattr(processor, "chat_template", None):
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample["prompt"]}]}],
                add_generation_prompt=True,
            )
            for sample in samples
        ]
    else:
        token = getattr(processor, "image_token", "<image>")
        texts = [sample["plain_prompt"].format(image=token, prompt=sample["prompt"]) for sample in samples]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("samples", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--logits", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    model = AutoModelForImageTextToText.from_pretrained(arguments.checkpoint, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    samples = [json.loads(line) for line in arguments.samples.read_text().splitlines()]
    correct = 0
    for start in range(0, len(samples), arguments.batch_size):
        batch = samples[start : start + arguments.batch_size]
        images = [Image.open(arguments.samples.parent / sample["image"]).convert("RGB") for sample in batch]
        inputs = build_inputs(processor, batch, images)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.inference_mode():
            if start == 0 and arguments.logits:
                torch.save(model(**inputs).logits[:, -1], arguments.logits)
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=batch[0]["max_new_tokens"])
        answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for sample, answer in zip(batch, answers, strict=True):
            correct += answer.strip().lower() in [accepted.strip().lower() for accepted in sample["answers"]]
    print(json.dumps({"n": len(samples), "correct": correct, "accuracy": correct / len(samples)}))


if __name__ == "__main__":
    main()

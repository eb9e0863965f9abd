"""Time an exported checkpoint against the dense model with plain transformers; imports nothing of this project.

    python -I tests/benchmarks/exported_speedup.py configs/reference/llava-12 exports/quickstart held_out/samples.jsonl

Each pair is one request on each model, in alternating order; prints n, the median ratio dense / exported with its
bootstrap interval, the spread (quartiles) of the ratios, and both medians in milliseconds.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def load(path, trust_remote_code=False):
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", trust_remote_code=trust_remote_code)
    return model.eval()


def request(processor, sample, directory, dtype):
    image = Image.open(directory / sample["image"]).convert("RGB")
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": sample["prompt"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        token = getattr(processor, "image_token", "<image>")
        text = sample["plain_prompt"].format(image=token, prompt=sample["prompt"])
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs


def seconds(model, inputs, new_tokens):
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    return time.perf_counter() - started


def interval(ratios, confidence=0.95, resamples=2000):
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(resamples))
    tail = int(resamples * (1 - confidence) / 2)
    return medians[tail], medians[-tail - 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense")
    parser.add_argument("exported")
    parser.add_argument("samples", type=Path)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trust-remote-code", action="store_true", help="for exports of format runtime")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    processor = AutoProcessor.from_pretrained(arguments.dense)
    models = {"dense": load(arguments.dense), "exported": load(arguments.exported, arguments.trust_remote_code)}
    samples = [json.loads(line) for line in arguments.samples.read_text().splitlines()]
    times = {"dense": [], "exported": []}
    for pair in range(-5, arguments.pairs):  # the first five warm up
        inputs = request(processor, samples[pair % len(samples)], arguments.samples.parent, models["dense"].dtype)
        for name in ("dense", "exported") if pair % 2 else ("exported", "dense"):
            taken = seconds(models[name], inputs, arguments.new_tokens)
            if pair >= 0:
                times[name].append(taken)
    ratios = [dense / exported for dense, exported in zip(times["dense"], times["exported"], strict=True)]
    low, high = interval(ratios)
    print(
        json.dumps(
            {
                "pairs": len(ratios),
                "speedup": round(statistics.median(ratios), 4),
                "interval": [round(low, 4), round(high, 4)],
                "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
                "dense_ms": round(1000 * statistics.median(times["dense"]), 3),
                "exported_ms": round(1000 * statistics.median(times["exported"]), 3),
            }
        )
    )


if __name__ == "__main__":
    main()

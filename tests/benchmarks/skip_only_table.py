"""Accuracy and KL of every skip-only plan of a small model, for the search benchmark to look up.

    python tests/benchmarks/skip_only_table.py --task easy-vqa --search 512 --work DIRECTORY
    python tests/benchmarks/skip_only_table.py --task easy-vqa --held-out 1024 --masks masks.txt --work DIRECTORY

Walks all 2^layers masks depth first, so that masks which agree on their first layers share that work: 4,095 layer
executions instead of 24,576. Answers are teacher-forced (exact match of the tokens, as greedy decoding would give);
questions of one image share its prefix. The result goes to tests/fixtures/skip_only_<model>_<task>.npz with:

    right_search    [masks, ceil(samples / 8)]    bit-packed: the answer to a search sample is right
    kl_search       [masks, 2, 2]                 mean KL to dense at the answer tokens and its standard error, on the
                                                  first quarter of the samples and on all
    samples         [1]                           number of search samples

The second form does the same for chosen masks (numbers, one a line) on the held-out split, and writes
tests/fixtures/held_out_<model>_<task>.csv with each mask and its number of right answers.

A mask is a number whose bit ``l`` (1 << l) is set where layer ``l`` is skipped. Finished blocks of images are kept in
the work directory, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import rotate_half

PROJECT = Path(__file__).resolve().parents[2]
FIXTURES = PROJECT / "tests" / "fixtures"
sys.path.insert(0, str(PROJECT))

from reference_training.packing import Packer  # noqa: E402

from workers.messages import ModelSource  # noqa: E402
from workers.models.loading import LoadedModel, load_model  # noqa: E402
from workers.models.prompts import build_inputs  # noqa: E402
from workers.tasks import Sample, TaskSpec, load_spec, load_task  # noqa: E402


@dataclass(frozen=True)
class Block:
    """Images ``[images, prefix, hidden]`` with their questions and answers ``[questions, tokens, hidden]``."""

    prefix: torch.Tensor
    branches: torch.Tensor
    image_of: torch.Tensor
    answer_rows: torch.Tensor
    """Question of every answer token; [answer tokens]."""
    answer_columns: torch.Tensor
    """Position in the branch that predicts the answer token."""
    targets: torch.Tensor


def block_of(loaded: LoadedModel, packer: Packer, spec: TaskSpec, samples: Sequence[Sample]) -> Block:
    model = loaded.model
    images = list(dict.fromkeys(sample.image_key for sample in samples))
    first = {sample.image_key: sample for sample in reversed(samples)}
    pixels = build_inputs(
        loaded.processor, spec, [first[key] for key in images], [first[k].image.open() for k in images]
    )
    features = model.model.get_image_features(pixel_values=pixels["pixel_values"].to(model.dtype)).pooler_output
    embed = model.get_input_embeddings()
    prefix = embed(torch.tensor(packer.prefix)).repeat(len(images), 1, 1)
    where = torch.tensor(packer.prefix) == loaded.processor.image_token_id
    prefix[:, where] = torch.stack(list(features)).to(prefix.dtype)
    branches = [packer.branch(spec.prompt.format(question=each.question), each.answers[0]) for each in samples]
    longest = max(len(branch.tokens) for branch in branches)
    tokens = torch.full((len(branches), longest), packer.pad)
    rows, columns, targets = [], [], []
    for row, branch in enumerate(branches):
        tokens[row, : len(branch.tokens)] = torch.tensor(branch.tokens)
        for column in range(len(branch.tokens) - branch.answer_length, len(branch.tokens)):
            rows.append(row)
            columns.append(column - 1)
            targets.append(branch.tokens[column])
    numbers = {key: number for number, key in enumerate(images)}
    return Block(
        prefix,
        embed(tokens),
        torch.tensor([numbers[sample.image_key] for sample in samples]),
        torch.tensor(rows),
        torch.tensor(columns),
        torch.tensor(targets),
    )


class Walker:
    """Depth-first over the masks of one block; the state before a layer is kept only on the path."""

    def __init__(self, loaded: LoadedModel, block: Block) -> None:
        self.text, self.head = loaded.model.model.language_model, loaded.model.lm_head
        self.block = block
        self.images, self.prefix_length, self.hidden = block.prefix.shape
        self.questions, self.tokens, _ = block.branches.shape
        positions = torch.arange(self.prefix_length + self.tokens)[None]
        self.cos, self.sin = self.text.rotary_emb(block.branches, positions)
        causal = torch.ones(self.tokens, self.tokens, dtype=torch.bool).tril()
        self.mask = torch.cat([torch.ones(self.tokens, self.prefix_length, dtype=torch.bool), causal], dim=1)
        self.split = self.images * self.prefix_length

    def walk(self, wanted: frozenset[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Wanted masks with the log-probabilities ``[answer tokens, vocabulary]``; dense (mask 0) first."""
        layers = len(self.text.layers)
        self._prefixes = [{mask & ((1 << layer) - 1) for mask in wanted} for layer in range(layers + 1)]
        start = torch.cat([self.block.prefix.reshape(-1, self.hidden), self.block.branches.reshape(-1, self.hidden)])
        yield from self._walk(0, start, 0)

    def _walk(self, layer: int, states: torch.Tensor, mask: int) -> Iterator[tuple[int, torch.Tensor]]:
        if mask not in self._prefixes[layer]:
            return
        if layer == len(self.text.layers):
            answers = states[self.split :].view(self.questions, self.tokens, -1)
            picked = self.text.norm(answers[self.block.answer_rows, self.block.answer_columns])
            yield mask, self.head(picked).float().log_softmax(-1)
            return
        if mask in self._prefixes[layer + 1]:
            yield from self._walk(layer + 1, self._run(self.text.layers[layer], states), mask)
        yield from self._walk(layer + 1, states, mask | 1 << layer)

    def _run(self, layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        parts = [projection(normed) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
        before = [self._heads(part[: self.split], self.images, attention.head_dim) for part in parts]
        after = [self._heads(part[self.split :], self.questions, attention.head_dim) for part in parts]
        q, k, v = (self._rotate(before[0], 0), self._rotate(before[1], 0), before[2])
        first = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        keys = torch.cat([k[self.block.image_of], self._rotate(after[1], self.prefix_length)], dim=2)
        values = torch.cat([v[self.block.image_of], after[2]], dim=2)
        queries = self._rotate(after[0], self.prefix_length)
        second = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask)
        attended = torch.cat([part.transpose(1, 2).reshape(-1, self.hidden) for part in (first, second)])
        states = states + attention.o_proj(attended)
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def _heads(self, states: torch.Tensor, rows: int, width: int) -> torch.Tensor:
        return states.view(rows, -1, self.hidden // width, width).transpose(1, 2)

    def _rotate(self, states: torch.Tensor, start: int) -> torch.Tensor:
        cos = self.cos[:, start : start + states.shape[2], :].unsqueeze(1)
        sin = self.sin[:, start : start + states.shape[2], :].unsqueeze(1)
        return states * cos + rotate_half(states) * sin


def scores_of(
    loaded: LoadedModel, packer: Packer, spec: TaskSpec, samples: Sequence[Sample], masks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each mask answers each sample right, and its KL to dense there; both [masks, samples]."""
    with torch.inference_mode():
        block = block_of(loaded, packer, spec, samples)
        walker = Walker(loaded, block)
        place = {mask: number for number, mask in enumerate(masks)}
        right = np.zeros((len(masks), len(samples)), dtype=bool)
        kl = np.zeros((len(masks), len(samples)), dtype=np.float32)
        counts = torch.bincount(block.answer_rows, minlength=len(samples))
        dense: torch.Tensor | None = None
        for mask, logs in walker.walk(frozenset(masks) | {0}):
            dense = logs if dense is None else dense
            if mask in place:
                wrong = torch.bincount(block.answer_rows[logs.argmax(-1) != block.targets], minlength=len(samples))
                diverged = (dense.exp() * (dense - logs)).sum(-1).double()
                right[place[mask]] = (wrong == 0).numpy()
                kl[place[mask]] = (torch.bincount(block.answer_rows, diverged, len(samples)) / counts).numpy()
    return right, kl


def by_image(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Blocks of about ``size`` samples; an image's questions that follow each other stay together."""
    blocks: list[list[Sample]] = [[]]
    for number, sample in enumerate(samples):
        new_image = number == 0 or sample.image_key != samples[number - 1].image_key
        if new_image and len(blocks[-1]) >= size:
            blocks.append([])
        blocks[-1].append(sample)
    return blocks


def table(
    loaded: LoadedModel,
    packer: Packer,
    spec: TaskSpec,
    samples: Sequence[Sample],
    masks: Sequence[int],
    work: Path,
    block: int,
) -> tuple[np.ndarray, np.ndarray]:
    rights, kls = [], []
    for number, part in enumerate(by_image(samples, block)):
        kept = work.with_name(f"{work.name}-{number}.npz")
        if not kept.exists():
            started = time.perf_counter()
            right, kl = scores_of(loaded, packer, spec, part, masks)
            np.savez(kept.with_suffix(".part.npz"), right=right, kl=kl)
            kept.with_suffix(".part.npz").replace(kept)
            print(f"{kept.name}: {len(part)} samples in {time.perf_counter() - started:.0f} s", flush=True)
        with np.load(kept) as stored:
            rights.append(stored["right"])
            kls.append(stored["kl"])
    return np.concatenate(rights, axis=1), np.concatenate(kls, axis=1)


def mean_and_error(kl: np.ndarray) -> np.ndarray:
    """Mean over samples and its standard error; [masks, 2]."""
    return np.stack([kl.mean(1), kl.std(1, ddof=1) / np.sqrt(kl.shape[1])], axis=1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llava-12")
    parser.add_argument("--task", default="easy-vqa")
    parser.add_argument("--search", type=int, default=512)
    parser.add_argument("--first", type=int, help="how many of the samples, the first ones; default: all")
    parser.add_argument("--held-out", type=int, default=1024)
    parser.add_argument("--masks", type=Path, help="file of masks to evaluate held-out")
    parser.add_argument("--block", type=int, default=64, help="samples walked together")
    parser.add_argument("--work", type=Path, required=True, help="directory for finished blocks")
    parser.add_argument("--dtype", default="auto", help="float32 where the processor has no bfloat16 instructions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    FIXTURES.mkdir(exist_ok=True)
    spec = load_spec(options.task)
    task = load_task(spec.with_splits(search=options.search, held_out=options.held_out, unit="samples"))
    loaded = load_model(ModelSource(options.model, device="cpu", dtype=options.dtype))
    packer = Packer(loaded.processor, loaded.model.config.image_seq_length)
    layers = len(loaded.model.model.language_model.layers)
    if options.masks is None:
        masks = list(range(1 << layers))
        work = options.work / f"{options.task}-search"
        samples = task.search[: options.first]
        right, kl = table(loaded, packer, spec, samples, masks, work, options.block)
        quarter = -(-len(samples) // 4)
        np.savez_compressed(
            FIXTURES / f"skip_only_{options.model}_{options.task}.npz",
            right_search=np.packbits(right, axis=1),
            kl_search=np.stack([mean_and_error(kl[:, :quarter]), mean_and_error(kl)], axis=1),
            samples=np.array([len(samples)]),
        )
        return
    masks = sorted({0, *map(int, options.masks.read_text().split())})
    name = hashlib.sha256(repr(masks).encode()).hexdigest()[:12]
    work = options.work / f"{options.task}-held-out-{name}"
    right, _ = table(loaded, packer, spec, task.held_out[: options.first], masks, work, options.block)
    lines = [f"{mask},{count}" for mask, count in zip(masks, right.sum(1), strict=True)]
    header = f"mask,right_of_{right.shape[1]}"
    path = FIXTURES / f"held_out_{options.model}_{options.task}.csv"
    path.write_text("\n".join([header, *lines]) + "\n")


if __name__ == "__main__":
    main()

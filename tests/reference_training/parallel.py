"""The two halves of a training step in two processes, one task each, on the same weights in shared memory.

Small matrices leave little for a second thread to do, and two threads wait for each other at every operation; two
processes meet once a step. The sum of the two gradients is what one process would get from both batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch
from torch import multiprocessing, nn
from transformers import LlavaForConditionalGeneration

from .packing import PackedBatch, packed_losses

Batches = Iterator[tuple[PackedBatch, torch.Tensor]]


class SecondHalf:
    """A process that computes the gradient of its own batches with the model's present weights. Use it in a `with`.

    build: called in the new process; returns a model of the same architecture and the batches, one for each step.
    threads: torch threads of the new process.
    """

    def __init__(
        self, model: nn.Module, build: Callable[[], tuple[LlavaForConditionalGeneration, Batches]], threads: int
    ) -> None:
        self._model = model
        weights = _flatten(model)
        weights.share_memory_()  # type: ignore[no-untyped-call]
        _place(model, weights)
        self._gradients = torch.zeros_like(weights)
        self._gradients.share_memory_()  # type: ignore[no-untyped-call]
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(build, weights, self._gradients, theirs, threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def begin(self) -> None:
        """Let the other process start its half of a step; the weights must stay as they are until `finish`."""
        self._connection.send(True)

    def finish(self) -> float:
        """Wait for the other half, add its gradient to the model's, and return its loss.

        Raises:
            RuntimeError: if the other process has died.
        """
        try:
            loss = float(self._connection.recv())
        except EOFError as error:
            raise RuntimeError("the process that trains on scenes has died; its traceback is above") from error
        at = 0
        for weight in self._model.parameters():
            gradient = self._gradients[at : at + weight.numel()].view_as(weight)
            weight.grad = gradient.clone() if weight.grad is None else weight.grad.add_(gradient)
            at += weight.numel()
        return loss

    def __enter__(self) -> SecondHalf:
        return self

    def __exit__(self, *_: object) -> None:
        """End the other process, also where this one was interrupted within a step."""
        self._connection.close()
        self._process.join()


def _flatten(model: nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def _place(model: nn.Module, weights: torch.Tensor) -> None:
    """Make the model's weights views of the flat tensor `weights`."""
    at = 0
    for weight in model.parameters():
        weight.data = weights[at : at + weight.numel()].view_as(weight)
        at += weight.numel()


def _serve(
    build: Callable[[], tuple[LlavaForConditionalGeneration, Batches]],
    weights: torch.Tensor,
    gradients: torch.Tensor,
    connection: Connection,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    model, batches = build()
    model.to(weights.dtype).train()
    _place(model, weights)
    for batch, pixels in batches:
        try:
            connection.recv()
        except EOFError:
            return
        model.zero_grad(set_to_none=True)
        loss, _ = packed_losses(model, batch, pixels)
        torch.autograd.backward(loss)
        torch.cat(
            [
                torch.zeros_like(weight).flatten() if weight.grad is None else weight.grad.flatten()
                for weight in model.parameters()
            ],
            out=gradients,
        )
        connection.send(loss.item())

"""Packed sequences against plain ones: one prompt per question through the real processor."""

import pytest
import torch
from PIL import Image

from reference_training.data import CAPTION_PROMPTS, EasyVqaImage, easy_vqa_images
from reference_training.model import Architecture, build_model
from reference_training.tokenizer import build_processor, task_text, train_tokenizer
from workers.tasks.scenes import scene

from .packing import Packer, answer_scores, answers_right, packed_losses

TINY = Architecture(
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    vision_inner=48,
    text_width=32,
    text_layers=3,
    text_heads=2,
    text_inner=48,
)


@pytest.fixture(scope="module")
def images() -> list[EasyVqaImage]:
    return easy_vqa_images("train")[:12]


@pytest.fixture(scope="module")
def processor(images):
    return build_processor(train_tokenizer(task_text(images)))


@pytest.fixture(scope="module")
def packer(processor):
    return Packer(processor, TINY.vision_tokens)


@pytest.fixture(scope="module")
def model(processor):
    model = build_model(processor.tokenizer, TINY, seed=3).eval()
    # Random initial weights are so small that nothing depends on anything; larger ones make attention matter.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(6.0)
    return model


def plain_inputs(processor, question, image):
    """What a user's code does at inference."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(images=image, text=prompt, return_tensors="pt")


def plain_loss(model, processor, question, answer, image):
    """Summed loss of the answer tokens and their number, one sequence at a time, labels made by hand."""
    inputs = plain_inputs(processor, question, image)
    answer_ids = processor.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    answer_ids = torch.tensor([[*answer_ids, processor.tokenizer.eos_token_id]])
    ids = torch.cat([inputs["input_ids"], answer_ids], dim=1)
    with torch.no_grad():
        scores = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
    log_probabilities = scores[-answer_ids.shape[1] - 1 : -1].log_softmax(-1)
    return -log_probabilities.gather(1, answer_ids[0][:, None]).sum(), answer_ids.shape[1]


def test_packed_loss_equals_the_plain_loss_of_every_question(model, processor, packer, images):
    opened = [Image.open(entry.path) for entry in images[:4]]
    rows = [[packer.branch(q, a) for q, a in zip(e.questions, e.answers, strict=True)] for e in images[:4]]
    pixels = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        packed, _ = packed_losses(model, packer.pack(rows, torch.float32), pixels)
    total, tokens = 0.0, 0
    for entry, image in zip(images[:4], opened, strict=True):
        for question, answer in zip(entry.questions, entry.answers, strict=True):
            loss, count = plain_loss(model, processor, question, answer, image)
            total, tokens = total + float(loss), tokens + count
    assert packed.item() == pytest.approx(total / tokens, rel=1e-5)


def test_the_comparison_notices_a_leak_between_questions(model, packer, images, processor):
    rows = [[packer.branch(q, a) for q, a in zip(images[0].questions, images[0].answers, strict=True)]]
    pixels = processor.image_processor([Image.open(images[0].path)], return_tensors="pt")["pixel_values"]
    batch = packer.pack(rows, torch.float32)
    with torch.no_grad():
        right = packed_losses(model, batch, pixels)[0].item()
        length = batch.tokens.shape[1]
        causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        batch.mask.copy_(causal)
        leaking = packed_losses(model, batch, pixels)[0].item()
    assert abs(leaking - right) > 1e-4


@pytest.mark.parametrize("question", [*CAPTION_PROMPTS, "what color is the shape?", "is there not a red circle?"])
def test_training_tokens_are_the_processors(packer, processor, question):
    image = scene(5, 0).image
    expected = plain_inputs(processor, question, image)["input_ids"][0].tolist()
    branch = packer.branch(question, "a red circle")
    assert [*packer.prefix, *branch.tokens[: -branch.answer_length]] == expected
    whole = processor.tokenizer.decode(expected) + " a red circle" + processor.tokenizer.eos_token
    retokenized = processor.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [*packer.prefix, *branch.tokens] == retokenized


def test_right_answers_are_counted_as_generate_gives_them(model, processor, packer, images):
    """Each answer of one batch is the model's own greedy continuation or a wrong one, known beforehand."""
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token_id
    entry = images[0]
    image = Image.open(entry.path)
    rows = []
    for number, question in enumerate(entry.questions[:4]):
        inputs = plain_inputs(processor, question, image)
        decoded = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, -3:].tolist()
        branch = packer.branch(question, "yes")
        answer = decoded if number % 2 else [*decoded[:-1], (decoded[-1] + 1) % len(tokenizer)]
        tokens = (*branch.tokens[: -branch.answer_length], *answer)
        assert end not in decoded
        rows.append(type(branch)(tokens, len(answer)))
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    assert answers_right(model, packer.pack([rows], torch.float32), pixels) == (2, 4)


def test_scores_cover_answers_only(model, packer, processor, images):
    branch = packer.branch("what is in the image?", "a red circle")
    pixels = processor.image_processor([Image.open(images[0].path)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores, targets = answer_scores(model, packer.pack([[branch]], torch.float32), pixels)
    assert processor.tokenizer.decode(targets) == " a red circle<eos>"
    assert scores.shape == (4, len(processor.tokenizer))


def test_question_loss_equals_the_plain_loss_of_the_question_tokens(model, processor, packer, images):
    """From the second token of a question on; the first one follows the prefix, which all questions share."""
    image = Image.open(images[0].path)
    pairs = list(zip(images[0].questions[:3], images[0].answers[:3], strict=True))
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        rows = [[packer.branch(question, answer) for question, answer in pairs]]
        _, packed = packed_losses(model, packer.pack(rows, torch.float32), pixels)
        losses = []
        for question, _ in pairs:
            inputs = plain_inputs(processor, question, image)
            ids = inputs["input_ids"][0]
            first = int((ids == processor.image_token_id).nonzero().max()) + 2
            log_probabilities = model(**inputs).logits[0].log_softmax(-1)
            losses += [-log_probabilities[at, ids[at + 1]] for at in range(first, len(ids) - 1)]
    assert packed.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)

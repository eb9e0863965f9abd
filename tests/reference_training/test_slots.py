"""Slots: what scenes and texts spell, how the losses see it, and that training resumes where it stopped."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reference_training.data import easy_vqa_training_images
from workers.reference.language import BEGIN, END, IMAGE, PAD, LanguageModel, to_bfloat16
from workers.reference.smollm2 import Eyes, VisionArchitecture, join, smollm2_processor
from workers.tasks.rendered import rendered_text
from workers.tasks.scenes import QUESTIONS, scene

from . import slots, train_smollm2_scenes
from .recipe import Training
from .slots import CHARACTERS, SlotLoss, SlotRefresher, SlotTraining, SlotWriter, character_labels, train_slots
from .train_smollm2 import Trainee
from .train_smollm2_scenes import deepen, train_through_backbone
from .vision import label_easy_vqa, to_input

HIDDEN = 32
TINY = VisionArchitecture(vision_width=16, vision_layers=7, vision_heads=2, vision_inner=16)


@pytest.fixture(scope="module")
def tokenizer():
    """Every word with its space, every digit, sign and line break is one token, as in SmolLM2's for these texts."""
    sentences = [question.answer(scene(index, 0)) for index in range(300) for question in QUESTIONS.values()]
    sentences += [question.prompt for question in QUESTIONS.values()]
    sentences += [rendered_text(index, 0).text for index in range(3000)]
    sentences += ["what does it say? Answer : row column left top right bottom"]
    pre = pre_tokenizers.Split(Regex(r" ?[a-zA-Z]+|\d|\s|[^\w\s]"), behavior="isolated")
    words = {piece for text in sentences for piece, _ in pre.pre_tokenize_str(f" {text}")}
    words |= {piece for text in sentences for piece, _ in pre.pre_tokenize_str(text)} | {"\n", "Answer", *"0123456789 "}
    vocabulary = {word: number for number, word in enumerate([PAD, BEGIN, END, IMAGE, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer, backend.decoder = pre, decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def table(tokenizer):
    return torch.randn(len(tokenizer), HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def writer(tokenizer, table):
    return SlotWriter(tokenizer, table)


def spelt(writer, table, tokenizer, entries):
    """The text that slots spell, read back by the nearest token embedding."""
    nearest = torch.cdist(writer.embeddings[torch.tensor(entries)], table).argmin(-1)
    return "".join(tokenizer.convert_ids_to_tokens(nearest.tolist()))


def test_a_scene_spells_its_questions_with_their_answers(writer, table, tokenizer):
    for index in range(30):
        drawn = scene(index, 0)
        entries = writer.scene(drawn)
        text = spelt(writer, table, tokenizer, entries)
        count, opening, caption, *rest = text.split("\nAnswer:")[1:]
        assert len(entries) == 64 and not rest
        assert text.startswith(QUESTIONS["count"].prompt)
        assert count.split("\n")[0] == f" {QUESTIONS['count'].answer(drawn)}"
        described = QUESTIONS["description"].answer(drawn)
        assert described.startswith(opening.split("\n")[0].strip())
        assert opening.count(".") == 2
        assert caption.rstrip("\n").replace("above above", "above") == f" {drawn.caption}"


def test_a_text_spells_its_question_three_times_with_the_answer(writer, table, tokenizer):
    for index in range(30):
        drawn = rendered_text(index, 0)
        text = spelt(writer, table, tokenizer, writer.text(drawn))
        assert [part.split("\n")[0] for part in text.split("Answer:")[1:]] == [f" {drawn.text}"] * 3
        assert text.count("what does it say?\n") == 3


def test_characters_are_labelled_where_they_stand():
    drawn = [rendered_text(index, 0) for index in range(20)]
    characters, places = character_labels(drawn)
    for number, text in enumerate(drawn):
        rows, kinds = np.nonzero(characters[number])
        assert sorted(CHARACTERS[kind] for kind in kinds) == sorted(set(text.text)) or len(set(text.text)) < len(
            text.text
        )
        left, top, right, bottom = text.box
        assert all(left - 8 < patch % 8 * 8 < right and top - 8 < patch // 8 * 8 < bottom for patch in rows)
        assert places[number].sum() == len(text.text)
        columns = [int(np.nonzero(places[number][:, place])[0][0]) % 8 for place in range(len(text.text))]
        assert columns == sorted(columns)


def test_the_loss_is_smallest_where_the_tokens_are_the_entries(writer):
    loss = SlotLoss(writer)
    wanted = torch.tensor([writer.scene(scene(index, 0)) for index in range(4)])
    varies = (wanted != wanted[:1]).any(0)
    right = writer.embeddings[wanted]
    assert loss.scores(right).argmax(-1).equal(wanted)
    wrong = right[torch.tensor([1, 2, 3, 0])]
    for bounded in (False, True):
        best = loss(right, wanted, varies, bounded=bounded)
        assert best < 0.2 < loss(wrong, wanted, varies, bounded=bounded)
    far = (right + 100.0).requires_grad_()
    norms = []
    for bounded in (False, True):
        (gradient,) = torch.autograd.grad(loss(far, wanted, varies, bounded=bounded), far)
        norms.append(gradient.norm().item())
    assert norms[1] < 0.1 * norms[0]


def test_a_deeper_tower_sees_at_first_what_the_shallower_one_saw(tokenizer):
    small = VisionArchitecture(vision_width=16, vision_layers=2, vision_heads=2, vision_inner=16)
    shallow, deep = (eyes_of(tokenizer, architecture) for architecture in (small, TINY))
    pixels = to_input(np.stack([np.asarray(scene(1, 0).image).transpose(2, 0, 1)]))
    assert not torch.equal(deep(pixels), shallow(pixels))
    deepen(deep, shallow)
    torch.testing.assert_close(deep(pixels), shallow(pixels))


def joined(tokenizer, architecture):
    """A tiny language model with random eyes."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    language = LanguageModel(to_bfloat16(LlamaForCausalLM(config)), tokenizer)
    return join(language, architecture, 0)


def eyes_of(tokenizer, architecture):
    """Random eyes."""
    model = joined(tokenizer, architecture)
    return Eyes(model.model.vision_tower, model.model.multi_modal_projector)


def test_training_lowers_the_loss_and_goes_on_after_an_interruption(writer, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(slots, "DEVELOPMENT", 2)
    easy = label_easy_vqa(easy_vqa_training_images()[:6])
    training = SlotTraining(steps=4, scenes=2, texts=2, easy_images=2, rate=1e-2, warmup=1, save_every=2)
    teacher = eyes_of(tokenizer, TINY)

    def train(directory):
        directory.mkdir(exist_ok=True)
        train_slots(eyes_of(tokenizer, TINY), teacher, easy, writer, training, directory)
        return load_file(directory / "slots.safetensors")

    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(slots, "slot_accuracy", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts")
    halfway = load_file(tmp_path / "parts" / "slots.safetensors")
    resumed = train(tmp_path / "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], halfway[name]) for name in whole)
    assert whole.keys() == dict(eyes_of(tokenizer, TINY).named_parameters()).keys()


def test_training_through_the_backbone_leaves_it_alone_and_goes_on(writer, tokenizer, monkeypatch, tmp_path):
    images = easy_vqa_training_images()[:12]
    monkeypatch.setattr(train_smollm2_scenes, "easy_vqa_training_images", lambda: images)
    monkeypatch.setattr(train_smollm2_scenes, "easy_vqa_development_images", lambda: images[:2])
    for name in ("DEVELOPMENT_SCENES", "DEVELOPMENT_TEXTS"):
        monkeypatch.setattr(train_smollm2_scenes, name, 2)
    training = Training("tiny", steps=2, rate=1e-2, warmup=1, easy_images=1, questions=1, scenes=1, save_every=1)
    refresher = SlotRefresher(writer, seed=0, images=2)

    def train(directory):
        torch.manual_seed(0)
        directory.mkdir(exist_ok=True)
        model = joined(tokenizer, TINY).requires_grad_(False)
        eyes = Eyes(model.model.vision_tower, model.model.multi_modal_projector).requires_grad_(True)
        before = {name: weight.clone() for name, weight in model.model.language_model.state_dict().items()}
        trainee = Trainee(model, smollm2_processor(tokenizer), eyes)
        train_through_backbone(trainee, training, refresher, directory, TINY.vision_tokens)
        after = model.model.language_model.state_dict()
        assert all(torch.equal(weight, after[name]) for name, weight in before.items())

    train(tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(train_smollm2_scenes, "measured_with", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts")
    halfway = load_file(tmp_path / "parts" / "eyes.safetensors")
    train(tmp_path / "parts")
    whole, resumed = (load_file(tmp_path / name / "eyes.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], halfway[name]) for name in whole)

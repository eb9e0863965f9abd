"""The reference model's processor: a byte-level BPE tokenizer trained on the task text, and a CLIP image processor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from reference_training.data import CAPTION_PROMPTS, EasyVqaImage
from workers.reference.smollm2 import PATCH_SIZE
from workers.tasks.scenes import COLOURS, IMAGE_SIZE, RELATIONS, SHAPES

PAD, BOS, EOS, IMAGE = "<pad>", "<bos>", "<eos>", "<image>"

VOCABULARY_SIZE = 512
"""An upper bound: 256 bytes, the special tokens, and the merges that make every word of the tasks one token."""

LONGEST_TEXT = 512
"""Tokens the backbone has positions for."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else ' ' }}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""One turn reads "USER: <image>\\n{question} ASSISTANT:", and the answer follows with a leading space and `<eos>`."""


def task_text(images: Iterable[EasyVqaImage]) -> Iterator[str]:
    """Every kind of sentence of the two tasks, as the tokenizer will see it: prompts, questions and answers."""
    for image in images:
        for question, answer in zip(image.questions, image.answers, strict=True):
            yield f"USER: {IMAGE}\n{question} ASSISTANT: {answer}"
    phrases = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    for prompt in CAPTION_PROMPTS:
        for relation in RELATIONS:
            for phrase in phrases:
                yield f"USER: {IMAGE}\n{prompt} ASSISTANT: {phrase} {relation} {phrase} {relation} {phrase}"


def train_tokenizer(text: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be encoded, the words of the tasks are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The image token is a special one; left in the text it would only teach merges that never occur.
    tokenizer.train_from_iterator((line.replace(IMAGE, "") for line in text), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=LONGEST_TEXT,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Join the tokenizer and a Pillow-backed CLIP image processor (no torchvision needed) to a LLaVA processor."""
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )

"""The checkpoint: published in form, small, and right about pictures it has never seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training.evaluate import BOX_TOKENS, cases, score, score_places, table
from training.evaluate_places import place_cases
from training.export import CHAT_TEMPLATE
from training.network import config_dict
from training.reader import Reader, Request, user

from qvl.tiny import FIRST_TRAINING_SEED, WEIGHTS

pytest.importorskip("torch")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples" / "pictures"
MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(WEIGHTS)


def read(name: str) -> dict[str, object]:
    content = json.loads((WEIGHTS / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_the_checkpoint_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in WEIGHTS.iterdir()}
    assert sum(files.values()) <= MAX_BYTES
    assert set(files) == {
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
    }


def test_the_files_have_the_published_form() -> None:
    config = read("config.json")
    assert config == config_dict()
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    text = config["text_config"]
    assert isinstance(text, dict)
    assert text["rope_scaling"] == {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"}
    assert "rope_parameters" not in text
    assert text["max_position_embeddings"] >= 4096
    assert read("tokenizer_config.json")["tokenizer_class"] == "Qwen2Tokenizer"
    assert read("preprocessor_config.json")["image_processor_type"] == "Qwen2VLImageProcessorFast"
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    assert read("chat_template.json")["chat_template"] == template
    assert read("tokenizer_config.json")["chat_template"] == template


def test_answers_end_at_both_end_tokens(reader: Reader) -> None:
    ends = reader.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert read("generation_config.json")["eos_token_id"] == ends


def test_the_template_keeps_the_order_of_parts(reader: Reader) -> None:
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    text, picture, address = (
        {"type": "text", "text": "A"},
        {"type": "image", "image": "x.png"},
        {"type": "image_url", "image_url": {"url": "x.png"}},
    )

    def render(*parts: dict[str, object]) -> str:
        messages = [{"role": "user", "content": list(parts)}]
        rendered = reader.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(rendered, str)
        return rendered

    assert render(picture, text) == f"<|im_start|>user\n{shown}A<|im_end|>\n<|im_start|>assistant\n"
    assert render(text, address) == f"<|im_start|>user\nA{shown}<|im_end|>\n<|im_start|>assistant\n"
    assert render(picture, text, picture).count(shown) == 2


def test_the_template_writes_tools_calls_and_results(reader: Reader) -> None:
    tools = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "price", "arguments": {"brand": "NORVIK"}}}
    messages = [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "How much?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
        {"role": "tool", "content": "13"},
    ]
    text = reader.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe terse.\n\n")
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in text
    assert '<tool_call>\n{"name": "price", "arguments": {"brand": "NORVIK"}}\n</tool_call><|im_end|>' in text
    assert "user\n<tool_response>\n12\n</tool_response>\n<tool_response>\n13\n</tool_response><|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_the_tokenizer_gives_every_text_back(reader: Reader) -> None:
    for text in ("NORVIK 2 mugs\n", "两个红色的杯子。", "chapéu, naïve café 🙂", "  spaces\t\r\n\r\n  kept"):
        ids = reader.tokenizer(text)["input_ids"]
        assert reader.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_held_out_pictures_are_read_right(reader: Reader) -> None:
    found = cases(24, first_seed=700)
    scores = score(found, reader.answer([case.request for case in found]))
    assert scores["analysis"].share >= 0.9, table(scores)
    assert scores["single"].share >= 0.9, table(scores)
    assert scores["pair by place"].share >= 0.9, table(scores)
    assert scores["no picture"].share == 1.0, table(scores)


@pytest.mark.slow
def test_boxes_lie_where_things_were_drawn(reader: Reader) -> None:
    found = place_cases(12, 900, [(512, 512)])
    answers = reader.answer([case.request for case in found], max_new_tokens=BOX_TOKENS)
    scores = score_places(found, answers)
    assert scores["evidence brand"].share >= 0.85, table(scores)
    assert scores["evidence products"].share >= 0.75, table(scores)
    assert scores["boxes brand"].share >= 0.8, table(scores)
    assert scores["boxes, none of what is absent"].share >= 0.9, table(scores)
    assert scores["evidence, its analysis"].share >= 0.9, table(scores)


def test_the_order_of_two_pictures_decides_the_answer(reader: Reader) -> None:
    from PIL import Image

    mug, shoe = (Image.open(EXAMPLES / name).convert("RGB") for name in ("norvik-mug-red.png", "shoe.webp"))
    question = user("What brand is the first?", 2)
    answers = reader.answer([Request([question], (mug, shoe)), Request([question], (shoe, mug))])
    assert answers == ["NORVIK", "ZELPHO"]


def test_the_example_pictures_are_analysed_as_labelled(reader: Reader) -> None:
    from PIL import Image

    from qvl.analysis.prompts import PRODUCT_PROMPTS

    labelled = [json.loads(line) for line in (EXAMPLES / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    prompt = PRODUCT_PROMPTS["en"]
    messages = [{"role": "system", "content": prompt.system}, user(prompt.user)]
    requests = [Request(messages, (Image.open(EXAMPLES / line["image"]).convert("RGB"),)) for line in labelled]
    answers = reader.answer(requests)
    for line, answer in zip(labelled, answers, strict=True):
        assert json.loads(answer) == line["expected"], line["image"]


def test_a_request_whose_images_do_not_match_is_refused(reader: Reader) -> None:
    with pytest.raises(ValueError, match="image parts"):
        reader.answer([Request([user("What brand is it?", 2)], ())])


def test_evaluation_never_reaches_the_training_seeds() -> None:
    with pytest.raises(ValueError, match="held-out"):
        cases(10, first_seed=FIRST_TRAINING_SEED - 5)

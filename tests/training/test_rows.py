"""Training rows say, token by token, what the chat template says, at the positions the published model computes."""

from __future__ import annotations

import random

import pytest
from training.network import SPECIAL_TOKENS, grid, patches, token_id
from training.pictures import BUCKETS, FIELDS, UNKNOWN, decode, encode, resized, spell
from training.rows import IGNORED, RowWriter, collate
from training.tasks import Dialogue, Turn

from qvl.tiny import WEIGHTS
from qvl.tiny.render import DrawnProduct, sample_product
from training import lessons, tasks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def writer(tokenizer):
    return RowWriter(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])


def messages(dialogue: Dialogue) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    if dialogue.system is not None:
        found.append({"role": "system", "content": dialogue.system})
    for turn in dialogue.turns:
        parts = [{"type": "image"} for _ in turn.pictures]
        text = [{"type": "text", "text": turn.question}]
        found.append({"role": "user", "content": text + parts if turn.text_first else parts + text})
        found.append({"role": "assistant", "content": turn.answer})
    return found


def written_by_template(tokenizer, dialogue: Dialogue) -> list[int]:
    text = tokenizer.apply_chat_template(messages(dialogue), tokenize=False)
    return tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 16))["input_ids"]


@pytest.mark.parametrize(
    "dialogue",
    [
        tasks.analysis((0,), DrawnProduct("NORVIK", "mug", "red", 2), "zh"),
        tasks.analysis((0, 1), None, "es"),
        Dialogue(
            (Turn("What brand is it?", "NORVIK", (0,), text_first=True), Turn("Which colour?", "red")), "Be terse."
        ),
        Dialogue((Turn("Hello", "I need a picture."),)),
    ],
    ids=["analysis", "two pictures", "conversation", "no picture"],
)
def test_a_row_equals_the_chat_template(tokenizer, writer, dialogue) -> None:
    row = writer.write(dialogue, [(4, 4)] * 2)
    assert row.ids == written_by_template(tokenizer, dialogue)


def test_only_answers_and_their_ends_are_learnt(tokenizer, writer) -> None:
    dialogue = tasks.analysis((0,), DrawnProduct(None, "hat", "blue", 1), "en")
    row = writer.write(dialogue, [(4, 4)])
    learnt = [target for target in row.targets if target != IGNORED]
    assert tokenizer.decode(learnt) == dialogue.turns[0].answer + "<|im_end|>"


def test_a_branch_sees_the_opening_and_itself_at_its_own_positions(writer) -> None:
    turns = (Turn("What brand is it?", "NORVIK", (0,)), Turn("How many?", "2"))
    row = writer.write(Dialogue(turns, parallel=True), [(3, 4)])
    alone = writer.write(Dialogue((Turn("How many?", "2", (0,)),)), [(3, 4)])
    second = [i for i, branch in enumerate(row.branches) if branch == 2]
    assert [row.positions[i] for i in second] == alone.positions[-len(second) :]
    batch = collate([row])
    visible = batch.mask[0, 0, second[-1]]
    assert [i for i in range(len(row.ids)) if visible[i]] == [
        i for i, branch in enumerate(row.branches) if branch in (0, 2)
    ]


def test_positions_are_those_of_the_published_model(writer) -> None:
    from training.network import build

    dialogue = Dialogue((Turn("Which is it?", "red", (0, 1)), Turn("And this?", "blue", (2,))), "Be terse.")
    grids = [(4, 4), (3, 4), (5, 3)]
    row = writer.write(dialogue, grids)
    ids = torch.tensor([row.ids])
    extra = {}
    if int(transformers.__version__.split(".")[0]) >= 5:
        extra["mm_token_type_ids"] = (ids == token_id("<|image_pad|>")).int()
    expected, _ = build().model.get_rope_index(
        ids, image_grid_thw=torch.tensor([[1, 2 * y, 2 * x] for y, x in grids]), **extra
    )
    assert torch.equal(collate([row]).positions, expected)


def test_patches_are_those_of_theimage_processor() -> None:
    import numpy as np
    from PIL import Image
    from training.reader import image_processor

    from qvl.tiny.render import draw

    image = draw(DrawnProduct("WUVEX", "lamp", "pink", 2), 4, (640, 480))
    ours = np.array(image.resize(resized(640, 480), Image.Resampling.BICUBIC))[None]
    theirs = image_processor(WEIGHTS)([image], return_tensors="pt")
    assert torch.equal(grid(ours), torch.as_tensor(theirs["image_grid_thw"]))
    frames = torch.as_tensor(theirs["pixel_values"]).view(-1, 3, 2, 256)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    assert (frames[:, :, 0].reshape(-1, 768) - patches(ours)).abs().max() < 1e-5


def test_classes_and_products_are_one_to_one() -> None:
    import numpy as np

    dice = random.Random(3)
    for _ in range(200):
        product = sample_product(dice)
        classes = encode(product)
        assert all(value < size for value, size in zip(classes, FIELDS.values(), strict=True))
        assert decode(*(np.array(row, dtype=np.uint8) for row in (classes, spell(product)))) == product
    unknown = DrawnProduct("LIGRUZ", "mug", "red", 2)
    assert encode(unknown)[0] == UNKNOWN
    assert decode(*(np.array(row, dtype=np.uint8) for row in (encode(unknown), spell(unknown)))) == unknown


def test_every_grid_is_what_its_native_size_becomes() -> None:
    assert sum(bucket.share for bucket in BUCKETS) == pytest.approx(1.0)
    for bucket in BUCKETS:
        assert resized(*bucket.native) == (bucket.width, bucket.height)


def test_special_tokens_have_the_ids_the_config_names(tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        assert tokenizer.convert_tokens_to_ids(token) == token_id(token)


def test_lessons_ask_about_what_is_shown() -> None:
    dice = random.Random(5)
    products = [sample_product(dice) for _ in range(24)]
    for dialogue in lessons.questions(products, 10, 4, dice):
        product = products[dialogue.turns[0].pictures[0]]
        known = {tasks.answer(kind, product, language) for kind in tasks.KINDS for language in tasks.QUESTIONS}
        assert {turn.answer for turn in dialogue.turns} <= known
    for dialogue in lessons.comparisons(products, 20, 3, dice):
        assert len(dialogue.turns[0].pictures) in (2, 3)
        assert dialogue.parallel
    same = [t.answer for d in lessons.comparisons(products, 400, 1, dice) for t in d.turns if t.answer in ("yes", "no")]
    assert 0.35 < same.count("yes") / len(same) < 0.75

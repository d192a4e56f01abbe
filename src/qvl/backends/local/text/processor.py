"""Turns a ChatRequest into token ids, rotary positions and resized pixels, without torch and torchvision.

Gives the tokens of transformers' Qwen3VLProcessor (a test compares them), except for typed markers: see `prompt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from qvl.backends.base import Tokens
from qvl.backends.local.text.prompt import PromptEncoder, PromptLimit
from qvl.errors import ConfigError, ContextLengthError, MediaError, RequestError
from qvl.media.smart_resize import MAX_ASPECT, budget, smart_resize
from qvl.types import ImagePart, VideoPart

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from qvl.media.picture import Picture
    from qvl.types import ChatRequest, JsonObject

# Of a prompt that is only counted.
MAX_TOKENS: Final = 2**21
_HINT: Final = "download the whole checkpoint"


@dataclass(slots=True)
class PreparedPicture:
    """One picture of a prompt, or two frames of a video in a row.

    Args:
        key: cache key of its features: salt, source hash, canonical size and patch grid.
        grid: rows and columns of patches, both multiples of the merge size.
        start: index of its first token in the prompt.
        num_tokens: its number of (merged) tokens in the prompt.
        cost: cost of its encoding, in prompt tokens that take as many multiplications.
        pixels: uint8 [height, width, 3], already resized, of a video [2, height, width, 3]; None when `features` are
            known.
        features: [1 + deepstack layers, num_tokens, hidden] on the device, once computed.
        encoding: its unfinished encoding, together with small pictures behind it; None once `features` is set.
        encoded: cost of the pieces of `encoding` that are done.
        piece: cost of the next piece.
        adapter: number of the adapter that changes the picture tower for it; 0 for none.
    """

    key: str
    grid: tuple[int, int]
    start: int
    num_tokens: int
    cost: float = 0.0
    pixels: NDArray[np.uint8] | None = None
    features: Tensor | None = None
    encoding: Iterator[float] | None = None
    encoded: float = 0.0
    piece: float = 0.0
    adapter: int = 0
    video: bool = False

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A prompt as token ids, pictures and rotary `positions`, int64 [3, prompt length]: time, height and width.

    The token at index i >= prompt length has position i + `position_delta` on all three axes. `adapter` is the number
    of the adapter that computes it, 0 for none.
    """

    tokens: list[int]
    positions: NDArray[np.int64]
    position_delta: int
    pictures: tuple[PreparedPicture, ...]
    starts_thinking: bool = False
    salt: str = ""
    adapter: int = 0

    @property
    def image_tokens(self) -> int:
        return sum(picture.num_tokens for picture in self.pictures if not picture.video)

    @property
    def video_tokens(self) -> int:
        return sum(picture.num_tokens for picture in self.pictures if picture.video)


@dataclass(frozen=True, slots=True)
class ImageRules:
    """The image processor's settings; `min_pixels` and `max_pixels` are height times width of the resized picture."""

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 65536
    max_pixels: int = 16777216
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = 3

    @classmethod
    def read(cls, config: JsonObject) -> ImageRules:
        """Return the rules from the image processor's JSON, older forms (with min_pixels and max_pixels) included.

        Raises:
            ConfigError: a value is not a number, or a list does not have three.
        """
        try:
            size = dict(config.get("size") or {})
            numbers = {
                "patch_size": config.get("patch_size"),
                "merge_size": config.get("merge_size"),
                "temporal_patch_size": config.get("temporal_patch_size"),
                "min_pixels": config.get("min_pixels") or size.get("shortest_edge"),
                "max_pixels": config.get("max_pixels") or size.get("longest_edge"),
                "resample": config.get("resample"),
            }
            settings: JsonObject = {name: int(value) for name, value in numbers.items() if value is not None}
            rules = replace(cls(), **settings)
            mean, std = (tuple(map(float, config.get(key) or (0.5,) * 3)) for key in ("image_mean", "image_std"))
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"invalid image processor settings: {exc}", hint=_HINT) from exc
        if len(mean) != 3 or len(std) != 3 or rules.patch_size < 1 or rules.merge_size < 1:
            raise ConfigError("the image processor settings are not those of a Qwen3-VL", hint=_HINT)
        return replace(rules, mean=mean, std=std)

    @property
    def factor(self) -> int:
        return self.patch_size * self.merge_size

    def resized(self, height: int, width: int, *, sized: bool = False) -> tuple[int, int]:
        """Return (height, width) after Qwen's smart_resize; `sized`: a request set the size, so it is not enlarged.

        Raises:
            MediaError: the longer side is more than 200 times the shorter.
        """
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise MediaError(f"picture of {width}x{height} is too narrow", hint=f"aspect ratio at most {MAX_ASPECT}:1")
        return smart_resize(height, width, self.factor, 0 if sized else self.min_pixels, self.max_pixels)

    def resized_frames(self, count: int, height: int, width: int, *, sized: bool = False) -> tuple[int, int]:
        """Return (height, width) of each of `count` frames; the limits hold for all of a video's pixels.

        Source: `smart_resize` of transformers' video processor for Qwen3-VL, which rounds the number of frames to even.

        Raises:
            MediaError: as `resized`.
        """
        factor = self.factor
        if min(height, width) < factor:
            scale = factor / min(height, width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise MediaError(f"video of {width}x{height} is too narrow", hint=f"aspect ratio at most {MAX_ASPECT}:1")
        count = max(count, 2)
        even = round(count / 2) * 2
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        if even * rows * columns > self.max_pixels:
            beta = math.sqrt(count * height * width / self.max_pixels)
            rows = max(factor, math.floor(height / beta / factor) * factor)
            columns = max(factor, math.floor(width / beta / factor) * factor)
        elif even * rows * columns < self.min_pixels and not sized:
            beta = math.sqrt(self.min_pixels / (count * height * width))
            rows = math.ceil(height * beta / factor) * factor
            columns = math.ceil(width * beta / factor) * factor
        return rows, columns


class Placeholder(NamedTuple):
    """One picture that a placeholder of a prompt stands for, or two frames of a video of `frames` in all."""

    pictures: tuple[Picture, ...]
    frames: int = 0


def slots_of(request: ChatRequest) -> list[Placeholder]:
    """Return what the placeholders of a request's prompt stand for, in order."""
    slots: list[Placeholder] = []
    for message in request.messages:
        for part in message.parts:
            if isinstance(part, ImagePart):
                slots.append(Placeholder(part.pictures))
            elif isinstance(part, VideoPart):
                frames = part.pictures
                pairs = [frames[at : at + 2] for at in range(0, len(frames), 2)]
                slots += [Placeholder((pair[0], pair[-1]), len(frames)) for pair in pairs]
    return slots


class AdapterPlace(NamedTuple):
    """The number by which the model knows an adapter, and whether it changes the picture tower too."""

    number: int
    shows: bool


NO_ADAPTER: Final = AdapterPlace(0, shows=False)


@dataclass(slots=True)
class Processor:
    """Prepares requests for the engine; thread-safe.

    Args:
        tokenizer: transformers' fast tokenizer with a chat template.
        rules: the image processor's settings.
        image_token_id: the id that stands for one merged picture token.
        known_features: returns the cached features of a picture by key, or None.
        cost: returns `PreparedPicture.cost`.
        adapters: by name; "" is that of requests that name none.
        video_rules: the video processor's settings, and `video_token_id` its placeholder; None: it takes no videos.
    """

    tokenizer: PreTrainedTokenizerFast
    rules: ImageRules
    image_token_id: int
    known_features: Callable[[str], Tensor | None] = lambda key: None
    cost: Callable[[PreparedPicture], float] = lambda picture: 0.0
    adapters: Mapping[str, AdapterPlace] = field(default_factory=dict)
    video_rules: ImageRules | None = None
    video_token_id: int | None = None
    _prompt: PromptEncoder = field(init=False)

    def __post_init__(self) -> None:
        self._prompt = PromptEncoder(self.tokenizer)

    def prepare(
        self, request: ChatRequest, limit: PromptLimit | None = None, abandoned: Callable[[], bool] = lambda: False
    ) -> PreparedRequest:
        """Return the request as token ids, positions and pictures. Blocking, CPU-bound.

        A prompt beyond `limit` is refused before any picture is decoded. Preparation stops once `abandoned()` is true.

        Raises:
            MediaError: a picture is broken or too narrow.
            ContextLengthError: the prompt does not fit.
            RequestError: the model's chat template refuses the messages.
            AbandonedError: `abandoned()` became true.
        """
        keep, slots = request.sampling.truncate_prompt_tokens, slots_of(request)
        ids, thinking = self._prompt.encode(request, None if keep else limit, abandoned)
        tokens, prepared = self._with_pictures(ids, request)
        if keep:
            kept = keep if keep > 0 or limit is None else limit.room
            slots = slots[_truncate(tokens, prepared, kept) :]
        tokens += request.prefill
        if limit is not None:
            limit.check(len(tokens))
        for ready, slot in zip(prepared, slots, strict=True):
            self._fill(ready, slot.pictures, request.max_pixels)
        positions, delta = rope_positions(len(tokens), prepared, self.rules.merge_size)
        adapter = self._adapter(request).number
        salt = self._salt(request, adapter)
        return PreparedRequest(tokens, positions, delta, tuple(prepared), thinking, salt, adapter)

    def tokens(self, prompt: ChatRequest | str, texts: bool = False) -> Tokens:
        """Return the tokens of a request's prompt, or of a plain text; `texts`: with the text of each.

        Control tokens have the text by which they are written. No picture is decoded.

        Raises:
            RequestError: more than MAX_TOKENS tokens (of a text: characters), or the chat template refuses the
                messages.
        """
        from qvl.types import ChatRequest

        if isinstance(prompt, ChatRequest):
            try:
                ids, _ = self._prompt.encode(prompt, PromptLimit(MAX_TOKENS))
            except ContextLengthError as exc:
                raise _too_many_tokens() from exc
            ids = self._with_pictures(ids, prompt)[0]
        elif len(prompt) > MAX_TOKENS:
            raise _too_many_tokens()
        else:
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return Tokens(tuple(ids), tuple(self.tokenizer.decode([token]) for token in ids) if texts else None)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens.

        Raises:
            RequestError: an id is not in the vocabulary.
        """
        size = len(self.tokenizer)
        for number, token in enumerate(ids):
            if not 0 <= token < size:
                what = f"tokens[{number}]: {token} is not in the vocabulary of {size} tokens"
                raise RequestError(what, param=f"tokens[{number}]", code="invalid_value")
        return str(self.tokenizer.decode(list(ids)))

    def _with_pictures(self, ids: Sequence[int], request: ChatRequest) -> tuple[list[int], list[PreparedPicture]]:
        """Return (`ids` with each picture's placeholder repeated as often as it has tokens, the pictures)."""
        kinds = (self.image_token_id, self.video_token_id)
        placeholders = [index for index, token in enumerate(ids) if token in kinds]
        slots = slots_of(request)
        if request.prompt is not None and placeholders:
            what = f"the prompt's token {ids[placeholders[0]]} stands for a picture, which a prompt cannot bring"
            raise RequestError(what, hint="send pictures in messages", param="prompt")
        if len(placeholders) != len(slots):
            raise RequestError(
                f"the model's chat template renders only {len(placeholders)} of {len(slots)} pictures",
                hint="put pictures into user messages",
                param="messages",
            )
        tokens: list[int] = []
        prepared: list[PreparedPicture] = []
        done = 0
        for index, slot in zip(placeholders, slots, strict=True):
            tokens += ids[done:index]
            ready = self._picture(slot, request, start=len(tokens))
            tokens += [ids[index]] * ready.num_tokens
            prepared.append(ready)
            done = index + 1
        tokens += ids[done:]
        return tokens, prepared

    def _picture(self, slot: Placeholder, request: ChatRequest, start: int) -> PreparedPicture:
        """Return the picture with its key, patch grid and tokens from `start` on; pixels are not decoded yet."""
        picture = slot.pictures[0]
        width, height = _fitted(picture, request.max_pixels)
        if slot.frames:
            assert self.video_rules is not None
            rows, columns = self.video_rules.resized_frames(slot.frames, height, width, sized=picture.sized)
        else:
            rows, columns = self.rules.resized(height, width, sized=picture.sized)
        grid = (rows // self.rules.patch_size, columns // self.rules.patch_size)
        adapter = self._adapter(request)
        changed = adapter.number if adapter.shows else 0
        # A frame twice is not the picture of it: two in a row have kernels of their own.
        source = "+".join(shown.sha256 for shown in slot.pictures)
        key = f"{self._salt(request, changed)}/{source}/{width}x{height}/{grid[0]}x{grid[1]}"
        count = grid[0] * grid[1] // self.rules.merge_size**2
        ready = PreparedPicture(key, grid, start, count, video=bool(slot.frames))
        ready.cost = self.cost(ready)
        ready.adapter = changed
        return ready

    def _adapter(self, request: ChatRequest) -> AdapterPlace:
        return self.adapters.get(request.adapter, NO_ADAPTER)

    def _salt(self, request: ChatRequest, adapter: int) -> str:
        """Return what keeps apart what is kept of requests with other salts, and of what other adapters computed."""
        return f"{adapter}/{request.cache_salt}" if self.adapters else request.cache_salt

    def _fill(self, ready: PreparedPicture, pictures: tuple[Picture, ...], max_pixels: int | None) -> None:
        """Set the picture's features if they are cached, else its resized pixels."""
        ready.features = self.known_features(ready.key)
        if ready.features is not None:
            return
        import numpy as np

        if max_pixels is not None:
            pictures = tuple([picture.fit(max_pixels) for picture in dict.fromkeys(pictures)])
        patch = self.rules.patch_size
        size = (ready.grid[1] * patch, ready.grid[0] * patch)
        shown = [self._pixels(picture, size) for picture in dict.fromkeys(pictures)]
        ready.pixels = np.stack([shown[0], shown[-1]]) if ready.video else shown[0]

    def _pixels(self, picture: Picture, size: tuple[int, int]) -> NDArray[np.uint8]:
        import numpy as np
        from PIL.Image import Resampling

        image = picture.rgb()
        if image.size != size:
            image = image.resize(size, Resampling(self.rules.resample))
        return np.array(image, dtype=np.uint8)


def _too_many_tokens() -> RequestError:
    what = f"the prompt is too long to count: more than {MAX_TOKENS} characters or tokens"
    return RequestError(what, hint="ask about a shorter one", code="context_length_exceeded")


def _truncate(tokens: list[int], prepared: list[PreparedPicture], keep: int) -> int:
    """Cut all but the last `keep` of `tokens`, with the pictures in front, in place; return how many pictures that are.

    Raises:
        RequestError: a picture would be cut in two.
    """
    cut = max(0, len(tokens) - keep)
    gone = sum(picture.end <= cut for picture in prepared)
    if any(picture.start < cut < picture.end for picture in prepared):
        what = f"truncate_prompt_tokens={keep} would cut a picture in two"
        raise RequestError(what, hint="keep more, or fewer", param="truncate_prompt_tokens")
    del tokens[:cut], prepared[:gone]
    for picture in prepared:
        picture.start -= cut
    return gone


def _fitted(picture: Picture, max_pixels: int | None) -> tuple[int, int]:
    """Return (width, height) of `picture.fit(max_pixels)`, without decoding it."""
    if max_pixels is None:
        return picture.width, picture.height
    return budget(picture.width, picture.height, max_pixels)


def rope_positions(length: int, pictures: Sequence[PreparedPicture], merge_size: int) -> tuple[NDArray[np.int64], int]:
    """Return the multimodal rotary positions of a prompt (Qwen3-VL's get_rope_index, images only).

    Text counts up on all three axes; a picture has one time and spreads over height and width, and the text after it
    continues from the larger of the two.

    Returns:
        (int64 [3, length], the number to add to the index of a later token to get its position).
    """
    import numpy as np

    positions = np.empty((3, length), dtype=np.int64)
    index = position = 0
    for picture in pictures:
        text = picture.start - index
        positions[:, index : picture.start] = np.arange(position, position + text)
        position += text
        rows, columns = picture.grid[0] // merge_size, picture.grid[1] // merge_size
        if rows * columns != picture.num_tokens:
            raise ConfigError("merge_size of preprocessor_config.json and config.json differ", hint=_HINT)
        positions[0, picture.start : picture.end] = position
        positions[1, picture.start : picture.end] = position + np.repeat(np.arange(rows), columns)
        positions[2, picture.start : picture.end] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        index = picture.end
    positions[:, index:] = np.arange(position, position + length - index)
    return positions, position + (length - index) - length

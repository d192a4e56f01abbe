"""From a ChatRequest to token ids, positions and resized pixels, without torch and without torchvision.

Follows transformers' Qwen3VLProcessor token for token (a test compares them), but for what a user types: see `prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qvl.backends.local.text.prompt import PromptEncoder, PromptLimit
from qvl.errors import ConfigError, MediaError, RequestError
from qvl.media.smart_resize import MAX_ASPECT, budget, smart_resize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from qvl.media.picture import Picture
    from qvl.types import ChatRequest, JsonObject


@dataclass(slots=True)
class PreparedPicture:
    """One picture at its place in the prompt.

    Args:
        key: equal for equal pixels of those who may share them: salt, source hash, canonical size and patch grid.
        grid: rows and columns of patches, both multiples of the merge size.
        start: index of its first token in the prompt.
        num_tokens: merged tokens it takes there.
        pixels: uint8 [height, width, 3], already resized; None when `features` are known.
        features: [1 + deepstack, num_tokens, hidden] on the device, once computed.
        encoding: the vision tower at work on a large picture, until the features are there.
    """

    key: str
    grid: tuple[int, int]
    start: int
    num_tokens: int
    pixels: NDArray[np.uint8] | None = None
    features: Tensor | None = None
    encoding: Iterator[None] | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def pending(self) -> bool:
        """True if it has neither features nor an encoding under way."""
        return self.features is None and self.encoding is None


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request in the model's terms. `positions` is int64 [3, prompt length]: time, height and width of each token.

    The token at index i >= prompt length has position i + `position_delta` on all three axes.
    """

    tokens: list[int]
    positions: NDArray[np.int64]
    position_delta: int
    pictures: tuple[PreparedPicture, ...]
    starts_thinking: bool = False
    salt: str = ""

    @property
    def image_tokens(self) -> int:
        return sum(picture.num_tokens for picture in self.pictures)


@dataclass(frozen=True, slots=True)
class ImageRules:
    """The image processor's settings: sizes are in pixels, `min_pixels` and `max_pixels` of the resized picture."""

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
        """Return the rules of settings as they are saved; older ones name the limits min_pixels and max_pixels.

        Raises:
            ConfigError: a value is not a number, or a list not one of three.
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
            raise ConfigError(f"the checkpoint's picture settings cannot be read: {exc}") from exc
        if len(mean) != 3 or len(std) != 3 or rules.patch_size < 1 or rules.merge_size < 1:
            raise ConfigError("the checkpoint's picture settings are not those of a Qwen3-VL")
        return replace(rules, mean=mean, std=std)

    @property
    def factor(self) -> int:
        return self.patch_size * self.merge_size

    def resized(self, height: int, width: int, *, sized: bool = False) -> tuple[int, int]:
        """Return height and width that the model sees (Qwen's smart_resize); a `sized` picture does not grow again.

        Raises:
            MediaError: the longer side is more than 200 times the shorter.
        """
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise MediaError(f"a picture of {width}x{height} is too thin", hint=f"sides at most 1:{MAX_ASPECT}")
        return smart_resize(height, width, self.factor, 0 if sized else self.min_pixels, self.max_pixels)


@dataclass(slots=True)
class Processor:
    """Prepares requests; called from several threads at once.

    Args:
        tokenizer: transformers' fast tokenizer with a chat template.
        rules: how pictures are resized.
        image_token_id: the id that stands for one merged picture token.
        known_features: features of a picture by key, when some cache still has them.
    """

    tokenizer: PreTrainedTokenizerFast
    rules: ImageRules
    image_token_id: int
    known_features: Callable[[str], Tensor | None] = lambda key: None
    _prompt: PromptEncoder = field(init=False)

    def __post_init__(self) -> None:
        self._prompt = PromptEncoder(self.tokenizer)

    def prepare(
        self, request: ChatRequest, limit: PromptLimit | None = None, abandoned: Callable[[], bool] = lambda: False
    ) -> PreparedRequest:
        """Return the request in the model's terms. Blocking, CPU-bound; `abandoned` ends it.

        What does not fit `limit` is refused before any pixel is touched.

        Raises:
            MediaError: a picture is broken or too thin.
            ContextLengthError: the prompt does not fit.
            RequestError: the model's chat template refuses the messages.
            AbandonedError: nobody waits any more.
        """
        ids, thinking = self._prompt.encode(request, limit, abandoned)
        placeholders = [index for index, token in enumerate(ids) if token == self.image_token_id]
        pictures = request.pictures
        if len(placeholders) != len(pictures):
            raise RequestError(
                f"the model's chat template keeps {len(placeholders)} of {len(pictures)} pictures",
                hint="put pictures into user messages",
                param="messages",
            )
        tokens: list[int] = []
        prepared: list[PreparedPicture] = []
        done = 0
        for index, picture in zip(placeholders, pictures, strict=True):
            tokens += ids[done:index]
            ready = self._picture(picture, request, start=len(tokens))
            tokens += [self.image_token_id] * ready.num_tokens
            prepared.append(ready)
            done = index + 1
        tokens += ids[done:]
        if limit is not None:
            limit.check(len(tokens))
        for ready, picture in zip(prepared, pictures, strict=True):
            self._fill(ready, picture, request.max_pixels)
        positions, delta = rope_positions(len(tokens), prepared, self.rules.merge_size)
        return PreparedRequest(tokens, positions, delta, tuple(prepared), thinking, request.cache_salt)

    def _picture(self, picture: Picture, request: ChatRequest, start: int) -> PreparedPicture:
        """Return where the picture stands and how large it is; no pixel is touched."""
        width, height = _fitted(picture, request.max_pixels)
        rows, columns = self.rules.resized(height, width, sized=picture.sized)
        grid = (rows // self.rules.patch_size, columns // self.rules.patch_size)
        key = f"{request.cache_salt}/{picture.sha256}/{width}x{height}/{grid[0]}x{grid[1]}"
        return PreparedPicture(key, grid, start, grid[0] * grid[1] // self.rules.merge_size**2)

    def _fill(self, ready: PreparedPicture, picture: Picture, max_pixels: int | None) -> None:
        """Set features where they are known, else pixels."""
        ready.features = self.known_features(ready.key)
        if ready.features is not None:
            return
        if max_pixels is not None:
            picture = picture.fit(max_pixels)
        patch = self.rules.patch_size
        ready.pixels = self._pixels(picture, (ready.grid[1] * patch, ready.grid[0] * patch))

    def _pixels(self, picture: Picture, size: tuple[int, int]) -> NDArray[np.uint8]:
        import numpy as np
        from PIL.Image import Resampling

        image = picture.rgb()
        if image.size != size:
            image = image.resize(size, Resampling(self.rules.resample))
        return np.array(image, dtype=np.uint8)


def _fitted(picture: Picture, max_pixels: int | None) -> tuple[int, int]:
    """Return width and height after `picture.fit(max_pixels)`, without decoding it."""
    if max_pixels is None:
        return picture.width, picture.height
    return budget(picture.width, picture.height, max_pixels)


def rope_positions(length: int, pictures: Sequence[PreparedPicture], merge_size: int) -> tuple[NDArray[np.int64], int]:
    """Return the multimodal rotary positions of a prompt (Qwen3-VL's get_rope_index, images only).

    Text counts up on all three axes; a picture keeps one time and spreads over height and width, and the text behind
    it goes on after the larger of the two.

    Returns:
        int64 [3, length], and what to add to the index of a later token to get its position.
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
            raise ConfigError("merge_size of preprocessor_config.json and of config.json differ")
        positions[0, picture.start : picture.end] = position
        positions[1, picture.start : picture.end] = position + np.repeat(np.arange(rows), columns)
        positions[2, picture.start : picture.end] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        index = picture.end
    positions[:, index:] = np.arange(position, position + length - index)
    return positions, position + (length - index) - length

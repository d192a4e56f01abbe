"""The media gate's way for documents: any source of a PDF becomes one checked Document."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

from qvl.errors import MediaError
from qvl.media.document import Document
from qvl.media.page_choice import ALL_PAGES, PageChoice, apart
from qvl.media.policy import DEFAULT_POLICY, MediaPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qvl.media.picture import PictureSource

T = TypeVar("T")
# Children at a time of one event loop: pages wait for each other rather than for pictures, and pictures for no page.
_CHILDREN: Final = 4
_limiter: Final[anyio.lowlevel.RunVar[anyio.CapacityLimiter]] = anyio.lowlevel.RunVar("qvl.media.documents")


def load_document(
    source: PictureSource | Document, policy: MediaPolicy = DEFAULT_POLICY, pages: PageChoice | None = None
) -> Document:
    """Return `source` as a checked Document, whose pages are rendered on first use; a URL needs `aload_document`.

    Args:
        source: a path, a `file:` or `data:` URL, encoded bytes, a binary file object, or a Document. `#page=2` behind
            a name chooses pages where `pages` does not.
        policy: the limits.
        pages: which pages are shown; None is all of them.

    Raises:
        MediaError: the document is missing, encrypted, broken, refused, has no such page, or breaks a limit.
        MissingDependencyError: pypdfium2 is not installed.
    """
    if isinstance(source, Document):
        return source
    from qvl.media import sources
    from qvl.media.document_file import read_document

    bare, named = apart(source)
    with _told_as_document():
        data, name = sources.read(bare, policy)
    return read_document(data, name, policy, pages or named or ALL_PAGES)


async def aload_document(
    source: PictureSource | Document, policy: MediaPolicy = DEFAULT_POLICY, pages: PageChoice | None = None
) -> Document:
    """Return `source` as `load_document` does, for async code; http(s) URLs are fetched as pictures are."""
    from qvl.media import gate
    from qvl.media.document_file import read_document

    bare, named = apart(source)
    if not gate.is_remote(cast("PictureSource", bare)):
        return await in_child_thread(lambda: load_document(source, policy, pages))
    data, name = await gate.fetch(str(bare), policy)
    return await in_child_thread(lambda: read_document(data, name, policy, pages or named or ALL_PAGES))


@contextmanager
def _told_as_document() -> Iterator[None]:
    """Have the errors of reading speak of documents."""
    try:
        yield
    except MediaError as exc:
        if exc.code != "image_too_large":
            raise
        raise MediaError(exc.message, hint="split it first, or save it smaller", code="document_too_large") from exc


async def in_child_thread(work: Callable[[], T]) -> T:
    """Run work that waits for a child process in a thread, and return its result."""
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_CHILDREN)
        _limiter.set(limiter)
    return await anyio.to_thread.run_sync(work, limiter=limiter)

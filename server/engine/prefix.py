"""The prefix cache: requests of a variant that begin alike share the pages of their beginning.

What is shared are blocks: as many tokens as fill whole pages in every layer group of the variant,
the least common multiple of their tokens per page. A block is found by a key that hashes the
variant, its tokens and, through the key of the block before, all tokens before them::

    full    group 0  [3][9]|[4][6]|[5]         pages of 16 tokens
            group 1  [ 7  ]|[ 1  ]|[8]         pages of 32 tokens
                     block  block   the rest   blocks of 32 tokens

Keys and values of one token depend on all tokens before it and on the layers that attend them, so
variants share no blocks, not even in groups that both attend. A page has one owner::

    free        in the pool's list
    private     in one block table
    in a block  in the block tables of all of its users; cached while it has none, until the page
                is needed: the least recently used block first, and never before those after it

A request that uses a block uses all blocks before it, so a block without users has none after it
that has some. Plain Python: keys and page ids, no tensors.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from server.engine.pages import Block, PageLayout, PageLeakError, PagePool
from server.engine.request import Request

_KEY_BYTES = 32
"""Nobody can find two prefixes with one key, to read the answer to someone else's."""


@dataclass(slots=True)
class PrefixStats:
    """One variant's counts, in pages and since start in prompt tokens."""

    owned_pages: int = 0
    """In block tables, each counted once."""
    cached_pages: int = 0
    """In blocks without users."""
    asked_tokens: int = 0
    """Prompt tokens of requests that looked for their beginning."""
    hit_tokens: int = 0
    """Those of them that were there."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The blocks that a waiting request can begin with."""

    blocks: tuple[Block, ...]
    tokens: int
    pages: int
    """In the blocks."""
    unused_pages: int
    """Those of them in blocks without users: available until the request is admitted."""


@dataclass(slots=True)
class _Share:
    """What a variant's blocks are like."""

    groups: tuple[int, ...]
    tokens: int
    """In a block; where nothing is shared, more than any request has."""
    pages: tuple[int, ...]
    """In a block, for each of `groups`."""
    root: bytes
    """Stands before the first block."""
    stats: PrefixStats = field(default_factory=PrefixStats)


class PrefixCache:
    """All pages, by owner, and the blocks by their keys."""

    def __init__(
        self,
        pool: PagePool,
        layout: PageLayout,
        groups: Mapping[str, tuple[int, ...]],
        *,
        shares: bool = True,
    ) -> None:
        """`groups` are the layer groups of every variant; unless it `shares`, no block is ever
        full."""
        self._pool = pool
        self._shares = {
            variant: _share(variant, own, layout, shares) for variant, own in groups.items()
        }
        self._blocks: dict[bytes, Block] = {}
        self._unused: OrderedDict[Block, None] = OrderedDict()  # least recently used first
        self._unused_pages = 0

    @property
    def available(self) -> int:
        """Pages that can be taken: free ones and those of blocks without users."""
        return self._pool.free + self._unused_pages

    def stats(self, variant: str) -> PrefixStats:
        """Return a variant's counts as they are kept; not to be changed."""
        return self._shares[variant].stats

    def lookup(self, request: Request) -> Beginning:
        """Return the blocks with which a waiting request can begin, which may be none.

        At least one token is left to compute, for its logits; a request that scores its prompt
        needs those of every token.
        """
        share = self._shares[request.variant]
        blocks = () if request.scores_prompt else tuple(self._chain(request, share))
        count = len(blocks)
        unused = sum(not block.users for block in blocks)
        pages = sum(share.pages)
        return Beginning(blocks, count * share.tokens, count * pages, unused * pages)

    def admit(self, request: Request, beginning: Beginning) -> None:
        """Let a request without pages begin with the blocks that were found for it."""
        share, blocks = self._shares[request.variant], beginning.blocks
        for block in blocks:
            self._use(block)
        request.blocks = list(blocks)
        request.pages = {
            group: array("i", b"".join(block.pages[place] for block in blocks))
            for place, group in enumerate(share.groups)
        }
        request.num_computed_tokens = request.page_tokens = beginning.tokens
        request.block_end = request.num_computed_tokens + share.tokens
        if request.preemptions == 0 and not request.scores_prompt:
            request.cached_tokens = request.num_computed_tokens
            share.stats.asked_tokens += len(request.prompt)
            share.stats.hit_tokens += request.cached_tokens

    def take(self, variant: str, count: int) -> list[int]:
        """Take pages for a block table. The caller has checked that they are available."""
        while self._pool.free < count and self._unused:
            self._forget_oldest()
        self._shares[variant].stats.owned_pages += count
        return self._pool.take(count)

    def enter(self, request: Request) -> None:
        """Share the blocks of a running request that are full, computed and not shared yet.

        Where another request has entered the same block before, its pages replace this one's.
        """
        share = self._shares[request.variant]
        complete = min(request.num_computed_tokens, request.num_known)
        while request.block_end <= complete:
            key = self._key(request, len(request.blocks))
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = _own_block(request, share, key)
            else:
                self._replace_own_pages(request, share, block)
            request.blocks.append(block)
            request.block_end += share.tokens

    def release(self, request: Request) -> None:
        """Take a request's pages from it; those of blocks stay until they are needed."""
        share = self._shares[request.variant]
        shared = len(request.blocks)
        for group, pages in zip(share.groups, share.pages, strict=True):
            private = request.pages.get(group, array("i"))[shared * pages :]
            share.stats.owned_pages -= len(private)
            self._pool.give_back(private)
        for block in reversed(request.blocks):  # so that the last one is the first to be forgotten
            self._let_go(block)
        request.pages, request.blocks = {}, []
        request.page_tokens = request.num_computed_tokens = 0

    def check_counts(self) -> None:
        """Check that the numbers of pages add up; cheap.

        Raises:
            PageLeakError: they do not.
        """
        owned = sum(share.stats.owned_pages for share in self._shares.values())
        if owned + self.available != self._pool.pages:
            raise PageLeakError(
                f"of {self._pool.pages} pages, {owned} are owned, {self._unused_pages} cached and "
                f"{self._pool.free} free"
            )

    def check(self, running: Sequence[Request]) -> None:
        """Check every page and every count; slow.

        Raises:
            PageLeakError: a page is lost or has two owners, or a count is wrong.
        """
        self._pool.check([*self._private(running), *self._in_blocks()])
        self.check_counts()
        users = Counter(block for request in running for block in request.blocks)
        for block in self._blocks.values():
            if users[block] != block.users or (not block.users) != (block in self._unused):
                raise PageLeakError(f"a block has {users[block]} users, not {block.users}")
        if any(self._blocks.get(block.key) is not block for block in users):
            raise PageLeakError("a block in use was forgotten")

    def _chain(self, request: Request, share: _Share) -> Iterator[Block]:
        """Yield the blocks that a request's tokens begin with, as far as they are cached."""
        for index in range((request.num_tokens - 1) // share.tokens):
            block = self._blocks.get(self._key(request, index))
            if block is None:
                return
            yield block

    def _private(self, running: Sequence[Request]) -> Iterator[array[int]]:
        for request in running:
            share = self._shares[request.variant]
            for group, pages in zip(share.groups, share.pages, strict=True):
                yield request.pages[group][len(request.blocks) * pages :]

    def _in_blocks(self) -> Iterator[array[int]]:
        for block in self._blocks.values():
            yield from block.pages

    def _key(self, request: Request, index: int) -> bytes:
        """Return the key of a request's block; all of its tokens are known."""
        share, keys = self._shares[request.variant], request.block_keys
        while len(keys) <= index:
            start = len(keys) * share.tokens
            tokens = array("q", request.tokens(start, start + share.tokens))
            parent = keys[-1] if keys else share.root
            keys.append(blake2b(parent + tokens.tobytes(), digest_size=_KEY_BYTES).digest())
        return keys[index]

    def _use(self, block: Block) -> None:
        if not block.users:
            del self._unused[block]
            self._count_unused(block, -1)
        block.users += 1

    def _let_go(self, block: Block) -> None:
        block.users -= 1
        if not block.users:
            self._unused[block] = None
            self._count_unused(block, 1)

    def _count_unused(self, block: Block, sign: int) -> None:
        pages = sign * sum(map(len, block.pages))
        stats = self._shares[block.variant].stats
        self._unused_pages += pages
        stats.cached_pages += pages
        stats.owned_pages -= pages

    def _forget_oldest(self) -> None:
        block, _ = self._unused.popitem(last=False)
        del self._blocks[block.key]
        for pages in block.pages:
            self._pool.give_back(pages)
            self._unused_pages -= len(pages)
            self._shares[block.variant].stats.cached_pages -= len(pages)

    def _replace_own_pages(self, request: Request, share: _Share, block: Block) -> None:
        """A step in flight still reads and writes the pages given back here, but whoever takes
        them runs in a later step."""
        self._use(block)
        index = len(request.blocks)
        for group, pages, shared in zip(share.groups, share.pages, block.pages, strict=True):
            place = slice(index * pages, (index + 1) * pages)
            self._pool.give_back(request.pages[group][place])
            request.pages[group][place] = shared
            share.stats.owned_pages -= pages


def _own_block(request: Request, share: _Share, key: bytes) -> Block:
    """Return the first block of a request's private pages, with the request as its user."""
    index = len(request.blocks)
    own = tuple(
        request.pages[group][index * pages : (index + 1) * pages]
        for group, pages in zip(share.groups, share.pages, strict=True)
    )
    return Block(key, request.variant, own, users=1)


def _share(variant: str, groups: tuple[int, ...], layout: PageLayout, shares: bool) -> _Share:
    sizes = [layout.tokens_per_page[group] for group in groups]
    tokens = math.lcm(*sizes) if shares else sys.maxsize
    root = blake2b(variant.encode(), digest_size=_KEY_BYTES).digest()
    return _Share(groups, tokens, tuple(tokens // size for size in sizes), root)

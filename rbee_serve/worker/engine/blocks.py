"""How a prompt is cut into calls to llama.cpp, and how much of a cached prefix may be reused. Pure.

llama.cpp's CPU attention has two kernels for an f16 KV cache: one for 64 and more query tokens of a sequence, one for
fewer. They give different bits, and nothing else about the cut matters (compared bit by bit at 40 to 900 tokens). So
two runs agree if every position of the prompt goes through the same kernel in both:

- a prompt of 64 tokens or more is evaluated in blocks that all have 64 or more: a shorter rest joins the block before;
- a prefix is reused only so far that 64 or more tokens are left to evaluate, and only where it was evaluated as part
  of such a prompt (generated tokens went through the other kernel);
- tokens generated elsewhere are evaluated again in blocks of fewer than 64, as a decode step would.

With a q8_0 cache one kernel serves all, and where bits depend on the batch anyway there is nothing to keep: there
every common token is reused.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Query tokens of one sequence in one call from which llama.cpp takes the other attention kernel.
KERNEL_ROWS = 64
#: Tokens generated elsewhere are evaluated in blocks of this size.
REPLAY_BLOCK = 32


@dataclass(frozen=True)
class Blocks:
    """``block``: prompt tokens a call; ``two_kernels``: whether positions must keep to their kernel (see above)."""

    block: int
    two_kernels: bool

    @property
    def _mixed(self) -> bool:
        """Blocks under 64 tokens never reach the second kernel."""
        return self.two_kernels and self.block >= KERNEL_ROWS

    @property
    def capacity(self) -> int:
        """Largest number of tokens that `end` puts into one call."""
        return max(REPLAY_BLOCK, self.block + (KERNEL_ROWS - 1 if self._mixed else 0))

    @property
    def kind(self) -> str:
        """What of the cut decides about bits; part of the continuation class."""
        return "any" if not self.two_kernels else "tiled" if self._mixed else "rows"

    def end(self, start: int, prompt: int, total: int, wanted: int | None = None) -> int:
        """Return where the call that begins at position ``start`` ends; ``total`` = prompt + tokens to replay.

        ``wanted``: a smaller block for this call, as far as the kernels allow one.
        """
        if start >= prompt:
            return min(start + REPLAY_BLOCK, total)
        left = prompt - start
        block = self.block if wanted is None else max(min(wanted, self.block), min(self.smallest, self.block))
        if self._mixed and left < block + KERNEL_ROWS:
            return prompt
        return min(start + block, prompt)

    @property
    def smallest(self) -> int:
        """Smallest block that `end` may be asked for."""
        return KERNEL_ROWS if self._mixed else REPLAY_BLOCK

    def reusable(self, common: int, prompt: int, *, evaluated_as_prompt: int) -> int:
        """Return how many of ``common`` leading tokens a prompt of ``prompt`` tokens may take over.

        ``evaluated_as_prompt``: leading positions of the cache that `canonical` counted. The last token of a prompt is
        always evaluated: its logits are needed.
        """
        if not self._mixed:
            return max(0, min(common, prompt - 1))
        return max(0, min(common, evaluated_as_prompt, prompt - KERNEL_ROWS))

    def canonical(self, end: int, prompt: int) -> int:
        """Return how many leading positions have been evaluated as part of a long prompt, ``end`` being done."""
        return min(end, prompt) if prompt >= KERNEL_ROWS else 0

"""What it costs to cross from Python into the core and back, by how much crosses."""

import numpy as np

from kvhybrid._core import PagePool, TokenBuffer


class Crossing:
    """Calls that do next to nothing once they are on the other side."""

    def setup(self):
        self.pool = PagePool(64, 16)
        self.token = np.zeros(1, np.int32)
        self.buffer = TokenBuffer()

    def time_property(self):
        _ = self.pool.num_free

    def time_statistics(self):
        self.pool.statistics()

    def time_match_of_one_token(self):
        self.pool.match(self.token)


class Tokens:
    """Token ids in and out, as one buffer."""

    params = ((128, 8192), ("int32", "int64", "uint32"))
    param_names = ("tokens", "dtype")

    def setup(self, tokens, dtype):
        self.tokens = np.arange(tokens, dtype=dtype)
        self.buffer = TokenBuffer(self.tokens)

    def time_in(self, tokens, dtype):
        TokenBuffer(self.tokens)

    def time_out(self, tokens, dtype):
        self.buffer.tobytes()

    def time_compare(self, tokens, dtype):
        self.buffer.common_prefix(self.tokens)

"""Text as it comes: a token may end in the middle of a character."""
import codecs
from collections.abc import Sequence

from text.tokenizer import Tokenizer


class Text:
    """ids -> text as it comes; a character split over tokens waits for its last byte. Without a
    tokenizer, the ids."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[int]) -> None:
        self.tokenizer, self.stops, self.comma = tokenizer, stops, ""
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, ids: Sequence[int], final: bool = False) -> str:
        ids = [i for i in ids if i not in self.stops]
        if self.tokenizer:
            return self.utf8.decode(self.tokenizer.decode_bytes(ids), final)
        out = (self.comma if ids else "") + ",".join(map(str, ids))
        self.comma = "," if self.comma or ids else ""
        return out

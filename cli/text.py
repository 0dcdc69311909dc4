"""Makes text of doubtful origin fit for an operator's terminal.

A guest writes its console and words into errors; a terminal obeys escape sequences. Whatever is
printed goes through here first. Knows nothing about terminals but what they must not be sent.
"""

import codecs
import re

# Colours and cursor moves are dropped: they are noise once they may not work.
_SEQUENCE = re.compile(
    r"\x1b\[[0-9;:<=>?!\"' $]{0,32}[@-~]"  # CSI
    r"|\x1b\][^\x07\x1b\n]{0,256}(?:\x07|\x1b\\)"  # OSC: titles, links, the clipboard
    r"|\x1b[()*+#%][0-9A-Za-z@]|\x1b[=>78cDEHMNOZ]"
)
_UNFINISHED = re.compile(r"\x1b(?:\[[0-9;:<=>?!\"' $]{0,32}|\][^\x07\x1b\n]{0,256}\x1b?|[()*+#%])?\Z|\r\Z")
# C0 but \t and \n, DEL, C1, what turns the reading direction, line separators, lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def clean(text: str) -> str:
    """text without escape sequences, every other control character shown as \\xNN."""
    # Line ends first: where sequences go, what stood before and after one is not to become a line end.
    text = _SEQUENCE.sub("", text.replace("\r\n", "\n"))
    return _CONTROL.sub(_escape, text)


def one_line(text: object) -> str:
    """The same for a cell of a table: tabs and line ends become spaces."""
    return clean(" ".join(str(text).split()))


class Cleaner:
    """clean() for a stream of bytes that is cut anywhere, as a log is while it is followed."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._kept = ""

    def feed(self, data: bytes, *, last: bool = False) -> str:
        """The printable part of what has arrived; an unfinished sequence waits for its end."""
        text = self._kept + self._decoder.decode(data, last)
        self._kept = ""
        if not last and (cut := _UNFINISHED.search(text)):
            self._kept, text = text[cut.start() :], text[: cut.start()]
        return clean(text)
